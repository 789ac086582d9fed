"""Makes the W&B dashboard of a project: a saved view with what to look at, in the order to look at it.

python scripts/wandb_dashboard.py --entity=me --project=vp_rl              saves the view and prints its address
python scripts/wandb_dashboard.py --entity=me --project=vp_rl --dry-run    prints what it would save; needs no network

pip install 'vp_rl[wandb_dashboard]'. The metrics are explained in docs/metrics.md.
"""

import argparse
import json

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

# Section -> panel -> metrics.
CURVES = {
    "Is it better? (a judge that training does not see)": {
        "held-out judge, 1 to 5": ["held_out/mean_rating"],
        "held-out reward": ["held_out/reward"],
        "prompt followed": ["held_out/correct"],
        "by aspect": [f"held_out/{name}" for name in ("prompt_following", "aesthetic", "fidelity", "harmlessness")],
        "signs of an exploited reward": ["held_out/signs"],
    },
    "Does it learn?": {
        "training reward": ["train/reward"],
        "spread of the training reward": ["train/reward_std"],
        "prompts that teach nothing": ["train/zero_variance_groups"],
        "loss": ["train/loss"],
    },
    "Is it stable?": {
        "KL to the base model": ["train/kl"],
        "ratio": ["train/ratio"],
        "clip fraction": ["train/clip_fraction"],
        "log-probability drift": ["train/log_prob_drift"],
        "skipped": ["train/skipped"],
    },
    "How fast?": {
        "images/s": ["train/images_per_second"],
        "seconds of a round": [f"train/seconds_{name}" for name in ("sampling", "reward", "training")],
    },
}
SAMPLES = "held_out/images"
LOG_SCALE = {"train/kl", "train/log_prob_drift"}
SWEPT = ("algorithm.optimizer.lr", "policy.lora.r", "seed")


def workspace(entity: str, project: str) -> ws.Workspace:
    """The view, not yet saved: curves, the table of samples, and what a sweep changed against what came of it."""
    sections = [
        ws.Section(
            name=name,
            is_open=True,
            panels=[
                wr.LinePlot(title=title, x="epoch", y=metrics, log_y=not LOG_SCALE.isdisjoint(metrics) or None)
                for title, metrics in panels.items()
            ],
        )
        for name, panels in CURVES.items()
    ]
    samples = wr.WeavePanelSummaryTable(table_name=SAMPLES, layout=wr.Layout(w=24, h=20))
    finals = [
        wr.ScalarChart(title=title, metric=wr.SummaryMetric(metric))
        for title, metric in (("gain by the judge", "final/mean_rating"), ("gain by the reward", "final/reward"))
    ]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name)) for name in SWEPT]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("final/mean_rating")))
    sweep = wr.ParallelCoordinatesPlot(title="what a sweep changed, and what came of it", columns=columns)
    return ws.Workspace(
        entity=entity,
        project=project,
        name="vp_rl",
        sections=[
            sections[0],
            ws.Section(name="Samples: base and now", is_open=True, panels=[samples]),
            *sections[1:],
            ws.Section(name="Results and sweeps", is_open=True, panels=[*finals, sweep]),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="vp_rl", help="logger.wandb.project of the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the view as JSON, save nothing")
    given = parser.parse_args()
    view = workspace(given.entity, given.project)
    if given.dry_run:
        print(json.dumps(view._spec, indent=2))
        return
    print(view.save().url)


if __name__ == "__main__":
    main()

"""A plan as tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vp_rl.algorithms.phases import Cut
from vp_rl.planning import fit
from vp_rl.planning.estimate import Part, peak
from vp_rl.planning.geometry import at
from vp_rl.planning.plan import Planner
from vp_rl.planning.work import real

_QUICK = 20e6  # parameters of a policy that a CPU is timed with


def show(planner: Planner) -> None:
    """Prints the plan, the memory that a device needs, and the time, where it can be found out quickly."""
    console = Console()
    table = Table("plan", "", title="dry run: nothing is trained", title_justify="left")
    for name, text in rows(planner).items():
        table.add_row(name, text)
    console.print(table)
    console.print(memory_table(planner.estimator.parts(planner.plan.load)))
    console.print(_speed(planner), soft_wrap=True)


def rows(planner: Planner) -> dict[str, str]:
    """What will be done, in words."""
    plan, geometry, epochs = planner.plan, planner.plan.geometry, planner.trainer.max_epochs
    updates = _rounds(planner) * plan.updates_per_round
    in_all = f", {updates * epochs:,} in the run" if epochs and epochs > 0 else ""
    found = {
        "devices": f"{plan.devices} x {planner.trainer.strategy.root_device.type}",
        "an update": f"{geometry.images_per_update} images",
        "updates": f"{updates:,} an epoch{in_all}",
    }
    load, cut = plan.load, geometry.cut
    if cut != Cut():
        shared = f", each shared by {plan.devices_per_prompt} devices" if plan.devices_per_prompt > 1 else ""
        found |= {
            "a round": f"{load.images * plan.devices} images, {cut.images_per_prompt} of each prompt; "
            f"updates: {plan.updates_per_round}",
            "  on each device": f"{load.images} images of {load.prompts} prompts{shared}",
            "  sampled at once": f"{load.sample_batch} images",
        }
    what = "images" if cut == Cut() else "examples"
    found["  trained at once"] = f"{load.train_batch} {what}, x {plan.accumulate} accumulated = an update's"
    trained = sum(p.numel() for p in planner.algorithm.policy.parameters() if p.requires_grad)
    return found | {"trainable parameters": f"{trained:,}"}


def memory_table(parts: Sequence[Part]) -> Table:
    """The parts, and the peak of their largest phase."""
    table = Table("memory of a device (estimated)", "while")
    table.add_column("MiB", justify="right")
    for part in parts:
        table.add_row(part.name, part.phase, "not known" if part.bytes is None else f"{part.bytes / 2**20:,.1f}")
    most, phase = peak(parts)
    table.add_section()
    table.add_row("peak", phase, f"{most / 2**20:,.1f}")
    return table


def _speed(planner: Planner) -> str:
    plan, device, epochs = planner.plan, planner.trainer.strategy.root_device, planner.trainer.max_epochs
    if device.type == "cpu" and sum(p.numel() for p in planner.algorithm.policy.parameters()) > _QUICK:
        return "images/s and hours: not known. A dry run on a GPU times one of each piece of work."
    with real(planner.algorithm, device, planner.context) as work:
        taken = fit.seconds_per_round(work, plan, device)
    text = f"about {plan.load.images * plan.devices / taken:.3g} images/s"
    if epochs and epochs > 0:
        text += f", {taken * _rounds(planner) * epochs / 3600:.2g} hours for the run without its evaluations"
    return f"{text} (one of each piece of work, timed on this device)"


def _rounds(planner: Planner) -> int:
    """Of an epoch; where images are learned from as they come, an epoch is what a round is."""
    return at(planner.settings, "data.batches_per_epoch") if planner.plan.geometry.cut != Cut() else 1

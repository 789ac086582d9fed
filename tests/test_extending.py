"""The promise: whatever kind of part is added, it is one file and one yaml, outside this repository too.

Each kind is written into a package of its own in a temporary folder, and `train.py --config-dir` runs it: planned,
trained, stopped and gone on with, evaluated on held-out prompts, reported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT

CODE = {
    "weighted_regression": '''
        """Reward-weighted regression: an online algorithm of one's own."""
        from typing import NamedTuple
        import torch
        from vp_rl.algorithms.online import OnlineTraining

        class Kept(NamedTuple):
            x0: torch.Tensor
            noise: torch.Tensor
            timestep: torch.Tensor

        class WeightedRegression(OnlineTraining):
            def collect(self, part, *position):
                x0 = self.sampler.sample(self.policy, part.conditioning, part.noise)
                noise = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in part.noise])
                timestep = torch.cat([torch.randint(1000, (1,), generator=each) for each in part.noise]).float()
                return x0, Kept(x0, noise, timestep)

            def loss(self, batch, conditioning):
                kept, process = batch.examples, self.policy.process
                latents = process.add_noise(kept.x0, kept.noise, kept.timestep)
                wrong = self.policy.predict(latents, kept.timestep, conditioning, 1.0)
                wrong = wrong - process.target(kept.x0, kept.noise, kept.timestep)
                weight = batch.advantages[:, 0].clamp(-2, 2).exp()
                return (weight * wrong.square().flatten(1).mean(1)).mean(), {"train/weight": weight}

            def made_up(self, latents):
                return Kept(latents, latents, torch.zeros(len(latents), device=latents.device))
    ''',
    "last_step": '''
        """The reward's gradient at the last step but one: a reward-gradient algorithm of one's own."""
        import torch
        from vp_rl.algorithms.reward_gradient import Finished, RewardGradient

        class LastStep(RewardGradient):
            def __init__(self, policy, reward, sampler, optimizer, *, seed: int = 0) -> None:
                super().__init__(policy, reward, sampler, optimizer, seed=seed)
                self.starts = [sampler.steps - 2]

            def finish(self, latents, start, conditioning, noise):
                step = torch.full((len(latents),), start, device=latents.device)
                transition = self.sampler.transition(self.policy, latents, step, conditioning)
                return Finished(self.policy.decode(transition.x0))

            def of_scores(self, scores):
                return -scores.mean()
    ''',
    "tuning": '''
        """Supervised fine-tuning on the preferred images: an offline algorithm of one's own, without a reward."""
        import torch
        from vp_rl.algorithms.base import PolicyTraining

        class Tuning(PolicyTraining):
            def training_step(self, batch, batch_idx):
                rows = batch.better.unique()
                x0 = self.policy.encode_images(batch.images[rows])
                generator = self.generator(self.current_epoch, batch_idx)
                noise = torch.randn(x0.shape, generator=generator)
                timestep = torch.randint(1000, (len(x0),), generator=generator).float()
                conditioning = self.policy.encode([batch.prompts[row] for row in rows.tolist()])
                process = self.policy.process
                output = self.policy.predict(process.add_noise(x0, noise, timestep), timestep, conditioning, 1.0)
                loss = (output - process.target(x0, noise, timestep)).square().mean()
                self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(rows))
                return self.weighed(loss, len(rows))
    ''',
    "redness": '''
        """A reward of one's own."""
        from vp_rl.interfaces import Reward

        class Redness(Reward):
            differentiable = True

            def forward(self, images, prompts):
                return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    ''',
    "taste": '''
        """An annotator of one's own, the held-out judge of a run: the brighter the better."""
        import io
        import json
        import numpy as np
        from PIL import Image
        from vp_rl.interfaces import Annotator
        from vp_rl.types import Answer, Rating

        class Taste(Annotator):
            name, version, concurrency = "taste", "1", 4

            async def ask(self, prompt, images, aspect):
                means = [float(np.asarray(Image.open(io.BytesIO(each)).convert("L")).mean()) for each in images]
                return Answer(json.dumps([1 + round(mean / 256 * 4) for mean in means]))

            def read(self, answer, images):
                return [Rating(rating, "by its brightness") for rating in json.loads(answer)]
    ''',
    "preference": '''
        """An annotator of one's own that only compares pairs: the more colourful one is better."""
        import io
        import numpy as np
        from PIL import Image
        from vp_rl.annotators.pairs import PairAnnotator

        class Preference(PairAnnotator):
            name, version, concurrency = "preference", "1", 4

            async def compare(self, prompt, first, second, aspect):
                one, other = (float(np.asarray(Image.open(io.BytesIO(each))).std()) for each in (first, second))
                return 0.5 if one == other else float(one > other)
    ''',
    "edges": '''
        """A report metric of one's own: how much neighbouring pixels differ."""
        import numpy as np

        class Edges:
            def __call__(self, images, prompts):
                return np.abs(np.diff(images.astype(float), axis=2)).mean((1, 2, 3))
    ''',
    "shade": '''
        """A model family of one's own: an image is what is left of its noise, plus a colour that is trained."""
        from contextlib import contextmanager
        import torch
        from diffusers.utils.torch_utils import randn_tensor
        from safetensors.torch import load_file, save_file
        from torch import nn
        from vp_rl.interfaces import Policy
        from vp_rl.processes.flow import Flow
        from diffusers import FlowMatchEulerDiscreteScheduler

        class Shade(Policy):
            def __init__(self, size: int = 8) -> None:
                super().__init__()
                self.process, self.size, self.on = Flow(FlowMatchEulerDiscreteScheduler(), 1), size, True
                self.colour = nn.Parameter(torch.zeros(3, 1, 1))
                self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

            def encode(self, prompts):
                return {"text": torch.tensor([[float(len(prompt))] for prompt in prompts])}

            def noise(self, batch, generator=None):
                several = list(generator) if isinstance(generator, list | tuple) else generator
                return randn_tensor((batch, 3, self.size, self.size), several)

            def predict(self, latents, timestep, conditioning, guidance):
                clean = 0.1 * latents + (self.colour if self.on else 0.0)
                return (latents - clean) / (timestep / 1000).reshape(-1, 1, 1, 1).clamp(min=1e-3)

            def decode(self, latents):
                return (latents / 2 + 0.5).clamp(0, 1)

            def encode_images(self, images):
                return nn.functional.interpolate(images, size=self.size) * 2 - 1

            @contextmanager
            def reference(self):
                self.on = False
                try:
                    yield
                finally:
                    self.on = True

            def save_adapter(self, directory):
                directory.mkdir(parents=True, exist_ok=True)
                save_file({"colour": self.colour.detach().clone()}, directory / "pytorch_lora_weights.safetensors")

            def load_adapter(self, directory):
                self.colour.data = load_file(directory / "pytorch_lora_weights.safetensors")["colour"]
    ''',
}
ONLINE = "policy: ${policy}\nreward: ${reward}\nsampler: ${sampler}\n"
YAMLS = {
    "algorithm/weighted_regression": f"_target_: mine.weighted_regression.WeightedRegression\n{ONLINE}"
    "images_per_prompt: 4\ntrain_batch: 8\nsample_batch: 8\nseed: ${seed}\n",
    "algorithm/last_step": f"_target_: mine.last_step.LastStep\n{ONLINE}seed: ${{seed}}\n",
    "algorithm/tuning": "_target_: mine.tuning.Tuning\npolicy: ${policy}\nseed: ${seed}\n",
    "reward/redness": "_target_: mine.redness.Redness\n",
    "annotator/taste": "_target_: mine.taste.Taste\n",
    "annotator/preference": "_target_: mine.preference.Preference\n",
    "policy/shade": "_target_: mine.shade.Shade\nsize: 8\n",
}
SMALL = (
    "name=extended",
    "trainer=cpu",
    "sampler.steps=3",
    "evaluation.limit=4",
    "evaluation.sampler.steps=2",
    "callbacks.held_out.every=1",
    "callbacks.held_out.small=4",
    "optimizer@algorithm.optimizer=adamw",
)
RUNS = {
    "an online algorithm": ("algorithm=weighted_regression", "reward=compressibility", "data.batch_size=4"),
    "a reward-gradient algorithm": ("algorithm=last_step", "reward=redness", "data.batch_size=4"),
    "an offline algorithm": (
        "algorithm=tuning",
        "data=preferences",
        "prompts.train=12",
        "data.builder.images_per_prompt=2",
    ),
    "a reward": ("algorithm=nft", "algorithm.images_per_prompt=4", "reward=redness", "data.batch_size=2"),
    "an annotator": ("algorithm=refl", "reward=redness", "annotator=taste", "data.batch_size=2", "algorithm.target=9"),
    "an annotator that only compares pairs": (
        "algorithm=tuning",
        "data=preferences",
        "prompts.train=12",
        "data.builder.images_per_prompt=3",
        "+annotator@rater=preference",
        "data.builder.annotator=${rater}",
        "data.folder=compared",
    ),
    "a report metric": (
        "algorithm=refl",
        "reward=redness",
        "data.batch_size=2",
        "algorithm.target=9",
        "+evaluation.metrics.edges._target_=mine.edges.Edges",
    ),
    "a policy family": ("algorithm=draft", "reward=redness", "policy=shade", "sampler.eta=0", "data.batch_size=4"),
}
PLANNED = ("an online algorithm", "a reward-gradient algorithm", "a policy family")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `mine`, and its yamls in `conf`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").touch()
    for name, code in CODE.items():
        lines = code.strip("\n").splitlines()
        (folder / "mine" / f"{name}.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")
    for name, text in YAMLS.items():
        file = folder / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def run(package: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(package / "conf"), *SMALL, *words]
    paths = os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=package,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_part_of_ones_own_runs_is_gone_on_with_and_reported(kind: str, package: Path, tmp_path: Path) -> None:
    words = RUNS[kind]
    last = "callbacks.held_out.best=null"  # the last adapter, not the best
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(package, *words, last, "trainer.max_epochs=2", f"hydra.run.dir={whole}")
    run(package, *words, last, "trainer.max_epochs=1", f"hydra.run.dir={half}")
    run(package, *words, last, "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'rest'}", f"resume={half}")
    found, expected = adapter(tmp_path / "rest"), adapter(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in adapter(half).items())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary
    page = (whole / "report.html").read_text()
    assert "Did it improve?" in page
    assert ("Reward (trained for)" in page) == ("algorithm=tuning" not in words)
    assert ("By your own metrics" in page) == (kind == "a report metric")
    if kind == "a report metric":
        change = summary["held_out"]["metric/edges"]
        assert change["base"] > 0
        assert change["low"] <= change["difference"] <= change["high"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANNED)
def test_an_algorithm_of_ones_own_is_planned(kind: str, package: Path, tmp_path: Path) -> None:
    said = run(package, *RUNS[kind], "dry_run=true", "trainer.max_epochs=2", f"hydra.run.dir={tmp_path}")
    assert "trained at once" in said
    assert "peak" in said
    assert "images/s" in said

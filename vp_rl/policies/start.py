"""What an adapter begins with, and what a policy's reference is: the model on disk, or that beginning."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vp_rl.configuration.kinds import one_of

Reference = Annotated[str, one_of("base", "start")]


@dataclass(frozen=True)
class Start:
    """The settings `policy.start` and `policy.reference`.

    Attributes:
        path: file of an adapter, its folder, or a run's; None: the adapter begins as none.
        reference: `base`, the model without any adapter; or `start`, it with the adapter at `path`.

    Raises:
        ValueError: they cannot be, or not together.
    """

    path: str | None = None
    reference: str = "base"

    def __post_init__(self) -> None:
        if self.path is not None and not (isinstance(self.path, str) and self.path):
            raise ValueError(f"policy.start={self.path!r} must be a file or a folder, or null.")
        if self.reference not in ("base", "start"):
            raise ValueError(f"policy.reference={self.reference!r} is unknown: choose from base, start.")
        if self.reference == "start" and self.path is None:
            raise ValueError("policy.reference=start needs policy.start=FOLDER, the adapter that it is.")


NOWHERE = Start()


class Held(nn.Module):
    """The weights that a denoiser's adapter has now, kept beside those that are trained.

    They are in checkpoints as extra state: a resumed run has its own reference, whatever has become of the file.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self._names = list(trained)
        self.weights = nn.ParameterList(
            nn.Parameter(each.detach().clone(), requires_grad=False) for each in trained.values()
        )

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[None]:
        """Inside it the denoiser's adapter has these weights.

        They take the trained ones' places rather than be written into them: a graph that was made before stays right.

        Raises:
            ValueError: the adapter is divided among devices.
        """
        places = [(denoiser.get_submodule(path), leaf) for path, _, leaf in (n.rpartition(".") for n in self._names)]
        own = [module._parameters[leaf] for module, leaf in places]
        if any(isinstance(each, DTensor) for each in own):
            raise ValueError(
                "policy.reference=start has a second adapter, which FSDP does not divide: use trainer=ddp, as the "
                "trained part is small, or policy.reference=base."
            )
        try:
            for (module, leaf), weight in zip(places, self.weights, strict=True):
                module._parameters[leaf] = weight
            yield
        finally:
            for (module, leaf), weight in zip(places, own, strict=True):
                module._parameters[leaf] = weight

    def get_extra_state(self) -> dict[str, Tensor]:
        """The weights by name."""
        return dict(zip(self._names, (each.detach() for each in self.weights), strict=True))

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        for name, weight in zip(self._names, self.weights, strict=True):
            weight.data.copy_(state[name])

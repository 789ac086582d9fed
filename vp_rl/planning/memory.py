"""Peak memory of a computation, counted without doing it.

Tensors are faked (shapes and dtypes, no numbers), the computation runs, forwards and backwards, and every storage is
counted from its making to its last use. That is what an allocator hands out: with gradient checkpointing, slices or
tiles as they are in the code, and with nothing assumed about a model. What is not seen is what kernels take for
themselves inside (cuDNN's workspaces), an allocator's fragmentation and the CUDA context.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_Module = TypeVar("_Module", bound=nn.Module)
_PROBED = 1 << 16  # numbers of a parameter that optimizers are tried on; fewer, and those of 8 bit use 32


class PeakMemory(TorchDispatchMode):
    """Inside it, storages that operations make are counted while they live; what was there before is not.

    Attributes:
        now: bytes that live.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts what an operation gives."""
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()


class Fakes:
    """Copies of modules and of tensors that have no numbers, and so need no memory and no time."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def module(self, module: _Module) -> _Module:
        """A copy with everything that hangs on it."""
        with FakeCopyMode(self._mode):
            return copy.deepcopy(module)

    def tensor(self, tensor: Tensor) -> Tensor:
        """One like it."""
        return self._mode.from_tensor(tensor)

    def fill(self, module: nn.Module, device: str = "cpu") -> None:
        """Gives a module that was built on `meta` such tensors, as if it were on the device."""
        made: dict[int, Any] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = made.setdefault(id(tensor), self._like(tensor, device))  # shared ones stay so

    def _like(self, tensor: Tensor, device: str) -> Tensor:
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    @contextmanager
    def peak(self) -> Iterator[PeakMemory]:
        """Inside it, tensors are faked and counted."""
        with self._mode, PeakMemory() as memory:
            yield memory


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({each._cdata: each.nbytes() for each in _storages(list(tensors))}.values())


def weights(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size_of([*module.parameters(), *module.buffers()])


def optimizer_bytes(make: Callable[[Iterable[nn.Parameter]], Optimizer]) -> float:
    """Bytes that an optimizer remembers for each number it trains: looked up on a parameter that it steps once."""
    parameter = nn.Parameter(torch.zeros(_PROBED))
    parameter.grad = torch.ones(_PROBED)
    optimizer = make([parameter])
    optimizer.step()
    return size_of(value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)) / _PROBED

"""Peak memory and computation of a training step, foretold from shapes alone: no data, no convolution, no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from memnet.accounting.convolution_memory import bytes_inside
from memnet.accounting.operations import flops_of
from memnet.accounting.shapes import run_without_data

__all__ = ["Device", "DryRun", "Ledger", "building", "dry_run", "simulation"]

Device = Literal["cpu", "cuda"]
"""Where a run would be."""

_ATEN = torch.ops.aten
# What an operation whose result depends on the data is taken to return: a stream in range, a residual that is not yet small,
# a random state that was not drawn from, a valid label.
_STAND_INS: dict[Any, Any] = {_ATEN._local_scalar_dense.default: 1, _ATEN.equal.default: True}
# loops run over their values
_COUNTED = {_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step, _ATEN.linspace.default}
_DEVICE = torch.ops.prim.device.default  # asked for more often than everything else together
_BY_ELEMENTS = {_ATEN.leaky_relu_backward.default}  # which PyTorch does not tag as such
_TOLERANCE = 0.001  # share of the peak that may be dead already; looking after each operation takes too long
_ENGINE_REFERENCES = 6  # to a tensor in this module that the caller of an operation does not hold


class DryRun(NamedTuple):
    """What a run would take.

    Attributes:
        peak: bytes alive at once, parameters' gradients apart.
        flops: floating-point operations of matrix products and convolutions.
    """

    peak: int
    flops: int


def dry_run(make: Callable[[], tuple[Callable[[], object], Iterable[torch.Tensor]]], device: Device = "cpu") -> DryRun:
    """Run a forward and backward pass on tensors without data, and account for them as if they had some.

    Every tensor counts from the operation that makes it to the last reference to it, as with
    :func:`memnet.accounting.live_memory.peak_live_bytes`, which measures the same on real tensors. Of what operations
    take inside, copies and scratch of convolutions on a CPU (see :mod:`memnet.accounting.convolution_memory`) and casts of
    operations by elements are known and counted; the workspace of a GPU's library is not.

    Args:
        make: builds the network and its inputs, under simulation, and returns the run to account for (what it returns stays
            alive until its end) and the parameters, whose ``.grad`` after it is not counted.
        device: where the run would be; on ``cuda`` the tensors alone are counted. They are simulated on a CPU either way.

    Returns:
        The account.

    Raises:
        RuntimeError: an operation of the network needs the values of its tensors in a way that no stand-in can serve.
    """
    with simulation():
        with _Building():
            run, parameters = make()
        ledger = Ledger(device == "cpu")
        with ledger:
            result = run()
        del result
        return DryRun(ledger.peak(parameters), ledger.flops)


def simulation() -> AbstractContextManager[Any]:
    """Return a context in which tensors have no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def building() -> Iterator[None]:
    """Make a context in which networks are built without data."""
    with simulation(), _Building():
        yield


class _Building(TorchDispatchMode):
    """Knows the numbers that networks read while they are built."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _with_numbers(func, args, kwargs, func(*args, **kwargs))


class Ledger(TorchDispatchMode):
    """Books each storage when an operation returns it, and cancels it when nothing refers to it any more.

    Args:
        counts_inside: book also what a CPU's operations take while they run.

    Attributes:
        flops: floating-point operations of matrix products and convolutions so far.
    """

    def __init__(self, counts_inside: bool = True) -> None:
        super().__init__()
        self.flops = 0
        self._counts_inside = counts_inside
        # bytes alive, their peak, and what was made since the dead were last looked for
        self._live = self._most = self._unsettled = 0
        self._alive: dict[int, tuple[int, StorageWeakRef, int]] = {}  # storage: place of its booking, reference, bytes
        self._bookings: list[tuple[int, int]] = []  # place of the booking that a line belongs to, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return args[0].device
        if func is _ATEN.add.Tensor:
            self._reuse_accumulated(args)
        try:
            outputs, made = run_without_data(func, args, kwargs)
        except DataDependentOutputException as error:
            if func not in _STAND_INS:
                raise RuntimeError(f"{func} needs values, and a simulation has shapes alone") from error
            return _STAND_INS[func]
        outputs = _with_numbers(func, args, kwargs, outputs)
        self.flops += flops_of(func, args, kwargs, outputs)
        inside = (bytes_inside(func, args, outputs) or _bytes_of_casts(func, args)) if self._counts_inside else 0
        storages = {_key(y.untyped_storage()): y.untyped_storage() for y in made}
        new = [storage for key, storage in storages.items() if key not in self._alive]
        self._unsettled += inside + sum(storage.nbytes() for storage in new)
        if self._unsettled > _TOLERANCE * self._most:
            self._settle()
        # what a convolution takes inside is gone when it makes the gradient of the weights
        n_before = args[-1][0] if func is _ATEN.convolution_backward.default else len(new)
        for storage in new[:n_before]:
            self._book(storage)
        if inside:
            place = len(self._bookings)
            self._bookings += [(place, inside), (place, -inside)]
            self._most = max(self._most, self._live + inside)
        for storage in new[n_before:]:
            self._book(storage)
        return outputs

    def peak(self, parameters: Iterable[torch.Tensor]) -> int:
        """Return the peak of all bookings but those of the parameters' gradients."""
        self._settle()
        keys = {_key(p.grad.untyped_storage()) for p in parameters if p.grad is not None}
        excluded = {self._alive[key][0] for key in keys & self._alive.keys()}
        live = peak = 0
        for place, size in self._bookings:
            if place not in excluded:
                live += size
                peak = max(peak, live)
        return peak

    def _book(self, storage: torch.UntypedStorage) -> None:
        place, size = len(self._bookings), storage.nbytes()
        self._alive[_key(storage)] = place, StorageWeakRef(storage), size
        self._bookings.append((place, size))
        self._live += size
        self._most = max(self._most, self._live)

    def _cancel(self, key: int) -> None:
        place, _, size = self._alive.pop(key)
        self._bookings.append((place, -size))
        self._live -= size

    def _settle(self) -> None:
        self._unsettled = 0
        for key in [key for key, (_, reference, _) in self._alive.items() if reference.expired()]:
            self._cancel(key)

    def _reuse_accumulated(self, args: Any) -> None:
        # Autograd's engine sums gradients into the first of them if it holds the only reference. A tensor that Python sees
        # is none of these, and so the engine makes a new one here; the references in this call are the only ones then.
        first = args[0]
        if torch._C._current_graph_task_id() == -1 or not all(isinstance(x, torch.Tensor) for x in args):
            return
        del args
        if sys.getrefcount(first) <= _ENGINE_REFERENCES and first._use_count() <= 4:
            key = _key(first.untyped_storage())
            if key in self._alive:
                self._cancel(key)


def _with_numbers(function: Any, arguments: Any, options: Any, outputs: Any) -> Any:
    if function in _COUNTED and isinstance(outputs, FakeTensor):
        with no_dispatch():
            outputs.constant = function(*arguments, **{**options, "device": "cpu"})
    return outputs


def _bytes_of_casts(function: Any, arguments: Any) -> int:
    """Bytes of the copies in which a CPU's operation by elements brings its inputs to one type."""
    if torch.Tag.pointwise not in function.tags and function not in _BY_ELEMENTS:
        return 0
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim() and x.is_floating_point()]
    if len({x.dtype for x in inputs}) < 2 or inputs[0].device.type != "cpu":
        return 0
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs))
    return sum(x.numel() * dtype.itemsize for x in inputs if x.dtype != dtype)


def _key(storage: torch.UntypedStorage) -> int:
    return StorageWeakRef(storage).cdata

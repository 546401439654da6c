"""Peak memory and computation of a training step, foretold from shapes alone: no data, no convolution, no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["DryRun", "Ledger", "dry_run", "simulation"]

_ATEN = torch.ops.aten
# What an operation whose result depends on the data is taken to return: a stream in range, a residual that is not yet small,
# a random state that was not drawn from, a valid label.
_STAND_INS: dict[Any, Any] = {_ATEN._local_scalar_dense.default: 1, _ATEN.equal.default: True}
_COUNTED = {_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step}  # loops run over their values
_ENGINE_REFERENCES = 6  # to a tensor in this module that the caller of an operation does not hold
_SLOW_BELOW = 20480  # batch * channels * depth * height up to which PyTorch's CPU convolution unfolds its input
_BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # of channels that oneDNN keeps together


class DryRun(NamedTuple):
    """What a run would take.

    Attributes:
        peak: bytes alive at once, parameters' gradients apart.
        flops: floating-point operations of matrix products and convolutions.
    """

    peak: int
    flops: int


def dry_run(make: Callable[[], tuple[Callable[[], object], Iterable[torch.Tensor]]]) -> DryRun:
    """Run a forward and backward pass on tensors without data, and account for them as if they had some.

    Every tensor counts from the operation that makes it to the last reference to it, as with
    :func:`memnet.accounting.live_memory.peak_live_bytes`, which measures the same on real tensors. Of what operations
    take inside, the unfolded input of PyTorch's own convolution on a CPU (float32, batch size 1, small) is known and
    counted; copies that oneDNN makes are not, nor is the workspace of a GPU's library.

    Args:
        make: builds the network and its inputs, under simulation, and returns the run to account for (what it returns stays
            alive until its end) and the parameters, whose ``.grad`` after it is not counted.

    Returns:
        The account.

    Raises:
        RuntimeError: an operation of the network needs the values of its tensors in a way that no stand-in can serve.
    """
    with simulation():
        run, parameters = make()
        ledger = Ledger()
        with ledger:
            result = run()
        del result
        return DryRun(ledger.peak(parameters), ledger.flops)


def simulation() -> AbstractContextManager[Any]:
    """Return a context in which tensors have no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Ledger(TorchDispatchMode):
    """Books each storage when an operation returns it, and cancels it when nothing refers to it any more.

    Attributes:
        flops: floating-point operations of matrix products and convolutions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._alive: dict[int, tuple[int, StorageWeakRef, int]] = {}  # storage: place of its booking, reference, bytes
        self._bookings: list[tuple[int, int]] = []  # place of the booking that a line belongs to, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.add.Tensor:
            self._reuse_accumulated(args)
        try:
            outputs = func(*args, **kwargs)
        except DataDependentOutputException as error:
            if func not in _STAND_INS:
                raise RuntimeError(f"{func} needs values, and a simulation has shapes alone") from error
            return _STAND_INS[func]
        if func in _COUNTED and isinstance(outputs, FakeTensor):
            with no_dispatch():
                outputs.constant = func(*args, **{**kwargs, "device": "cpu"})
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=outputs)
        self._settle()
        # a view, of a parameter for one, is nothing new
        old = {_key(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and _key(x.untyped_storage()) not in old:
                self._book(x.untyped_storage())
        inside = _bytes_inside(func, args, outputs)
        if inside:
            place = len(self._bookings)
            self._bookings += [(place, inside), (place, -inside)]
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
        key = _key(storage)
        if key not in self._alive:
            place = len(self._bookings)
            self._alive[key] = place, StorageWeakRef(storage), storage.nbytes()
            self._bookings.append((place, storage.nbytes()))

    def _cancel(self, key: int) -> None:
        place, _, size = self._alive.pop(key)
        self._bookings.append((place, -size))

    def _settle(self) -> None:
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


def _key(storage: torch.UntypedStorage) -> int:
    return StorageWeakRef(storage).cdata


def _bytes_inside(func: Any, args: Any, outputs: Any) -> int:
    """Return the bytes that a CPU's convolution takes for the time it runs, besides its result.

    PyTorch's own unfolds a small float32 input; oneDNN's copies what is not in channels-last order into its own.
    """
    if func is _ATEN.convolution.default:
        (x, weight), gradient = args[:2], None
    elif func is _ATEN.convolution_backward.default:
        gradient, x, weight = args[:3]
    else:
        return 0
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return 0
    width = max(weight.shape[2:])
    if x.dtype == torch.float32 and x.shape[0] == 1 and prod(x.shape[1:-1]) <= _SLOW_BELOW and width <= 3:
        shape = outputs.shape if gradient is None else gradient.shape
        return prod(weight.shape[1:]) * prod(shape[2:]) * x.element_size() if width > 1 else 0
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if width == 1 or (channels_last is not None and x.is_contiguous(memory_format=channels_last)):
        return 0
    n_in, n_out = x.shape[1], weight.shape[0]
    of_input, of_output = _padded(n_in) * x[:, 0].nbytes, _padded(n_out) * x[:, 0].nbytes
    of_weight = _padded(n_in) * _padded(n_out) * weight[0, 0].nbytes
    if gradient is not None:
        wanted = args[-1][0]  # the input's gradient
        return of_output + (of_input + of_weight - (x.nbytes if n_in < _BLOCK else 0) if wanted else 0)
    return of_output + max(0, (of_input if n_in >= _BLOCK else 0) + of_weight - n_out * x[:, 0].nbytes)


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK

"""Peak of the memory that is alive at once while something runs: what it really needs, whatever the allocator caches."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_live_bytes"]


def peak_live_bytes(run: Callable[[], object], parameters: Iterable[torch.Tensor] = (), device: str = "cpu") -> int:
    """Measure the peak of the bytes allocated by ``run`` and not yet freed.

    Counts every allocation that PyTorch makes, in forward and backward passes alike. What was alive before does not
    count, and neither does what libraries allocate by themselves, past PyTorch's allocator (oneDNN). On a GPU it is by how
    much ``torch.cuda.max_memory_allocated`` grows, in the allocator's blocks of 512 bytes and more.

    Args:
        run: what to measure, e.g. a forward and backward pass; what it returns stays alive until the measurement ends.
        parameters: tensors whose ``.grad`` after the run is not counted, from its allocation on.
        device: the type of the device whose memory is measured, ``cpu`` or ``cuda``.

    Returns:
        The peak, in bytes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its start and end on stderr
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with profile(profile_memory=True) as profiler:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
    del result
    gradients = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    events = _allocations(profiler.kineto_results.experimental_event_tree(), device)
    return _peak_of_totals(events, gradients, before) if device == "cuda" else _peak_of_changes(events, gradients)


class _Allocation(NamedTuple):
    """An allocation, or with a negative size the end of one."""

    address: int
    size: int
    total: int  # bytes that the device's allocator has given out then


def _peak_of_changes(events: Iterable[_Allocation], gradients: set[int]) -> int:
    allocated: dict[int, int] = {}  # address to the place of its latest allocation in the list of changes
    changes: list[int] = []
    for address, size, _ in events:
        if size > 0:
            allocated[address] = len(changes)
        elif allocated.pop(address, None) is None:
            continue  # freed here, but allocated before
        changes.append(size)
    for address in gradients & allocated.keys():
        changes[allocated[address]] = 0
    return max([0, *accumulate(changes)])


def _peak_of_totals(events: Iterable[_Allocation], gradients: set[int], before: int) -> int:
    """Of a GPU the events lack what is freed between operations; its allocator says how much it has given out instead."""
    allocations = [event for event in events if event.size > 0]
    latest = {event.address: place for place, event in enumerate(allocations)}
    apart = [0] * len(allocations)
    for address in gradients & latest.keys():
        apart[latest[address]] = allocations[latest[address]].size
    totals = (event.total - before for event in allocations)
    return max([0, *(total - grown for total, grown in zip(totals, accumulate(apart), strict=True))])


def _allocations(tree: list, device: str) -> Iterator[_Allocation]:
    """Yield allocations and deallocations in the order of time."""
    events = []
    stack = list(tree)
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == device:
            fields = event.extra_fields
            events.append((event.start_time_ns, _Allocation(fields.ptr, fields.alloc_size, fields.total_allocated)))
    # Within one nanosecond a deallocation comes first: an address is reused, not shared.
    return (allocation for _, allocation in sorted(events, key=lambda e: (e[0], e[1].size > 0)))

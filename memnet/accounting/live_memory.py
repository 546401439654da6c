"""Peak of the memory that is alive at once while something runs: what it really needs, whatever the allocator caches."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_live_bytes"]


def peak_live_bytes(run: Callable[[], object], parameters: Iterable[torch.Tensor] = (), device: str = "cpu") -> int:
    """Measure the peak of the bytes allocated by ``run`` and not yet freed.

    Counts every allocation that PyTorch makes, in forward and backward passes alike. What was alive before does not
    count, and neither does what libraries allocate by themselves, past PyTorch's allocator (oneDNN).

    Args:
        run: what to measure, e.g. a forward and backward pass; what it returns stays alive until the measurement ends.
        parameters: tensors whose ``.grad`` after the run is not counted, from its allocation on.
        device: the type of the device whose memory is measured, ``cpu`` or ``cuda``.

    Returns:
        The peak, in bytes.
    """
    with profile(profile_memory=True, use_device="cuda" if device == "cuda" else None) as profiler:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
    del result
    gradients = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    allocated: dict[int, int] = {}  # address to the place of its latest allocation in the list of changes
    changes: list[int] = []
    for address, size in _allocations(profiler.kineto_results.experimental_event_tree(), device):
        if size > 0:
            allocated[address] = len(changes)
        elif allocated.pop(address, None) is None:
            continue  # freed here, but allocated before
        changes.append(size)
    for address in gradients & allocated.keys():
        changes[allocated[address]] = 0
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _allocations(tree: list, device: str) -> Iterator[tuple[int, int]]:
    """Yield address and size of each allocation, and with a negative size of each deallocation, in the order of time."""
    events = []
    stack = list(tree)
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == device:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # Within one nanosecond a deallocation comes first: an address is reused, not shared.
    return ((address, size) for _, address, size in sorted(events, key=lambda e: (e[0], e[2] > 0)))

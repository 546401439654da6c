"""Chooses which blocks keep their activations, so that a network stays within a number of bytes."""

from __future__ import annotations

import copy
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from memnet.accounting.dry_run import Ledger, simulation
from memnet.tracing import is_traced

__all__ = ["fit_to_budget", "parse_bytes"]

_UNITS = {
    "": 1,
    **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)},
}

_MARGIN = 1.05  # what a simulation may be off by

Choice = list[frozenset[int]]  # for each chain the blocks that are stored
_CHOICES: WeakKeyDictionary[nn.Module, dict[Any, Choice]] = WeakKeyDictionary()


def parse_bytes(amount: int | float | str) -> int:
    """Read a number of bytes such as ``12GiB``, ``800 MB`` or ``1e9``.

    Raises:
        ValueError: it is none, or below a kilobyte, as where the unit was left out.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", str(amount).lower())
    unit = found.group(2).upper() if found else ""
    if not found or (unit not in _UNITS and unit + "B" not in _UNITS) or float(found.group(1)) <= 0:
        raise ValueError(f"{amount!r} is no amount of memory; write 12GiB or 800MB")
    n_bytes = int(float(found.group(1)) * _UNITS.get(unit, _UNITS.get(unit + "B", 1)))
    if n_bytes < 1000:
        raise ValueError(f"{amount!r} would be {n_bytes} bytes, in which nothing fits; write 12GiB or 800MB")
    return n_bytes


def fit_to_budget(
    module: nn.Module, budget: int | float | str | None, inputs: Sequence[Any], named: Mapping[str, Any] | None = None
) -> None:
    """Choose the blocks that are stored in each chain of a module whose memory is ``auto``, and tell the chains.

    A block that is stored saves its recomputation, so many floating-point operations, for so many bytes. Those that save
    most for a byte come first, of equals the last, whose bytes are given back first; as many as fit. What a choice takes
    is found by simulating forward and backward pass on tensors without data (see :mod:`memnet.accounting.dry_run`), once
    for each kind of input. The budget is for the bytes alive at once in the module's two passes: its parameters, their
    gradients, its inputs and the loss come on top.

    Args:
        module: a chain, or what contains chains.
        budget: bytes, as :func:`parse_bytes` reads them; None where something around the module chooses.
        inputs: what the module is about to be called with.
        named: and what by keyword.

    Raises:
        ValueError: ``budget`` is no amount of memory.

    Warns:
        UserWarning: nothing can be stored, since even then the budget is exceeded, or the module cannot be simulated.
    """
    if budget is None or not torch.is_grad_enabled() or is_traced():
        return
    chains = list(_chains(module))
    known, named = _CHOICES.setdefault(module, {}), named or {}
    key = parse_bytes(budget), tuple(named), _circumstances(module, [*inputs, *named.values()])
    if key not in known:
        known[key] = _choose(module, len(chains), key[0], inputs, named)
    for chain, stored in zip(chains, known[key], strict=True):
        chain.stored = stored


def _chains(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if isinstance(m, nn.ModuleList) and getattr(m, "memory", None) == "auto")


def _circumstances(module: nn.Module, inputs: Sequence[Any]) -> Any:
    """What the bytes of a step depend on."""
    shapes = [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in inputs if isinstance(x, torch.Tensor)]
    types = sorted({shape[3].type for shape in shapes})
    autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
    trained = [p.requires_grad for p in module.parameters()]
    return *shapes, *autocast, *trained, *(m.training for m in module.modules())


def _choose(module: nn.Module, n_chains: int, budget: int, inputs: Sequence[Any], named: Mapping[str, Any]) -> Choice:
    none: Choice = [frozenset()] * n_chains
    try:
        with _disable_current_modes(), simulation():
            step = _Step(module, inputs, named)
            ranked = step.rank()
            ranking, before = list(ranked), [0, *accumulate(ranked.values())]  # bytes that the first n blocks keep

            def choice(n: int) -> Choice:
                return [frozenset(i for c, i in ranking[:n] if c == chain) for chain in range(n_chains)]

            fits, too_many, least, n = -1, len(ranking) + 1, 0, len(ranking)
            while too_many - fits > 1:
                # all of them first: where memory abounds, one look is enough
                peak = step.peak(choice(n))
                fits, too_many, least = (n, too_many, least) if peak <= budget else (fits, n, peak)
                likely = bisect_right(before, before[n] + (budget - peak) / _MARGIN) - 1
                n = min(max(likely, fits + 1), too_many - 1)
        if fits >= 0:
            return choice(fits)
        told = f"takes {least / 2**20:.1f} MiB even so, more than the {budget / 2**20:.1f} MiB of its budget"
        advice = "Take smaller or fewer patches, or bfloat16"
    except Exception as error:  # whatever a module does that tensors without data cannot
        told, advice = f"cannot be simulated ({error})", "Choose a strategy by name"
    warnings.warn(f'memory="auto" stores nothing: {type(module).__name__} {told}. {advice}.', stacklevel=4)
    return none


class _Step:
    """Forward and backward pass of a module's twin, on tensors without data."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        places = dict.fromkeys([*module.parameters(), *module.buffers()])
        self.twin = copy.deepcopy(module, {id(x): _without_data(x) for x in places})
        for part in self.twin.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
        self.twin.__dict__["memory_budget"] = None
        self.chains = list(_chains(self.twin))
        self.inputs = [_without_data(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        self.named = {key: _without_data(x) if isinstance(x, torch.Tensor) else x for key, x in named.items()}

    def peak(self, choice: Choice) -> int:
        """Bytes alive at once where the given blocks are stored, with a margin."""
        for chain, stored in zip(self.chains, choice, strict=True):
            chain.stored = stored
        with Ledger() as ledger:
            found = tree_leaves(self.twin(*self.inputs, **self.named))
            outputs = [y for y in found if isinstance(y, torch.Tensor) and y.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            peak = int(_MARGIN * ledger.peak(self.twin.parameters()))
        self.twin.zero_grad()
        for x in (*self.inputs, *self.named.values()):
            if isinstance(x, torch.Tensor):
                x.grad = None
        return peak

    def rank(self) -> dict[tuple[int, int], int]:
        """Bytes that storing keeps of each block, by chain and place, those first that save most operations for a byte."""
        places = {block: (c, i) for c, chain in enumerate(self.chains) for i, block in enumerate(chain)}
        seen = {p.untyped_storage()._cdata for p in self.twin.parameters()}
        found = {place: [0, 0] for place in places.values()}
        now: list[tuple[int, int]] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if now and storage._cdata not in seen:
                seen.add(storage._cdata)
                found[now[-1]][0] += storage.nbytes()
            return x

        with ExitStack() as stack, Ledger() as ledger:

            def begin(block: nn.Module, _: Any) -> None:
                now.append(places[block])
                found[places[block]][1] -= ledger.flops

            def end(block: nn.Module, *_: Any) -> None:
                found[now.pop()][1] += ledger.flops

            for block in places:
                stack.callback(block.register_forward_pre_hook(begin).remove)
                stack.callback(block.register_forward_hook(end).remove)
            for chain in self.chains:
                chain.stored = frozenset(range(len(chain)))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                self.twin(*self.inputs, **self.named)
        order = sorted(found, key=lambda place: (found[place][1] / max(1, found[place][0]), place), reverse=True)
        return {place: found[place][0] for place in order}


def _without_data(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same kind, made under simulation."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y.requires_grad_(x.requires_grad)


class FitBeforehand:
    """A hook before ``forward`` that fits a module without a budget of its own."""

    def __init__(self, budget: int | float | str) -> None:
        self.budget = budget

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        fit_to_budget(module, self.budget, inputs, named)

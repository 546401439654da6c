"""How a chain's backward pass brings back what it did not keep: a function for each strategy, from a state to the outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memnet.grid import OutOfRangeError
from memnet.invertible import DriftError, Recorded
from memnet.recompute import Gradients, Guarded, Replay, SideEffects, accumulate, pack, replay_with_grad

if TYPE_CHECKING:
    from memnet.chain import Chain

__all__ = ["auto", "checkpoint", "invert", "recursive", "unpack"]

_Basket = list[Sequence[torch.Tensor | None]]


def invert(chain: Chain, state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Keep the outputs; where a stream leaves its grid, warn and keep checkpoints instead. See :class:`memnet.Chain`."""
    parameters = list(chain.parameters())
    basket: _Basket = []
    before = SideEffects(chain, state)
    try:
        return _HandOver.apply(basket, *_Invert.apply(chain, basket, len(state), parameters, *state, *parameters))
    except OutOfRangeError as error:
        warnings.warn(
            f'{error}; such a step is trained with memory="checkpoint", which is as exact and needs more memory. A lower '
            "learning rate, normalised branches or a coarser grid (smaller fraction_bits) keep finite streams in range.",
            stacklevel=2,
        )
    before.undo()
    return checkpoint(chain, state)


def checkpoint(chain: Chain, state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Keep the input of every segment; a block that recomputes by itself is left to itself."""
    size = chain.segment or math.ceil(math.sqrt(len(chain)))
    blocks = list(chain)
    current = tuple(chain._on_grid(state))
    for start in range(0, len(blocks), size):
        if size == 1 and getattr(blocks[start], "recomputes", False):
            current = pack(blocks[start](*current))
        else:
            current = _rerun(blocks[start : start + size], size, current)
    return current


def recursive(chain: Chain, state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Keep the input, and in the backward pass that of one half after the other."""
    return _rerun(list(chain), 1, tuple(chain._on_grid(state)))


def auto(chain: Chain, state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Store the chosen blocks; run the others under ``invert``, or ``checkpoint`` where they have no exact inverse."""
    current = tuple(chain._on_grid(state))
    for stored, places in groupby(range(len(chain)), key=lambda i: i in chain.stored):
        part = type(chain)([chain[i] for i in places], "store", chain.segment, chain.on_drift)
        part._rounds = False  # the state is on the grid already
        part.memory = "store" if stored else "invert" if part.exact else "checkpoint"
        current = pack(part(*current))
    return current


class _Invert(torch.autograd.Function):
    """Keeps a chain's output; the backward pass inverts block after block, with one block's graph alive."""

    @staticmethod
    def forward(
        ctx, chain: Chain, basket: _Basket, n_state: int, parameters: list[nn.Parameter], *tensors: torch.Tensor
    ):
        inputs = tensors[:n_state] if chain.on_drift == "rerun" else ()
        ctx.rerun = Replay(_Recursively(chain)) if inputs else None
        with ctx.rerun.noting(*inputs) if ctx.rerun else nullcontext():
            recorded = chain.record_outermost(*tensors[:n_state])
        ctx.chain, ctx.basket, ctx.n_state, ctx.parameters = chain, basket, n_state, parameters
        ctx.set_materialize_grads(False)
        ctx.replays, ctx.n_outputs = recorded.replays, len(recorded.state)
        ctx.n_kept = len(recorded.kept)
        ctx.save_for_backward(*recorded.state, *recorded.kept, *inputs)
        return _owned(recorded.state, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *_):
        saved, gradients = ctx.saved_tensors, ctx.basket.pop()
        kept, inputs = saved[ctx.n_outputs :][: ctx.n_kept], saved[ctx.n_outputs + ctx.n_kept :]
        held: list[Any] = [gradients, Recorded(saved[: ctx.n_outputs], ctx.replays, kept, wanted=False)]
        # Unless the graph is retained, the chain holds the only reference to its outputs and frees them with its last block.
        ctx.maybe_clear_saved_tensors()
        del saved, kept
        if not inputs:
            del gradients
        try:
            _, state_gradients, found = ctx.chain.pull_back(held.pop(), held.pop())
        except DriftError:
            if ctx.rerun is None:
                raise
            _, pull_back = replay_with_grad([ctx.rerun], inputs)
            state_gradients, found = pull_back(gradients)
        return (None, *_needed(ctx, state_gradients, found))


class _Recursively(nn.Module):
    """A chain as :func:`recursive` runs it, which ``invert`` falls back to where an inverse has drifted."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain, self.training = chain, chain.training

    def forward(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return recursive(self.chain, list(state))


class _HandOver(torch.autograd.Function):
    """Gives the gradients of a chain's outputs to the chain in a basket, and to autograd zeros that take no memory.

    Autograd's engine holds what it gives a Function until that returns: as much as the state, for the whole of the chain's
    backward pass. Nothing else can use what this Function takes, so that the chain's turn comes right after it.
    """

    @staticmethod
    def forward(ctx, basket: _Basket, *outputs: torch.Tensor):
        ctx.basket = basket
        ctx.set_materialize_grads(False)
        return tuple(y.detach() for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        ctx.basket[:] = [gradients]
        return (None, *(None if d is None else d.new_zeros(()).expand_as(d) for d in gradients))


class _Rerun(torch.autograd.Function):
    """Keeps the input of consecutive blocks; the backward pass runs them again, halving until ``leaf`` blocks are left."""

    @staticmethod
    def forward(ctx, blocks: list[nn.Module], leaf: int, n_state: int, parameters: list[nn.Parameter], *tensors):
        state = tensors[:n_state]
        ctx.replays = [Replay(Guarded(b) if i % leaf == 0 else b) for i, b in enumerate(blocks)]
        ctx.leaf, ctx.n_state, ctx.parameters = leaf, n_state, parameters
        ctx.save_for_backward(*state)
        for replay in ctx.replays:
            state = replay.first(*state)
        return _owned(state, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        found: Gradients = {}
        state_gradients = _rerun_backward(ctx.replays, ctx.saved_tensors, gradients, ctx.leaf, found)
        return (None, *_needed(ctx, state_gradients, found))


def _rerun_backward(
    replays: list[Replay],
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    leaf: int,
    found: Gradients,
) -> Sequence[torch.Tensor | None]:
    if len(replays) <= leaf:
        _, pull_back = replay_with_grad(replays, inputs)
        state_gradients, more = pull_back(gradients)
        accumulate(found, more)
        return state_gradients
    half = len(replays) // 2
    state = tuple(inputs)
    with torch.no_grad():
        for replay in replays[:half]:
            state = replay.again(*state)
    gradients = _rerun_backward(replays[half:], state, gradients, leaf, found)
    del state
    return _rerun_backward(replays[:half], inputs, gradients, leaf, found)


def _owned(outputs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # A block may hand an input on as it is; autograd wants outputs of a Function to be its own.
    return tuple(y.view_as(y) if any(y is x for x in inputs) else y for y in outputs)


def _needed(ctx, state_gradients: Sequence[torch.Tensor | None], found: Gradients) -> tuple[torch.Tensor | None, ...]:
    parameter_gradients = [found.get(p) for p in ctx.parameters]
    return (None, None, None, *state_gradients, *parameter_gradients)


def _rerun(blocks: list[nn.Module], leaf: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    parameters = list(dict.fromkeys(p for block in blocks for p in block.parameters()))
    return _Rerun.apply(blocks, leaf, len(state), parameters, *state, *parameters)


def unpack(state: tuple[torch.Tensor, ...]) -> Any:
    """Return a state as a block does: the tensor itself where it is one alone."""
    return state[0] if len(state) == 1 else state

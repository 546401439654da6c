"""What a block must offer so that a chain can drop its input and bring it back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from memnet.recompute import Gradients, Replay, replay_with_grad

__all__ = ["DriftError", "Invertible", "Recorded"]


class DriftError(RuntimeError):
    """An inverse that is only approximate has left its tolerance; the message says by how much."""


class Recorded(NamedTuple):
    """The forward pass of a block as ``invert`` keeps it.

    Attributes:
        state: the block's outputs.
        replays: what its recomputation needs besides tensors.
        kept: the tensors its inversion needs besides the outputs; as small as can be, most blocks keep none.
        owned: whether nobody else has the memory of the outputs and their gradients, so that the backward pass may write over
            it.
        wanted: whether the inputs themselves are asked of the backward pass; where not, it may give none.
        shares: one-element tensors that say how much of a bound the block's numbers took; above 1 the record cannot be
            inverted. A chain looks at all of them once, at its end, since a GPU stands still for every look.
    """

    state: tuple[torch.Tensor, ...]
    replays: Any
    kept: tuple[torch.Tensor, ...] = ()
    owned: bool = False
    wanted: bool = True
    shares: tuple[torch.Tensor, ...] = ()


class Invertible(nn.Module):
    """A block of a :class:`memnet.Chain` whose inputs can be computed from its outputs.

    A subclass defines :meth:`plain` and :meth:`inverse`; where inversion and gradient share work, or the inverse needs
    something kept, it also overrides :meth:`record`, :meth:`restore` or :meth:`pull_back`.

    Attributes:
        fraction_bits: the grid on which the block's additions are exact (see :mod:`memnet.grid`), or None if the block
            adds nothing.
        exact: whether the inverse gives the input back bit for bit.
        renews: whether the first two tensors that :meth:`record` and :meth:`pull_back` return have memory of their own.
    """

    fraction_bits: int | None = None
    exact: bool = True
    renews: bool = False

    @torch.jit.unused
    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs; TorchScript, which knows no ``*state``, calls :meth:`plain` instead."""
        outputs = self.plain(list(state))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """Compute the outputs under ``no_grad`` and what bringing back the inputs and gradients will need."""
        replay = Replay(self)
        return Recorded(replay.first(*state), replay)

    @torch.jit.unused
    def record_over(self, *state: torch.Tensor) -> Recorded:
        """Do as :meth:`record`, where the first two tensors' memory may be written over."""
        return self.record(*state)

    @torch.jit.unused
    def restore(self, recorded: Recorded) -> tuple[torch.Tensor, ...]:
        """Compute the inputs from what :meth:`record` returned."""
        inputs = self.inverse(*recorded.state)
        return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """Bring back the inputs and differentiate.

        Args:
            recorded: what :meth:`record` returned.
            gradients: the gradients of the outputs.

        Returns:
            The inputs, their gradients, and the parameters' gradients.
        """
        inputs = self.restore(recorded)
        _, pull = replay_with_grad([recorded.replays], inputs)
        return inputs, *pull(gradients)

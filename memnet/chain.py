"""A chain of blocks whose memory strategy says what backpropagation keeps."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn.parameter import UninitializedParameter

from memnet import strategies
from memnet.budget import FitBeforehand, fit_to_budget, parse_bytes
from memnet.grid import as_stream, check_range, magnitude, round_to_grid
from memnet.invertible import Invertible, Recorded
from memnet.metadata import plain_tensor
from memnet.recompute import Gradients, accumulate, is_watched, pack
from memnet.strategies import unpack
from memnet.tracing import is_traced
from memnet.witness import some_values

__all__ = ["Chain", "Memory", "set_memory"]

Memory = Literal["store", "checkpoint", "recursive", "invert"]


class Chain(nn.ModuleList):
    r"""Blocks applied one after another, with a choice of what backpropagation keeps.

    Parameters, ``state_dict``, outputs and gradients are the same under every strategy; for a chain of L blocks, each with
    activations of size 1:

    ============  =====================================  ========================  ====================
    ``memory``    keeps                                  memory                    forward passes
    ============  =====================================  ========================  ====================
    store         every activation                       O(L)                      1
    checkpoint    the inputs of sqrt(L) segments         O(sqrt L)                 2
    recursive     the input                              O(log L)                  O(log L)
    invert        the output                             O(1)                      2
    auto          what fits ``memory_budget``            at most the budget        1 to 2
    ============  =====================================  ========================  ====================

    ``auto`` stores the activations of some blocks and inverts the others (where blocks have no exact inverse: keeps
    checkpoints), see :func:`memnet.budget.fit_to_budget`.

    Args:
        blocks: modules from ``forward(*state)`` to the next state, a tensor or a tuple of tensors. ``invert`` needs
            :class:`memnet.Invertible` blocks.
        memory: the strategy, or ``"auto"``; the attribute ``memory`` may be set at any time.
        segment: blocks between checkpoints under ``checkpoint``; the square root of their number where None.
        on_drift: what ``invert`` does where an inverse that is only approximate leaves its tolerance: ``"raise"``, or
            ``"rerun"`` the chain from its input, which is then kept, too, as ``recursive`` does.
        memory_budget: bytes that may be alive at once in the chain's forward and backward pass under ``auto``, such as
            ``"12GiB"``; None where the network around the chain has the budget. A GPU's libraries take their workspaces
            beside it.

    Attributes:
        stored: under ``auto``, the places of the blocks whose activations are stored.

    Raises:
        ValueError: there are no blocks, ``memory`` is unknown or does not fit the blocks, ``segment`` is less than 1,
            ``on_drift`` is unknown, ``memory_budget`` is no amount of memory, or blocks disagree on ``fraction_bits``.
        memnet.DriftError: at run time under ``invert``, see ``on_drift``.

    Warns:
        UserWarning: under ``invert``, a stream is not finite or leaves the range of its grid (see :mod:`memnet.grid`), in
            which inversion is exact. That step runs, once more, with ``checkpoint``: exact too, in more memory. So does a
            step where a block has hooks, or a ``forward`` of its own, which ``invert`` does not call. Under
            ``auto``, the budget is too small even where nothing is stored.

    References:
        Training deep nets with sublinear memory cost (Chen et al., 2016), https://arxiv.org/abs/1604.06174
        The reversible residual network (Gomez et al., 2017), https://arxiv.org/abs/1707.04585
    """

    __jit_unused_properties__ = ["memory", "stored", "exact", "renews"]

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        memory: Memory | Literal["auto"] = "store",
        segment: int | None = None,
        on_drift: Literal["raise", "rerun"] = "raise",
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(blocks)
        if len(self) == 0:
            raise ValueError("a chain needs at least one block")
        if segment is not None and segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if on_drift not in ("raise", "rerun"):
            raise ValueError(f"on_drift must be 'raise' or 'rerun', got {on_drift!r}")
        self.fraction_bits = _shared_grid(self)
        self.segment = segment
        self.on_drift = on_drift
        if memory_budget is not None:
            parse_bytes(memory_budget)
        self.memory_budget = memory_budget
        self._rounds = True
        self.memory = memory

    @property
    def memory(self) -> Memory | Literal["auto"]:
        """The memory strategy."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory | Literal["auto"]) -> None:
        if memory != "auto" and memory not in get_args(Memory):
            raise ValueError(f"memory must be one of auto, {', '.join(get_args(Memory))}, got {memory!r}")
        if memory == "invert":
            for i, block in enumerate(self):
                if not isinstance(block, Invertible | Chain):
                    raise ValueError(f'memory="invert" needs invertible blocks, block {i} is a {type(block).__name__}')
                if isinstance(block, Chain):
                    block.on_drift = "rerun" if self.on_drift == "rerun" else block.on_drift
                    block.memory = "invert"
        self._memory = memory
        if memory == "auto":
            self.stored = frozenset()

    @property
    def stored(self) -> frozenset[int]:
        """Under ``auto``, the places of the blocks whose activations are stored."""
        return self._stored

    @stored.setter
    def stored(self, stored: frozenset[int]) -> None:
        self._stored = stored
        for i, block in enumerate(self):
            if isinstance(block, Chain):
                block.memory = "store" if i in stored else "invert" if block.exact else "checkpoint"

    @property
    def exact(self) -> bool:
        """Whether the inverse of every block gives the input back bit for bit."""
        return all(isinstance(block, Invertible | Chain) and block.exact for block in self)

    @torch.jit.unused
    def __getitem__(self, index: int | slice):
        """Return a block, or a chain of the sliced blocks."""
        if isinstance(index, slice):
            return Chain(list(self)[index], self.memory, self.segment, self.on_drift, self.memory_budget)
        return super().__getitem__(index)

    @torch.jit.unused
    def forward(self, *state: torch.Tensor) -> Any:
        """Apply the blocks.

        Args:
            state: one or several tensors; they are left as they are.

        Returns:
            The last block's tensor, or tuple of tensors.

        Raises:
            ValueError: a strategy other than ``store`` meets blocks that are sharded one by one, or DataParallel; parameters are
                in half precision without autocast, or were never initialized.
            TypeError: something of the state is no tensor.
        """
        if not all(isinstance(x, torch.Tensor) for x in state):
            raise TypeError(f"a chain's state is tensors, got {', '.join(type(x).__name__ for x in state)}")
        self.fraction_bits = _shared_grid(self)  # of blocks that were added since, too
        _require_full_precision(self)
        if self.memory == "store" or not _differentiates(self, state):
            return unpack(self._run(*state))
        _require_whole_parameters(self)
        if self.memory == "auto":
            fit_to_budget(self, self.memory_budget, state)
        template = next((x for x in state if isinstance(x, MetaTensor)), None)
        plain = [plain_tensor(x) for x in state]
        outputs = getattr(strategies, self._strategy())(self, plain)
        if template is not None:
            outputs = tuple(MetaTensor(y).copy_meta_from(template) for y in outputs)
        return unpack(outputs)

    def _strategy(self) -> str:
        """Return the strategy of this step: blocks that ``invert`` would not call as they are, are called."""
        if self.memory not in ("invert", "auto"):
            return self.memory
        called = self.stored if self.memory == "auto" else frozenset()
        for block in _blocks_within(block for i, block in enumerate(self) if i not in called):
            if not isinstance(block, Invertible):
                if self.memory == "invert":
                    raise ValueError(f'memory="invert" needs invertible blocks, one is a {type(block).__name__}')
                continue
            if is_watched(block) or type(block).forward is not Invertible.forward or "forward" in vars(block):
                warnings.warn(
                    f'memory="{self.memory}" does not call its blocks, and one, a {type(block).__name__}, has hooks or a '
                    'forward method of its own; such a step is trained with memory="checkpoint".',
                    stacklevel=3,
                )
                return "checkpoint"
        return self.memory

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> Any:
        """Undo the blocks, last to first.

        Raises:
            TypeError: a block is not invertible.
        """
        for block in reversed(self):
            if not isinstance(block, Invertible | Chain):
                raise TypeError(f"{type(block).__name__} is not invertible")
            state = pack(block.inverse(*state))
        return unpack(state)

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Apply the blocks to a list of tensors, as TorchScript sees the chain."""
        state = self._on_grid(state)
        for block in self:
            state = block.plain(state)
        return state

    def _on_grid(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        # What enters must lie on the grid; from then on every block keeps it there.
        bits = self.fraction_bits
        if bits is None or not self._rounds:
            return state
        return [round_to_grid(as_stream(x), bits) if x.is_floating_point() else x for x in state]

    @torch.jit.unused
    def _run(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        current = tuple(self._on_grid(list(state)))
        for block in self:
            current = pack(block(*current))
        return current

    @property
    def renews(self) -> bool:
        """See :class:`memnet.Invertible`."""
        return all(isinstance(block, Invertible | Chain) and block.renews for block in (self[0], self[-1]))

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`."""
        return self._record([tuple(self._on_grid(list(state)))], self._rounds and self.fraction_bits is not None)

    @torch.jit.unused
    def record_outermost(self, *state: torch.Tensor) -> Recorded:
        """Do as :meth:`record` for a chain that is no block of another, and keep some values to see whether they come back."""
        on_grid = [tuple(self._on_grid(list(state)))]
        return self._record(on_grid, self._rounds and self.fraction_bits is not None, witnessed=self.exact)

    @torch.jit.unused
    def record_over(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record_over`."""
        return self._record([tuple(self._on_grid(list(state)))], True)

    @torch.jit.unused
    def _record(self, held: list[tuple[torch.Tensor, ...]], owned: bool, witnessed: bool = False) -> Recorded:
        # The state comes in a list and is taken out of it: an argument would live for as long as the call.
        records: list[Recorded] = []
        magnitudes: list[torch.Tensor] = []
        shares: list[torch.Tensor] = []
        witness: tuple[torch.Tensor, ...] = ()
        for block in self:
            recorded = (block.record_over if owned else block.record)(*held.pop())
            owned = bool(block.renews)
            state = recorded.state
            held.append(state)
            if block.fraction_bits is not None:
                magnitudes += [magnitude(x) for x in state[:2] if x.is_floating_point() and x.numel()]
            shares += recorded.shares
            if witnessed and not records and len(self) > 1:
                witness = (some_values(state),)
            records.append(recorded._replace(state=()))
            del recorded, state
        if self.fraction_bits is not None:
            check_range(magnitudes, shares, self.fraction_bits)
        kept = tuple(x for recorded in records for x in recorded.kept) + witness
        return Recorded(held.pop(), [(r.replays, len(r.kept)) for r in records], kept)

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`."""
        state, notes, kept, owned, wanted, _ = recorded
        # Each block gets the only reference to the state and its gradients, and can free them before it is done.
        held: list[Any] = [gradients, state]
        del recorded, gradients, state
        n_kept = sum(n for _, n in notes)
        kept, witness = kept[:n_kept], kept[n_kept:]
        parameter_gradients: Gradients = {}
        for i in reversed(range(len(self))):
            if i == 0 and witness:
                _testify(witness[0], held[-1])
            block, (replays, n_kept), asked = self[i], notes[i], wanted or i > 0
            mine, kept = kept[len(kept) - n_kept :], kept[: len(kept) - n_kept]
            inputs, input_gradients, more = block.pull_back(
                Recorded(held.pop(), replays, mine, owned, asked), held.pop()
            )
            owned = block.renews
            held += [input_gradients, inputs]
            del inputs, input_gradients
            accumulate(parameter_gradients, more)
        return held.pop(), held.pop(), parameter_gradients


def _testify(witness: torch.Tensor, state: Sequence[torch.Tensor]) -> None:
    """Warn where the state that a first block gave out has come back otherwise."""
    found = some_values(state)
    if torch.equal(found, witness):
        return
    warnings.warn(
        f"a chain's inversion brought back other numbers than its forward pass computed, by up to "
        f"{(found - witness).abs().max():.1e}: a recomputation ran other kernels, as where a GPU is too full for the workspace "
        "of its library's first choice, a block's branch is no function of its input, or a block's inverse is approximate, which "
        'its exact=False would say. The gradients of this step are inexact; memory="checkpoint" does not rely on it.',
        RuntimeWarning,
        stacklevel=2,
    )


def _blocks_within(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for block in blocks:
        if isinstance(block, Chain):
            yield from _blocks_within(block)
        else:
            yield block


def _shared_grid(chain: Chain) -> int | None:
    grids = [block.fraction_bits for block in chain if isinstance(block, Invertible | Chain)]
    bits = {bits for bits in grids if bits is not None}
    if len(bits) > 1:
        raise ValueError(f"the blocks of a chain must share one grid, got fraction_bits {sorted(bits)}")
    return bits.pop() if bits else None


def _require_full_precision(chain: Chain) -> None:
    first = next(chain.parameters(), None)
    half = (torch.float16, torch.bfloat16)
    if (
        first is None
        or isinstance(first, UninitializedParameter)
        or first.dtype not in half
        or chain.fraction_bits is None
    ):
        return
    if not torch.is_autocast_enabled(first.device.type):
        kind = str(first.dtype).removeprefix("torch.")
        raise ValueError(
            f"parameters are in {kind}, while the streams of a chain stay in float32: keep parameters in float32 and run the "
            f"network under torch.autocast({first.device.type!r}, torch.{kind})"
        )


def _require_whole_parameters(chain: Chain) -> None:
    if getattr(chain, "_is_replica", False):  # whose parameters are attributes like any others
        raise ValueError(
            f'memory="{chain.memory}" needs DistributedDataParallel in place of DataParallel, or memory="store"'
        )
    for name, parameter in chain.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} of a lazy module is not there yet; call the network once under torch.no_grad() first"
            )
        if hasattr(parameter, "full_tensor"):  # FSDP2's DTensor, which a block's own hooks would gather too late
            raise ValueError(
                f'{name} is sharded. memory="{chain.memory}" needs a chain\'s parameters at once: apply fully_shard to the '
                'chain, not to its blocks, or set memory="store"'
            )


def set_memory(
    module: nn.Module, memory: Memory | Literal["auto"], budget: int | float | str | None = None
) -> nn.Module:
    """Switch every chain inside a module to a memory strategy, and return the module.

    A network with a ``memory`` of its own is switched by that, since it may hold chains that keep theirs.

    Args:
        module: a network, or what contains some.
        memory: the strategy, or ``"auto"``.
        budget: under ``auto``, the bytes that may be alive at once in the module's forward and backward pass, such as
            ``"12GiB"``; see :func:`memnet.budget.fit_to_budget`.

    Raises:
        ValueError: a chain does not support it, the module has no chain, or ``auto`` comes without a budget or another
            strategy with one.
    """
    if (memory == "auto") != (budget is not None):
        raise ValueError(f'memory="auto" needs a budget, and nothing else does, got {memory!r} and {budget!r}')
    if budget is not None:
        parse_bytes(budget)
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, FitBeforehand)]:
        del module._forward_pre_hooks[key]
    if not _switch(module, memory):
        raise ValueError(f"{type(module).__name__} has no memnet.Chain")
    if hasattr(module, "memory_budget"):
        module.memory_budget = budget  # type: ignore[assignment]
    elif budget is not None:
        module.register_forward_pre_hook(FitBeforehand(budget), with_kwargs=True)
    return module


def _switch(module: nn.Module, memory: Memory | Literal["auto"]) -> bool:
    own = isinstance(getattr(type(module), "memory", None), property)
    if own:
        setattr(module, "memory", memory)  # noqa: B010 (nn.Module has no such attribute to a type checker)
        if hasattr(module, "memory_budget"):
            module.memory_budget = None  # type: ignore[assignment]
        if not isinstance(module, Chain) or memory == "auto":
            return True
    return any([_switch(child, memory) for child in module.children()]) or own


def _differentiates(chain: Chain, state: tuple[torch.Tensor, ...]) -> bool:
    """Tell whether a backward pass may follow; exports, inference and ``torch.func`` see plain modules."""
    if not torch.is_grad_enabled() or is_traced():
        return False
    return any(x.requires_grad for x in state) or any(p.requires_grad for p in chain.parameters())

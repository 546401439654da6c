"""Running a module a second time exactly as it ran the first time, and differentiating that second run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

__all__ = ["Guarded", "Replay", "SideEffects", "accumulate", "guarded", "is_watched", "pack", "replay_with_grad"]

_SMALL = 2**14  # bytes of a buffer of which a copy is kept in any case

Gradients = dict[nn.Parameter, torch.Tensor]
PullBack = Callable[[Sequence[torch.Tensor | None]], tuple[list[torch.Tensor | None], Gradients]]


class Replay:
    """One call of a module, remembered well enough to be repeated bit for bit.

    The first call notes the parameters, the autocast state, the modes that change PyTorch's functions (as the default device
    does), the inputs' strides, which modules are in training mode, the buffers that the call may have changed (batch
    statistics, power iterations, counters), and the state of the random generators if the call drew from them. A repetition
    runs under all of these, leaves the module's buffers and the global random state untouched, and uses aliases of the
    parameters, so that hooks registered on parameters see one gradient a step and not two. In neither does cuDNN measure which
    of its algorithms is the fastest (``torch.backends.cudnn.benchmark``). While it runs, the module holds the aliases: one
    thread at a time may train it.

    Args:
        module: the module to call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameters: dict[str, tuple[nn.Parameter, int]] = {}
        self._modes: list[tuple[nn.Module, bool]] = []
        self._autocast: list[tuple[str, bool, torch.dtype]] = []
        self._function_modes: list[TorchFunctionMode] = []
        self._strides: list[tuple[int, ...] | None] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._unchanged: dict[str, tuple[torch.Tensor, int]] = {}
        self._statistics: list[str] = []
        self._random: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def first(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the module, remembering what a repetition needs."""
        with self.noting(*inputs):
            return pack(self.module(*inputs))

    @contextmanager
    def noting(self, *inputs: torch.Tensor) -> Iterator[None]:
        """Remember what a repetition needs of the call that is made meanwhile, by whatever way the same is computed."""
        types = sorted({"cpu"} | {x.device.type for x in inputs})
        self._autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
        self._function_modes = _get_current_function_mode_stack()
        self._strides = [x.stride() if _is_dense(x) else None for x in inputs]
        # Noted now, not looked up later: inside the repetition of a surrounding chain these are that chain's aliases.
        self._parameters = {name: (p, p._version) for name, p in _named_parameters(self.module)}
        self._modes = [(child, child.training) for child in self.module.modules()]
        buffers = {name: (b, _version(b)) for name, b, is_statistic in _named_buffers(self.module) if not is_statistic}
        self._buffers = {name: buffer.clone() for name, (buffer, _) in buffers.items()}
        self._statistics = [name for name, _, is_statistic in _named_buffers(self.module) if is_statistic]
        before = _random_state(inputs)
        with _without_autocast_cache(), _unmeasured_convolutions():
            yield
        after = _random_state(inputs)
        drew = not torch.equal(before[0], after[0]) or any(
            not torch.equal(before[1][d], after[1][d]) for d in before[1]
        )
        self._random = before if drew else None
        # Of a large buffer that the call left alone, such as a table of positions, no copy is kept. Small ones are, since a
        # kernel may write without telling, as batch norm's does.
        self._unchanged = {
            name: (buffer, version)
            for name, (buffer, version) in buffers.items()
            if buffer.nbytes > _SMALL and not buffer.is_inference() and buffer._version == version
        }
        for name in self._unchanged:
            del self._buffers[name]

    def again(
        self, *inputs: torch.Tensor, aliases: dict[nn.Parameter, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Repeat the call.

        Args:
            inputs: the inputs of the first call, bit for bit, with whatever strides.
            aliases: tensors to use in place of the parameters; the missing ones are made and added.

        Raises:
            RuntimeError: a parameter, or a large buffer, was changed since the first call.
        """
        aliases = {} if aliases is None else aliases
        substitutes: dict[str, torch.Tensor] = {}
        for name, (parameter, version) in self._parameters.items():
            if parameter._version != version:
                raise RuntimeError(
                    f"parameter {name} was changed in place between the forward and the backward pass, e.g. by an "
                    "optimiser step; the backward pass needs it as it was."
                )
            if parameter not in aliases:
                aliases[parameter] = parameter.detach().requires_grad_(parameter.requires_grad)
            substitutes[name] = aliases[parameter]
        for name, (buffer, version) in self._unchanged.items():
            if buffer._version != version:
                raise RuntimeError(
                    f"buffer {name} was changed in place between the forward and the backward pass, which needs it as it was."
                )
            substitutes[name] = buffer
        substitutes |= {name: buffer.clone() for name, buffer in self._buffers.items()}
        substitutes |= {name: self.module.get_buffer(name).clone() for name in self._statistics}
        # Other strides are another order of summation, which an inverse that came by another way may have brought along.
        inputs = tuple(_with_strides(x, noted) for x, noted in zip(inputs, self._strides, strict=True))
        with ExitStack() as stack:
            stack.enter_context(_training_modes(self._modes))
            stack.enter_context(_unmeasured_convolutions())
            stack.enter_context(_only_function_modes(self._function_modes))
            if self._random is not None:
                cpu, cuda = self._random
                stack.enter_context(torch.random.fork_rng(devices=list(cuda)))
                torch.set_rng_state(cpu)
                for device, state in cuda.items():
                    torch.cuda.set_rng_state(state, device)
            for device_type, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
            return pack(torch.func.functional_call(self.module, substitutes, inputs, tie_weights=False))


class SideEffects:
    """What a call may change besides its outputs, noted before the call: batch statistics and random generators.

    Args:
        module: the module that will be called.
        inputs: its inputs.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self._module = module
        self._buffers = {name: buffer.clone() for name, buffer, _ in _named_buffers(module)}
        self._random = _random_state(inputs)

    def undo(self) -> None:
        """Set them back to what they were."""
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)
        for name, buffer in self._buffers.items():
            self._module.get_buffer(name).copy_(buffer)


def replay_with_grad(
    replays: Sequence[Replay], inputs: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], PullBack]:
    """Repeat consecutive calls under grad mode.

    Args:
        replays: the calls, each taking what the one before returned.
        inputs: the inputs of the first of them.

    Returns:
        The outputs, detached, and a function from the outputs' gradients to the inputs' and parameters' gradients,
        which may be called once. It holds the graph but not the outputs.
    """
    leaves = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs]
    aliases: dict[nn.Parameter, torch.Tensor] = {}
    with torch.enable_grad():
        state: tuple[torch.Tensor, ...] = tuple(leaves)
        for replay in replays:
            state = replay.again(*state, aliases=aliases)
    roots = [
        None if not y.requires_grad else y if y.is_leaf else torch.autograd.graph.get_gradient_edge(y) for y in state
    ]
    dtypes = [y.dtype for y in state]
    targets = [x for x in leaves if x.requires_grad] + [a for a in aliases.values() if a.requires_grad]

    def pull_back(gradients: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], Gradients]:
        used = [
            (root, gradient.to(dtype))
            for root, gradient, dtype in zip(roots, gradients, dtypes, strict=True)
            if root is not None and gradient is not None
        ]
        found: Iterator[torch.Tensor | None] = iter([None] * len(targets))
        if used and targets:
            outputs: Any = [root for root, _ in used]  # tensors and edges, which autograd takes together
            found = iter(torch.autograd.grad(outputs, targets, [g for _, g in used], allow_unused=True))
        input_gradients = [next(found) if x.requires_grad else None for x in leaves]
        parameter_gradients: Gradients = {}
        for parameter, alias in aliases.items():
            gradient = next(found) if alias.requires_grad else None
            if gradient is not None:
                parameter_gradients[parameter] = gradient
        return input_gradients, parameter_gradients

    return tuple(y.detach() for y in state), pull_back


def pack(state: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a block's output as a tuple."""
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def accumulate(total: Gradients, more: Gradients) -> None:
    """Add the gradients of one call to the running sums."""
    for parameter, gradient in more.items():
        total[parameter] = total[parameter] + gradient if parameter in total else gradient


def is_watched(module: nn.Module) -> bool:
    """Tell whether a module has hooks of its own."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def guarded(module: nn.Module, *inputs: torch.Tensor, run: Callable[..., Any] = nn.Module.__call__) -> Any:
    """Call a module, or another function of it and the inputs, so that the inputs survive.

    Raises:
        RuntimeError: it changes one in place, and not by a first operation that says so (``inplace=True``).
    """
    first = module
    while isinstance(first, nn.Sequential) and len(first) > 0:
        first = first[0]
    if getattr(first, "inplace", False):
        return run(module, *(x.clone() for x in inputs))
    versions = [_version(x) for x in inputs]
    outputs = run(module, *inputs)
    if versions != [_version(x) for x in inputs]:
        raise RuntimeError(
            f"{type(module).__name__} changes its input in place, which is still needed. Make its first operation out of place."
        )
    return outputs


class Guarded(nn.Module):
    """A module whose inputs survive, see :func:`guarded`."""

    def __init__(self, module: nn.Module, run: Callable[..., Any] = nn.Module.__call__) -> None:
        super().__init__()
        self.module, self.run = module, run
        self.training = module.training

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Call the module."""
        return guarded(self.module, *inputs, run=self.run)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _is_dense(x: torch.Tensor) -> bool:
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != extent:
            return False
        extent *= size
    return True


def _with_strides(x: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    if strides is None or x.stride() == strides:
        return x
    if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x.as_strided(x.shape, strides)
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # Every place of a shared parameter, but one name of a shared module: functional_call's own handling of ties swaps the
    # parameters of a module with two names twice, and leaves the substitutes in it.
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, parameter


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield the buffers that a call may change, and whether they are batch norm's statistics in training.

    Those do not change what the call computes; in evaluation they do not change at all.
    """
    for prefix, child in module.named_modules():
        is_norm = isinstance(child, _BatchNorm)
        if is_norm and not child.training:
            continue
        for name, buffer in child.named_buffers(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, buffer, is_norm


@contextmanager
def _training_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set modules to the modes they had, e.g. if ``eval()`` was called between the forward and the backward pass."""
    changed = [(module, mode) for module, mode in modes if module.training != mode]
    for module, mode in changed:
        module.training = mode
    try:
        yield
    finally:
        for module, mode in changed:
            module.training = not mode


def _random_state(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    devices = {x.device.index for x in inputs if x.device.type == "cuda"}
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    # Autocast would cache weights cast under no_grad and hand them, without a graph, to a later use that needs one.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _only_function_modes(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Have exactly these modes in force; PyTorch turns them off in a backward pass."""
    before = _get_current_function_mode_stack()
    # Entering one again would overwrite what a mode remembers for its end.
    _replace_function_modes(modes)
    try:
        yield
    finally:
        _replace_function_modes(before)


def _replace_function_modes(modes: Sequence[TorchFunctionMode]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


@contextmanager
def _unmeasured_convolutions() -> Iterator[None]:
    """Let cuDNN choose deterministic kernels by its rules: where it measures, each thread, autograd's too, does so by itself."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    if before == (False, True):
        yield
        return
    # What a thread has measured serves whatever has the same flags; nothing measured has these, unless both are set outside.
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before

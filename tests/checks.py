"""What the tests of the core share: blocks to build, a training step to compare, the four checks of an invertible part."""

import copy
from collections.abc import Callable, Sequence

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit, Memory
from memnet.accounting.live_memory import peak_live_bytes
from memnet.grid import FRACTION_BITS

torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False  # with which an inverse by iteration is right to 1e-2 only

MEMORIES: tuple[Memory, ...] = ("checkpoint", "recursive", "invert")
"""The strategies that are compared with ``store``."""

Step = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]


def branch(channels: int = 3, spatial_dims: int = 1, *more: nn.Module) -> nn.Sequential:
    """Normalisation, activation, convolution, and whatever comes after them."""
    conv = Conv[Conv.CONV, spatial_dims](channels, channels, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(1, channels), nn.LeakyReLU(), conv, *more)


def couplings(
    n_blocks: int, make: Callable[[], nn.Module] = branch, fraction_bits: int | None = FRACTION_BITS
) -> Chain:
    """A chain of additive couplings with branches of one's own."""
    return Chain([AdditiveCoupling(make(), make(), fraction_bits) for _ in range(n_blocks)])


def with_branch(*more: nn.Module, n_blocks: int = 3) -> Chain:
    """A chain whose branches end with the given modules."""
    return couplings(n_blocks, lambda: branch(3, 1, *copy.deepcopy(more)))


def streams(*shape: int, n: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """Random tensors of one shape."""
    return [torch.randn(*(shape or (2, 3, 5))).to(device, dtype) for _ in range(n)]


class Net(nn.Module):
    """A stem, something in between, a chain, a head."""

    def __init__(self, chain: Chain, between: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 6, 3, padding=1)
        self.between = nn.Identity() if between is None else between
        self.chain = Chain([ChannelSplit(), *chain, ChannelMerge()])
        self.head = nn.Conv1d(6, 2, 1)

    @property
    def memory(self):
        return self.chain.memory

    @memory.setter
    def memory(self, memory):
        self.chain.memory = memory

    def forward(self, x):
        return self.head(self.chain(self.between(self.stem(x))))


def step(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    memory: Memory | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 7,
) -> Step:
    """Run forward and backward from a fixed seed: outputs and gradients of all inputs and parameters, by name."""
    if memory is not None:
        module.memory = memory
    module.zero_grad()
    torch.manual_seed(seed)
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None):
        outputs = module(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    weigh(outputs).backward()
    values = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
    gradients: dict[str, torch.Tensor | None] = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    gradients |= {name: p.grad if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return values, gradients


def weigh(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A loss in which every output value has a weight of its own and a curvature."""
    losses = []
    for y in outputs:
        if y.is_floating_point():
            weights = torch.arange(y.numel(), device=y.device).remainder(7).cos().view(y.shape)
            losses.append((y * weights).sum() + y.square().mean())
    return torch.stack(losses).sum()


def differing(a: Step, b: Step) -> list[str]:
    """Names of the outputs and gradients that are not equal bit for bit."""
    first, second = a[0] | a[1], b[0] | b[1]
    assert first.keys() == second.keys()

    def equal(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else torch.equal(x, y)

    return [name for name in first if not equal(first[name], second[name])]


def check_round_trip(block: nn.Module, inputs: Sequence[torch.Tensor], tolerance: float, there: bool = True) -> None:
    """Assert that inverse undoes forward, or the other way round."""
    with torch.no_grad():
        first, second = (block, block.inverse) if there else (block.inverse, block)
        between = first(*inputs)
        back = second(between) if isinstance(between, torch.Tensor) else second(*between)
    back = (back,) if isinstance(back, torch.Tensor) else back
    for x, y in zip(inputs, back, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=tolerance)


def check_gradients(chain: Chain, inputs: Sequence[torch.Tensor]) -> None:
    """Assert that the gradients of inputs and parameters are those of finite differences, in float64."""
    chain = chain.double()
    parameters = list(chain.parameters())
    inputs = [x.double().requires_grad_() for x in inputs]

    def run(*tensors: torch.Tensor):
        return chain(*tensors[: len(inputs)])

    assert torch.autograd.gradcheck(run, (*inputs, *parameters))


def check_parity(chain: nn.Module, inputs: Sequence[torch.Tensor], autocast: torch.dtype | None = None) -> None:
    """Assert that every strategy gives the outputs and gradients of ``store``, bit for bit."""
    stored = step(chain, inputs, "store", autocast)
    assert all(gradient is not None for gradient in stored[1].values())
    for memory in MEMORIES:
        assert differing(step(chain, inputs, memory, autocast), stored) == [], memory


def peak(module: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Peak of live bytes in forward and backward pass, parameters and their gradients apart."""
    module.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> None:
        outputs = module(*leaves)
        weigh([outputs] if isinstance(outputs, torch.Tensor) else outputs).backward()

    return peak_live_bytes(run, module.parameters(), inputs[0].device.type)


def check_flat_memory(make: Callable[[], nn.Module], inputs: Sequence[torch.Tensor], per_block: int = 0) -> None:
    """Assert that ``invert``'s peak does not grow with depth, save for bytes a block must keep, and ``store``'s does."""
    peaks = {}
    for n_blocks in (2, 8, 32):
        chain = Chain([make() for _ in range(n_blocks)], "invert").to(inputs[0].device)
        peaks[n_blocks] = peak(chain, inputs)
    for n_blocks in (8, 32):
        assert peaks[n_blocks] <= 1.02 * peaks[2] + per_block * (n_blocks - 2), peaks
    chain.memory = "store"
    assert peak(chain, inputs) > 2 * peaks[32], "the check has no teeth: store is flat as well"

"""A recomputation runs as the first run did, and parameters see one gradient a step."""

import copy

import pytest
import torch
from checks import MEMORIES, Net, branch, check_parity, couplings, differing, step, streams, weigh, with_branch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from memnet import AdditiveCoupling, Chain
from memnet.accounting.live_memory import peak_live_bytes
from memnet.normalization import NormLeakyReLU
from memnet.recompute import Replay, replay_with_grad

every_memory = pytest.mark.parametrize("memory", MEMORIES)


@every_memory
def test_backward_under_another_autocast_state(memory, device):
    """The recomputation runs as the forward pass ran, even if backward() is called inside an autocast region."""
    net, (x,) = Net(couplings(3)).to(device), streams(2, 1, 6, n=1, device=device)
    gradients = {}
    for name in ("store", memory):
        net.memory = name
        net.zero_grad()
        loss = weigh([net(x)])
        with torch.autocast(device.type, torch.bfloat16):
            loss.backward()
        gradients[name] = [p.grad for p in net.chain.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


@every_memory
def test_backward_outside_of_a_mode_that_changes_functions(memory, device):
    """Such as a default device, where blocks make tensors: PyTorch turns it off in a backward pass even inside of it."""

    class Cubes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.tanh:
                return args[0] ** 3
            return func(*args, **(kwargs or {}))

    net, (x,) = Net(with_branch(nn.Tanh())).to(device), streams(2, 1, 6, n=1, device=device)
    gradients = {}
    for name in ("store", memory):
        net.memory = name
        net.zero_grad()
        with Cubes():
            loss = weigh([net(x)])
        loss.backward()
        gradients[name] = [p.grad for p in net.chain.parameters()]
        assert not _get_current_function_mode_stack()
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


@every_memory
def test_default_device_of_the_forward_pass(memory):
    """A block that makes a tensor makes it on the same device when it runs again, and the default is as before after it."""

    class Ramp(nn.Module):
        def forward(self, x):
            places.append(torch.arange(x.shape[-1]).device.type)
            return x * torch.arange(x.shape[-1], device="cpu")

    places: list[str] = []
    net, (x,) = Net(with_branch(Ramp())), streams(2, 1, 6, n=1)
    net.memory = memory
    with torch.device("meta"):
        y = net(x)
        assert torch.empty(1).is_meta
    weigh([y]).backward()
    assert set(places) == {"meta"} and not torch.empty(1).is_meta
    try:
        torch.set_default_device("meta")
        y = net(x)
        weigh([y]).backward()
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_device(None)
    assert set(places) == {"meta"} and not torch.empty(1).is_meta


@every_memory
def test_autocast_cache_does_not_lose_gradients(memory, device):
    """A module used both in a chain and outside of it: weights cast in one must not serve the other without a graph."""
    shared = branch()
    chain = Chain([AdditiveCoupling(shared, branch())]).to(device)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain

        def forward(self, x1, x2):
            y1, y2 = self.chain(x1, x2)
            return y1 + shared(y2), y2

    net, inputs = Twice(), streams(device=device)
    chain.memory = "store"
    stored = step(net, inputs, None, torch.bfloat16)
    chain.memory = memory
    torch.testing.assert_close(step(net, inputs, None, torch.bfloat16), stored, rtol=1e-2, atol=1e-2)


def test_dropout_gradients(device):
    check_parity(with_branch(nn.Dropout(0.5)).to(device), streams(device=device))


@every_memory
def test_dropout_replay_leaves_the_random_state_alone(memory, device):
    chain = with_branch(nn.Dropout(0.5)).to(device)
    chain.memory = memory
    loss = weigh(chain(*streams(device=device)))
    torch.rand(5, device=device)  # moves the state away from where the forward pass left it
    before = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else ())
    loss.backward()
    after = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else ())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_memory
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(3, momentum=None)])
def test_batch_statistics_move_once_a_step(make, memory, device):
    chain = with_branch(make()).to(device)
    twin = copy.deepcopy(chain)
    for _ in range(3):
        inputs = streams(4, 3, 5, device=device)
        assert differing(step(chain, inputs, memory), step(twin, inputs, "store")) == []
    assert chain[0].f[3].num_batches_tracked == 3
    for (name, a), b in zip(chain.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


@every_memory
def test_power_iterations_move_once_a_step(memory):
    chain = couplings(2, lambda: nn.Sequential(nn.Tanh(), spectral_norm(nn.Conv1d(3, 3, 1))))
    twin, inputs = copy.deepcopy(chain), streams()
    for _ in range(2):
        assert differing(step(chain, inputs, memory), step(twin, inputs, "store")) == []
    for (name, a), b in zip(chain.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


@every_memory
def test_mode_switched_before_backward(memory):
    chain, inputs = with_branch(nn.Dropout(0.5), nn.BatchNorm1d(3)), streams()
    stored = step(copy.deepcopy(chain), inputs, "store")[1]
    chain.memory = memory
    torch.manual_seed(7)
    loss = weigh(chain(*inputs))
    chain.eval()
    loss.backward()
    assert not any(module.training for module in chain.modules())
    for name, parameter in chain.named_parameters():
        assert torch.equal(parameter.grad, stored[name]), name


@pytest.mark.parametrize("frozen", ["f", "g", "all", "one"])
def test_frozen_parameters(frozen):
    chain, inputs = couplings(3), streams()
    for name, parameter in chain.named_parameters():
        parameter.requires_grad_(not (frozen == "all" or f".{frozen}." in name or (frozen == "one" and name[0] == "1")))
    stored = step(chain, inputs, "store")
    assert any(gradient is None for gradient in stored[1].values())
    for memory in MEMORIES:
        assert differing(step(chain, inputs, memory), stored) == []


def test_parameter_that_no_branch_uses():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.tanh()

    chain, inputs = couplings(2, lambda: nn.Sequential(Spare(), nn.Conv1d(3, 3, 1))), streams()
    stored = step(chain, inputs, "store")
    assert stored[1]["0.f.0.spare"] is None
    for memory in MEMORIES:
        assert differing(step(chain, inputs, memory), stored) == []


def test_parameter_whose_gradient_is_also_the_streams():
    """Autograd hands one tensor to both terms of a sum; it must not be written to."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 3, 5))

        def forward(self, x):
            return x + self.shift

    check_parity(couplings(2, lambda: nn.Sequential(Shift(), nn.Tanh())), streams(1, 3, 5))


def test_tied_parameters_of_different_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    chain, inputs = couplings(2, Tied).double(), streams(dtype=torch.float64)
    stored = step(chain, inputs, "store")
    for memory in MEMORIES:
        torch.testing.assert_close(step(chain, inputs, memory), stored, rtol=1e-12, atol=1e-12)


@every_memory
def test_parameters_stay_the_modules_own(memory):
    chain = couplings(2)
    chain.append(AdditiveCoupling(chain[0].f, chain[0].f))
    before = [id(p) for p in chain.parameters()]
    step(chain, streams(), memory)
    assert [id(p) for p in chain.parameters()] == before


@every_memory
def test_parameter_changed_before_backward_is_refused(memory):
    chain = couplings(2)
    chain.memory = memory
    loss = weigh(chain(*streams()))
    with torch.no_grad():
        chain[1].f[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    "formats", [("channels_last_3d", "contiguous_format"), ("contiguous_format", "channels_last_3d")]
)
def test_repetition_sees_the_memory_format_of_the_first_call(formats):
    class Seeing(nn.Module):
        def forward(self, x):
            seen.append(x.stride())
            return 2 * x

    seen: list[tuple[int, ...]] = []
    first, again = (torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=getattr(torch, name)) for name in formats)
    replay = Replay(Seeing())
    replay.first(first)
    _, pull_back = replay_with_grad([replay], [again])
    ((gradient,), _) = pull_back([torch.ones_like(again)])
    assert seen == [first.stride()] * 2
    assert gradient.eq(2).all()


@every_memory
def test_neither_run_measures_convolutions(memory, monkeypatch):
    """Autograd's thread would measure by itself, and may find another algorithm the fastest."""

    class Seeing(nn.Module):
        def forward(self, x):
            seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
            return x

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    step(with_branch(Seeing(), n_blocks=1), streams(), memory)
    assert seen == [(False, True)] * 4  # two branches, twice
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic


@every_memory
def test_parameter_hooks_are_called_once(memory):
    chain, calls = couplings(3), []
    for parameter in chain.parameters():
        parameter.register_hook(lambda gradient: calls.append("hook"))
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    step(chain, streams(), memory)
    n = len(list(chain.parameters()))
    assert calls.count("hook") == n and calls.count("accumulated") == n


@every_memory
def test_two_forward_passes_before_backward(memory):
    chain, first, second = with_branch(nn.BatchNorm1d(3)), streams(), streams()
    twin = copy.deepcopy(chain)
    chain.memory = memory
    for net in (chain, twin):
        losses = [weigh(net(*inputs)) for inputs in (first, second)]
        sum(losses).backward()
    for p, q in zip(chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["permuted", "one channel"])
def test_streams_of_unusual_strides(case):
    """The order of the strides is the order of summation: an inverse must have them too."""

    def make():
        return nn.Sequential(NormLeakyReLU(n_channels, 3), nn.Conv3d(n_channels, n_channels, 3, padding=1))

    n_channels = 4 if case == "permuted" else 1
    if case == "permuted":
        inputs = [x.transpose(2, 4) for x in streams(2, 4, 9, 7, 8)]
    else:  # a batch of 1 with one channel is contiguous in either format
        inputs = [x.to(memory_format=torch.channels_last_3d) for x in streams(1, 1, 8, 9, 7)]
    check_parity(couplings(3, make), inputs)


class Counting(nn.Module):
    """A branch that changes a buffer in whatever mode, in place or by another in its place, and computes with it."""

    def __init__(self, in_place: bool, size: int) -> None:
        super().__init__()
        self.conv, self.in_place = nn.Conv1d(3, 3, 1), in_place
        self.register_buffer("count", torch.ones(size))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return self.conv(x) * self.count[:1]


@every_memory
@pytest.mark.parametrize("size", [1, 2**14])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_a_call_changes_is_changed_once(memory, size, in_place, training):
    expected, found = (couplings(2, lambda: Counting(in_place, size)).train(training) for _ in range(2))
    found.load_state_dict(expected.state_dict())
    inputs = streams()
    assert differing(step(found, inputs, memory), step(expected, inputs, "store")) == []
    assert all(bool((b == 2).all()) for b in found.buffers())


@every_memory
def test_no_copy_is_kept_of_a_large_buffer_that_a_call_leaves_alone(memory):
    """Every block kept one: with a table of 1 MiB, memory grew with depth under every strategy but ``store``."""
    chain = couplings(8)
    for block in chain:
        block.f.register_buffer("table", torch.zeros(2**18))
    inputs = [x.requires_grad_() for x in streams()]

    def train() -> None:
        chain.memory = memory
        weigh(chain(*inputs)).backward()

    # what a call may have changed is kept while it runs, and once for a step that has to be taken back
    assert peak_live_bytes(train, list(chain.parameters()), "cpu") < (1.2 + 8 * (memory == "invert")) * 2**20


def test_a_large_buffer_that_was_changed_since_is_told():
    chain = couplings(2)
    chain[0].f.register_buffer("table", torch.zeros(2**14))
    chain.memory = "checkpoint"
    loss = weigh(chain(*[x.requires_grad_() for x in streams()]))
    chain[0].f.table += 1
    with pytest.raises(RuntimeError, match="buffer .*table was changed in place"):
        loss.backward()

"""``auto``: the numbers of the other strategies, within a number of bytes, recomputing no more than these demand."""

import copy
import warnings

import pytest
import torch
from checks import branch, couplings, differing, step, streams, with_branch
from monai.bundle import ConfigParser
from torch import nn

from memnet import (
    AdditiveCoupling,
    Chain,
    ChannelMerge,
    ChannelSplit,
    ESPCNRevNet,
    FullyInvResUNet,
    InvertibleResidual,
    PartiallyInvResUNet,
    UNet3D,
    set_memory,
)
from memnet.accounting.dry_run import simulation
from memnet.accounting.live_memory import peak_live_bytes
from memnet.budget import _Step, parse_bytes

CUBE = (2, 8, 12, 12, 12)


def cube_chain(n_blocks: int = 6) -> Chain:
    return couplings(n_blocks, lambda: branch(8, 3))


def stored(module: nn.Module) -> int:
    return sum(len(m.stored) for m in module.modules() if isinstance(m, Chain) and m.memory == "auto")


def peak(module: nn.Module, inputs: list[torch.Tensor]) -> int:
    """Bytes alive at once in forward and backward pass, without those of a loss."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> None:
        outputs = module(*leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    module.zero_grad()
    return peak_live_bytes(run, module.parameters(), inputs[0].device.type)


def test_recomputes_less_the_more_it_may_take(device):
    chain, inputs = cube_chain().to(device), streams(*CUBE, device=device)
    reference = step(chain, inputs, "store")
    most, runs, found = peak(chain, inputs), [0], []
    chain.memory = "invert"
    least = peak(chain, inputs)
    for block in chain:
        block.f.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for share in (0.1, 0.3, 0.6, 1.2):
        budget = int(least + share * (most - least))
        set_memory(chain, "auto", budget)
        assert peak(chain, inputs) <= budget
        runs[0] = 0
        assert differing(step(chain, inputs), reference) == []
        assert runs[0] == 12 - stored(chain)
        assert chain.stored == frozenset(range(6 - stored(chain), 6)), "the last blocks' bytes are given back first"
        found.append(stored(chain))
    assert found[0] < found[1] < found[2] < found[3] == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: FullyInvResUNet(2, 1, 2, 8, 2, 1),
        lambda: PartiallyInvResUNet(2, 1, 2, 8, 2, 1),
        lambda: UNet3D(2, 1, 2, 8, 3),
        lambda: ESPCNRevNet(2, 4, channels=(8, 16), n_blocks=2),
    ],
)
def test_networks_share_one_budget_among_their_chains(make):
    net = make()
    x = torch.randn(2, 4 if isinstance(net, ESPCNRevNet) else 1, 32, 32)
    reference, most = step(net, [x], "store"), peak(net, [x])
    net.memory = "auto"  # with nothing stored
    least, numbers = peak(net, [x]), []
    for budget in (1.06 * least, (least + most) / 2, 1.06 * most):
        set_memory(net, "auto", int(budget))
        assert differing(step(net, [x]), reference) == []
        assert peak(net, [x]) <= budget
        numbers.append(stored(net))
    assert numbers[0] < numbers[2] and numbers == sorted(numbers)
    assert numbers[2] == sum(len(m) for m in net.modules() if isinstance(m, Chain) and m.memory == "auto")


def test_first_what_saves_most_operations_for_a_byte():
    net = FullyInvResUNet(3, 1, 2, 8, 2, 1)
    net.memory = "auto"
    with simulation():
        ranking = _Step(net, [torch.empty(1, 1, 16, 16, 16)], {}).rank()
    before, between, after = (i for i, block in enumerate(net.body) if isinstance(block, AdditiveCoupling))
    # between the levels there are more channels and fewer voxels; of equals the last goes first
    assert [i for _, i in ranking if i in (before, between, after)] == [between, after, before]


def test_a_budget_below_the_least_is_told_and_trained_all_the_same():
    chain, inputs = cube_chain(2), streams(*CUBE)
    reference = step(chain, inputs, "store")
    set_memory(chain, "auto", "10KB")
    with pytest.warns(UserWarning, match=r"takes [\d.]+ MiB even so, more than the 0.0 MiB"):
        assert differing(step(chain, inputs), reference) == []
    assert stored(chain) == 0


def test_blocks_without_an_exact_inverse_keep_checkpoints():
    chain = Chain([ChannelSplit(), *couplings(6, fraction_bits=None), ChannelMerge()])
    inputs = streams(2, 6, 2000, n=1)
    reference = step(chain, inputs, "store")
    set_memory(chain, "auto", int(0.85 * peak(chain, inputs)))
    assert not chain.exact and not Chain([InvertibleResidual(nn.Identity())]).exact and couplings(1).exact
    assert differing(step(chain, inputs), reference) == []


def test_dropout_and_batch_statistics_between_stored_and_inverted_blocks():
    chain = with_branch(nn.Dropout(0.5), nn.BatchNorm1d(3), n_blocks=4)
    twin, inputs = copy.deepcopy(chain), streams(2, 3, 3000)
    twin.memory = "store"
    set_memory(chain, "auto", int(0.6 * peak(copy.deepcopy(twin), inputs)))
    assert differing(step(chain, inputs), step(twin, inputs)) == []
    assert 0 < stored(chain) < 4
    for a, b in zip(chain.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:memory=.auto. does not call its blocks")
def test_the_choice_leaves_nothing_behind_and_is_made_once_for_a_shape(monkeypatch):
    chain, calls, choices = cube_chain(2), [], []
    chain[0].register_forward_hook(lambda *_: calls.append("block"))
    monkeypatch.setattr("memnet.budget._choose", lambda *a: choices.append(a) or [frozenset({1})])
    set_memory(chain, "auto", "1GiB")
    for inputs in (streams(*CUBE), streams(*CUBE), streams(2, 8, 8, 8, 8)):
        chain(*inputs)
    assert len(choices) == 2 and chain.stored == {1}
    monkeypatch.undo()
    calls.clear()
    state = torch.get_rng_state()
    set_memory(chain, "auto", "2GiB")
    chain(*streams_of_ones())
    assert torch.equal(state, torch.get_rng_state()) and calls == ["block"] and stored(chain) == 2
    assert all(p.grad is None for p in chain.parameters())
    with torch.no_grad():
        chain(*streams_of_ones(6))
    assert calls == ["block"] * 2


def streams_of_ones(side: int = 12) -> list[torch.Tensor]:
    return [torch.ones(2, 8, side, side, side) for _ in range(2)]


def test_modules_without_a_budget_of_their_own_are_fitted_as_one():
    net = nn.Sequential(UNet3D(1, 1, 4, 4, 2), nn.ReLU(), PartiallyInvResUNet(1, 4, 2, 4, 2, 1))
    x = torch.randn(2, 1, 256)  # beside which the 5 kB of a random state are little
    set_memory(net, "store")
    reference = step(net, [x])
    budget = int(0.95 * peak(net, [x]))
    set_memory(net, "auto", budget)
    assert peak(net, [x]) <= budget and stored(net) > 0
    assert differing(step(net, [x]), reference) == []
    set_memory(net, "store")
    assert not net._forward_pre_hooks and net[0].memory == "store"


def test_chains_nest():
    chain = Chain([ChannelSplit(), couplings(2), AdditiveCoupling(branch(), branch()), ChannelMerge()])
    inputs = streams(2, 6, 2000, n=1)
    reference = step(chain, inputs, "store")
    set_memory(chain, "auto", int(0.75 * peak(chain, inputs)))
    assert differing(step(chain, inputs), reference) == []
    assert chain[1].memory == ("store" if 1 in chain.stored else "invert")


def test_what_cannot_be_simulated_stores_nothing():
    class Judged(nn.Conv1d):
        def forward(self, x):
            return super().forward(x) * (1 if x.detach().numpy().max() > 0 else 2)

    chain, inputs = couplings(2, lambda: Judged(3, 3, 1)), streams()
    reference = step(chain, inputs, "store")
    set_memory(chain, "auto", "1GiB")
    with pytest.warns(UserWarning, match="cannot be simulated"):
        assert differing(step(chain, inputs), reference) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
def test_the_budget_of_a_config():
    definition = {"_target_": "memnet.FullyInvResUNet", "spatial_dims": 1, "channels": 4, "n_levels": 2}
    definition |= {"memory": "auto", "memory_budget": "12GiB"}
    net = ConfigParser({"net": definition}).get_parsed_content("net")
    assert (net.memory, net.memory_budget, net.body.memory) == ("auto", "12GiB", "auto")
    net(torch.randn(1, 1, 16))
    assert len(net.body.stored) == len(net.body)
    torch.jit.script(net.eval())


def test_budgets_that_make_no_sense_are_refused():
    for memory, budget in (("auto", None), ("invert", "1GiB")):
        with pytest.raises(ValueError, match="needs a budget, and nothing else does"):
            set_memory(couplings(1), memory, budget)
    for amount, said in {
        **dict.fromkeys(("a lot", "0", "-1GiB", "1.2.3GiB", "."), "no amount"),
        "12": "12 bytes",
    }.items():
        with pytest.raises(ValueError, match=said):
            Chain(couplings(1), "auto", memory_budget=amount)
    assert [parse_bytes(amount) for amount in (5120, 1e9, "1.5KiB", "2 TB")] == [5120, 10**9, 1536, 2 * 10**12]


def test_arguments_by_name_are_part_of_what_is_fitted():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = couplings(4)

        def forward(self, image):
            return self.chain(image, image)

    net, x = Named(), streams()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_memory(net, "auto", "1GiB")(image=x)
    assert net.chain.stored == frozenset(range(4))

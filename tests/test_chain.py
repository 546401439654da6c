"""A chain computes the same under every memory strategy, for every kind of state."""

import math
from contextlib import nullcontext

import pytest
import torch
from checks import MEMORIES, branch, check_parity, couplings, differing, step, streams, weigh
from monai.bundle import ConfigParser
from torch import nn

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit, FullyInvResUNet, set_memory
from memnet.grid import FRACTION_BITS, grid_step
from memnet.witness import some_values


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("n_blocks", [1, 2, 5])
def test_every_strategy_gives_the_same(n_blocks, autocast, device):
    check_parity(couplings(n_blocks).to(device), streams(device=device), autocast)


def test_every_strategy_gives_the_same_in_float64(device):
    check_parity(couplings(3).to(device, torch.float64), streams(device=device, dtype=torch.float64))


@pytest.mark.parametrize("segment", [None, 1, 2, 7])
def test_every_checkpoint_segment_gives_the_same(segment):
    chain = Chain(couplings(5), segment=segment)
    inputs = streams()
    assert differing(step(chain, inputs, "checkpoint"), step(chain, inputs, "store")) == []


@pytest.mark.parametrize("memory", ["store", "checkpoint", "recursive"])
def test_any_module_can_be_a_block(memory):
    chain, (x,) = Chain([nn.Conv1d(3, 4, 3), nn.Sigmoid(), nn.Conv1d(4, 2, 1)], memory), streams(n=1)
    torch.testing.assert_close(chain(x), nn.Sequential(*chain)(x), rtol=0, atol=2**-16)
    assert differing(step(chain, [x]), step(chain, [x], "store")) == []


def _count_calls(modules):
    calls = dict.fromkeys(modules, 0)

    def count(module, _):
        calls[module] += 1

    for module in modules:
        module.register_forward_pre_hook(count)
    return calls


def test_invert_calls_f_and_g_exactly_twice_a_step():
    chain = couplings(6)
    calls = _count_calls([part for block in chain for part in (block.f, block.g)])
    step(chain, streams(), "invert")
    assert set(calls.values()) == {2}


def test_checkpoint_calls_each_block_twice_a_step():
    chain = Chain([branch() for _ in range(10)])
    calls = _count_calls(list(chain))
    step(chain, streams(n=1), "checkpoint")
    assert set(calls.values()) == {2}


@pytest.mark.parametrize("n_blocks", [1, 8, 64])
def test_recursive_calls_each_block_a_logarithmic_number_of_times(n_blocks):
    chain = Chain([branch() for _ in range(n_blocks)])
    calls = _count_calls(list(chain))
    step(chain, streams(n=1), "recursive")
    assert max(calls.values()) == math.log2(n_blocks) + 2


@pytest.mark.parametrize(
    ("memory", "least", "most"), [("store", 64, 1000), ("checkpoint", 8, 8), ("recursive", 1, 1), ("invert", 1, 1)]
)
def test_activations_kept_between_forward_and_backward(memory, least, most):
    chain, inputs, kept = couplings(64), streams(), {}
    chain.memory = memory
    parameters = {p.data_ptr() for p in chain.parameters()}

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = chain(*inputs)
    # invert compares some values when it comes back to them
    compared = some_values(outputs).nbytes if memory == "invert" else 0
    size = sum(y.nbytes for y in outputs)
    assert least * size <= sum(kept.values()) <= most * size + compared


def test_state_dict_is_the_same_under_every_strategy():
    chain = couplings(2)
    keys = list(chain.state_dict())
    assert keys[:3] == ["0.f.0.weight", "0.f.0.bias", "0.f.2.weight"]
    for memory in MEMORIES:
        chain.memory = memory
        assert list(chain.state_dict()) == keys


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_memory_is_set_from_a_config(memory):
    coupling = {"_target_": "memnet.AdditiveCoupling", "f": {"_target_": "torch.nn.Conv1d"}}
    conv = {"_target_": "torch.nn.Conv1d", "in_channels": 3, "out_channels": 3, "kernel_size": 1}
    coupling |= {"f": conv, "g": conv}
    parser = ConfigParser({"chain": {"_target_": "memnet.Chain", "blocks": [coupling, coupling], "memory": memory}})
    chain = parser.get_parsed_content("chain")
    assert isinstance(chain, Chain) and chain.memory == memory
    assert len(step(chain, streams())[0]) == 2


def test_set_memory_leaves_a_networks_own_choice_to_it():
    net = FullyInvResUNet(2, 1, 2, channels=4, n_levels=2, memory="store", vae=True)
    set_memory(nn.Sequential(net), "invert")
    assert net.memory == net.body.memory == "invert"
    assert net.vae.upsample.memory == "checkpoint"


def test_set_memory_switches_every_chain_in_a_module():
    net = nn.Sequential(couplings(1), nn.ModuleDict({"inner": couplings(2)}))
    assert set_memory(net, "recursive") is net
    assert [m.memory for m in net.modules() if isinstance(m, Chain)] == ["recursive"] * 2
    with pytest.raises(ValueError, match=r"Sequential has no memnet\.Chain"):
        set_memory(nn.Sequential(), "store")


def test_unknown_memory_is_refused():
    with pytest.raises(ValueError, match="auto, store, checkpoint, recursive, invert, got 'magic'"):
        Chain(couplings(1), "magic")


def test_invert_refuses_a_block_without_inverse():
    with pytest.raises(ValueError, match="block 1 is a Conv1d"):
        Chain([*couplings(1), nn.Conv1d(3, 3, 1)], "invert")


def test_inverse_refuses_a_block_without_inverse():
    with pytest.raises(TypeError, match="Conv1d is not invertible"):
        Chain([nn.Conv1d(3, 3, 1)]).inverse(*streams(n=1))


@pytest.mark.parametrize("arguments", [{"blocks": []}, {"blocks": [nn.Identity()], "segment": 0}])
def test_empty_chain_and_segment_are_refused(arguments):
    with pytest.raises(ValueError):
        Chain(**arguments)


def test_inverse_of_a_chain():
    chain, inputs = couplings(5), streams()
    for x, y in zip(inputs, chain.inverse(*chain(*inputs)), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=grid_step(x.dtype, FRACTION_BITS) / 2)


def test_slice_is_a_chain_of_the_same_blocks():
    chain = couplings(4)
    chain.memory = "invert"
    part = chain[1:3]
    assert isinstance(part, Chain) and part.memory == "invert" and list(part) == [chain[1], chain[2]]


def test_state_may_hold_tensors_that_are_not_floating_point():
    chain, (x1, x2) = couplings(3), streams()
    labels = torch.tensor([3, 1, 2])
    check_parity_with(chain, [x1, x2, labels])
    chain.memory = "invert"
    assert torch.equal(chain(x1, x2, labels)[2], labels)


def check_parity_with(chain, inputs):
    stored = step(chain, inputs, "store")
    assert stored[1]["input 0"] is not None
    for memory in MEMORIES:
        assert differing(step(chain, inputs, memory), stored) == [], memory


def test_state_may_hold_a_tensor_that_no_block_uses():
    check_parity(couplings(3), streams(n=3))


def test_outputs_that_the_loss_does_not_use():
    chain, inputs = couplings(3), streams()
    gradients = {}
    for memory in ("store", *MEMORIES):
        chain.memory = memory
        chain.zero_grad()
        weigh([chain(*inputs)[0]]).backward()
        gradients[memory] = [p.grad for p in chain.parameters()]
    for memory in MEMORIES:
        for a, b in zip(gradients[memory], gradients["store"], strict=True):
            assert torch.equal(torch.zeros_like(a) if b is None else b, a)


@pytest.mark.parametrize("inner", ["store", *MEMORIES])
def test_chains_nest(inner):
    chain = Chain([ChannelSplit(), couplings(2), AdditiveCoupling(branch(), branch()), couplings(2), ChannelMerge()])
    inputs = streams(2, 6, 5, n=1)
    stored = step(chain, inputs, "store")
    for memory in MEMORIES:
        chain.memory = memory
        for child in chain:
            if isinstance(child, Chain):
                child.memory = inner
        assert differing(step(chain, inputs), stored) == [], memory


def test_weights_shared_between_blocks():
    f, g, h = branch(), branch(), branch()
    chain, inputs = Chain([AdditiveCoupling(f, g), AdditiveCoupling(f, h), AdditiveCoupling(g, g)]).double(), streams()
    inputs = [x.double() for x in inputs]
    stored = step(chain, inputs, "store")[1]
    for memory in MEMORIES:
        # close, since sums of more than two terms depend on the order
        torch.testing.assert_close(step(chain, inputs, memory)[1], stored, rtol=1e-12, atol=1e-12)


def test_a_block_used_twice():
    block = AdditiveCoupling(branch(), branch())
    check_parity(Chain([block, AdditiveCoupling(branch(), branch()), block]), streams())


def test_half_precision_input_becomes_a_float32_stream():
    for memory in ("store", *MEMORIES):
        chain = couplings(2, nn.Identity)
        chain.memory = memory
        outputs = chain(*[x.requires_grad_() for x in streams(dtype=torch.bfloat16)])
        assert {y.dtype for y in outputs} == {torch.float32}


def test_outputs_that_are_unused_or_watched():
    """``invert`` takes the outputs' gradients past autograd's engine; hooks and ``retain_grad`` see them all the same."""
    chain, found = couplings(2), {}
    inputs = streams()
    for memory in ("store", "invert"):
        chain.memory = memory
        chain.zero_grad()
        y1, _ = chain(*inputs)
        y1.retain_grad()
        y1.register_hook(lambda gradient: 2 * gradient)
        for weight in (1, 3):
            (weight * y1.square()).sum().backward(retain_graph=weight == 1)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in chain.named_parameters()}
        found[memory] = {}, gradients | {"y1": y1.grad}
    assert found["store"][1]["0.f.2.weight"].abs().sum() > 0
    assert differing(found["invert"], found["store"]) == []


def test_blocks_that_are_added_later_share_the_grid():
    chain = Chain([ChannelSplit()])
    chain.extend([AdditiveCoupling(branch(), branch()) for _ in range(2)])
    chain.append(ChannelMerge())
    check_parity(chain, streams(2, 6, 5, n=1))


def test_a_nested_chain_rounds_what_comes_off_the_grid():
    def coupling(fraction_bits):
        return AdditiveCoupling(branch(), branch(), fraction_bits)

    chain, inputs = Chain([coupling(None), Chain([coupling(8)]), coupling(None)]), streams()
    stored = step(chain, inputs, "store")
    for memory in MEMORIES:
        found = step(chain, inputs, memory)
        assert all(map(torch.equal, found[0].values(), stored[0].values())), memory


def test_an_empty_batch():
    check_parity(couplings(2), streams(0, 3, 5))


class _OtherKernels(nn.Module):
    """Multiplies, and sums up otherwise from its second call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.calls, self.after = 0, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.weight + (1e-3 if self.calls > self.after else 0.0)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_inversion_that_brings_back_other_numbers_is_told(place, n_blocks):
    """What a GPU does whose library takes one kernel in the forward pass and another in the backward pass."""
    blocks = [AdditiveCoupling(*[_OtherKernels(1 if i == place else 9) for _ in range(2)]) for i in range(n_blocks)]
    outputs = Chain(blocks, "invert")(*[torch.rand(2, 3, requires_grad=True) for _ in range(2)])
    told = 0 < place < n_blocks
    with pytest.warns(RuntimeWarning, match="brought back other numbers .* by up to") if told else nullcontext():
        sum(y.sum() for y in outputs).backward()


def test_complex_streams_need_no_witness():
    chain = Chain([ChannelSplit(), ChannelMerge()], "invert")
    x = torch.rand(2, 4, 5, dtype=torch.complex64, requires_grad=True)
    chain(x).abs().sum().backward()
    assert torch.equal(x.grad, torch.sgn(x.detach()))


def test_blocks_with_hooks_or_a_forward_of_their_own_are_called_under_invert():
    class Doubled(AdditiveCoupling):
        def forward(self, *state):
            return tuple(2 * x for x in super().forward(*state))

    hooked, seen = couplings(3), []
    hooked[1].register_forward_hook(lambda _, __, outputs: [seen.append(1), tuple(2 * x for x in outputs)][1])
    overridden = Chain([Doubled(branch(), branch()) for _ in range(2)])
    for chain in (hooked, overridden):
        inputs = streams()
        with pytest.warns(UserWarning, match='does not call its blocks.*trained with memory="checkpoint"'):
            found = step(chain, inputs, "invert")
        assert differing(found, step(chain, inputs, "store")) == []
    assert seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_half_precision_are_refused_in_a_sentence(dtype):
    chain, inputs = couplings(2).to(dtype), streams(dtype=dtype)
    for memory in ("store", *MEMORIES):
        chain.memory = memory
        with pytest.raises(ValueError, match=r"keep parameters in float32 and run the network under torch\.autocast"):
            chain(*inputs)


def test_lazy_modules_are_told_to_be_initialized():
    chain = Chain([AdditiveCoupling(nn.LazyConv1d(3, 1), nn.LazyConv1d(3, 1))], memory="checkpoint")
    with pytest.raises(ValueError, match="lazy module.*call the network once under torch.no_grad"):
        chain(*streams())
    with torch.no_grad():
        chain(*streams())
    assert differing(step(chain, inputs := streams(), "invert"), step(chain, inputs, "store")) == []


def test_a_block_that_was_added_since_and_cannot_be_inverted_is_named():
    chain = couplings(1)
    chain.memory = "invert"
    chain.append(nn.Identity())
    with pytest.raises(ValueError, match="needs invertible blocks.*Identity"):
        chain(*streams())

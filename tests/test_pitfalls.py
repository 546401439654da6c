"""What breaks other implementations around a chain, each executed and right under every strategy."""

import copy
import gc
import pickle

import pytest
import torch
from checks import MEMORIES, Net, check_parity, couplings, differing, step, streams, weigh
from monai.data import MetaTensor
from torch import nn
from torch.autograd import forward_ad

from memnet import Chain, set_memory
from memnet.accounting.live_memory import peak_live_bytes
from memnet.normalization import NormLeakyReLU

every_memory = pytest.mark.parametrize("memory", MEMORIES)


def image(device="cpu"):
    return streams(2, 1, 6, n=1, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_half_precision_stem(dtype, device):
    check_parity(Net(couplings(4)).to(device), image(device), autocast=dtype)


@every_memory
def test_input_is_untouched_and_can_be_read_afterwards(memory):
    chain, (x1, x2) = couplings(3), [x.requires_grad_() for x in streams()]
    before = [x1.detach().clone(), x2.detach().clone()]
    gradients = {}
    for name in ("store", memory):
        chain.memory = name
        y1, y2 = chain(x1, x2)
        gradients[name] = torch.autograd.grad((y1 * x1 + y2 * x2.exp()).sum(), [x1, x2])
    assert torch.equal(x1, before[0]) and torch.equal(x2, before[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


@every_memory
def test_long_skip_around_the_chain(memory):
    class Around(Net):
        def forward(self, x):
            features = self.between(self.stem(x))
            return self.head(self.chain(features) * features.sigmoid())

    net, inputs = Around(couplings(3)), image()
    assert differing(step(net, inputs, memory), step(net, inputs, "store")) == []


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_directly_before_the_chain(inplace):
    check_parity(Net(couplings(3), nn.ReLU(inplace)), image())


@pytest.mark.parametrize("first", [True, False])
def test_inplace_activation_inside_a_branch(first):
    def make():
        if first:
            return nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(3, 3, 1))
        return nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv1d(3, 3, 1), nn.LeakyReLU(inplace=True))

    chain, inputs = couplings(3, make), streams()
    check_parity(chain, inputs)
    plain = copy.deepcopy(chain)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    assert differing(step(plain, inputs, "store"), step(chain, inputs, "invert")) == []


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_branch_that_changes_its_input_is_refused(memory):
    class Rude(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    chain = couplings(2, Rude)
    chain.memory = memory
    with pytest.raises(RuntimeError, match=r"(Rude.*changes its input in place)|(inplace operation)"):
        weigh(chain(*[x.requires_grad_() for x in streams()])).backward()


@pytest.mark.parametrize("which", [0, 1])
@every_memory
def test_inplace_activation_after_the_chain(memory, which):
    """Right, or refused by autograd; never silently wrong."""
    chain, inputs = couplings(3), streams()
    state = list(chain(*inputs))
    state[which] = state[which].relu()
    right = torch.autograd.grad(weigh(state), list(chain.parameters()))
    chain.memory = memory
    state = chain(*inputs)
    state[which].relu_()
    if memory == "invert":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            weigh(state).backward()
    else:
        assert all(map(torch.equal, torch.autograd.grad(weigh(state), list(chain.parameters())), right))


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_metatensor_in_and_out(memory):
    net, (x,) = Net(couplings(3)), image()
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    meta = MetaTensor(x.clone(), affine=affine, meta={"filename_or_obj": "scan.nii"})
    stored = step(net, [x], "store")
    net.memory = memory
    net.zero_grad()
    y = net.chain(net.stem(meta))
    assert isinstance(y, MetaTensor)
    assert torch.equal(y.affine, affine.to(y.affine)) and y.meta["filename_or_obj"] == "scan.nii"
    weigh([net.head(y)]).backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(torch.as_tensor(parameter.grad), stored[1][name]), name


@every_memory
def test_input_that_needs_no_gradient(memory):
    chain, inputs = couplings(3), streams()
    stored = step(chain, inputs, "store")[1]
    chain.memory = memory
    chain.zero_grad()
    weigh(chain(*inputs)).backward()
    for name, parameter in chain.named_parameters():
        assert torch.equal(parameter.grad, stored[name]), name


def test_no_gradient_at_all_makes_no_graph():
    chain = couplings(2).requires_grad_(False)
    chain.memory = "invert"
    assert not any(y.requires_grad for y in chain(*streams()))


@every_memory
def test_autograd_grad(memory):
    chain, inputs = couplings(3), [x.requires_grad_() for x in streams()]
    targets = [*inputs, *chain.parameters()]
    found = {}
    for name in ("store", memory):
        chain.memory = name
        found[name] = torch.autograd.grad(weigh(chain(*inputs)), targets)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    assert all(target.grad is None for target in targets)


@every_memory
def test_autograd_grad_of_an_input_alone(memory):
    chain, (x1, x2) = couplings(3), streams()
    x1.requires_grad_()
    found = {}
    for name in ("store", memory):
        chain.memory = name
        (found[name],) = torch.autograd.grad(weigh(chain(x1, x2)), [x1])
    assert torch.equal(*found.values())


@every_memory
def test_backward_twice(memory):
    chain, inputs = couplings(3), streams()
    chain.memory = memory
    loss = weigh(chain(*inputs))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in chain.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * a) for p, a in zip(chain.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_memory
def test_gradients_accumulate_over_steps(memory):
    chain, inputs = couplings(2), streams()
    once = step(chain, inputs, memory)[1]
    weigh(chain(*inputs)).backward()
    for name, parameter in chain.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name]), name


@every_memory
def test_double_backward_is_refused_in_a_sentence(memory):
    chain, inputs = couplings(2), [x.requires_grad_() for x in streams()]
    chain.memory = memory
    (gradient, _) = torch.autograd.grad(weigh(chain(*inputs)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain))])
def test_copies_compute_the_same(copied, memory):
    chain, inputs = couplings(3), streams()
    stored = step(chain, inputs, memory)  # a copy must not need a fresh chain
    twin = copied(chain)
    assert twin.memory == memory
    assert differing(step(twin, inputs), stored) == []
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in chain.parameters()}


def test_weights_are_exchanged_with_a_plain_list_of_blocks():
    chain = couplings(2)
    chain.memory = "invert"
    plain = nn.ModuleList(couplings(2))
    plain.load_state_dict(chain.state_dict())
    assert list(plain.state_dict()) == list(chain.state_dict())


@every_memory
def test_nothing_is_left_after_a_step_without_the_garbage_collector(memory):
    chain, inputs = couplings(4), streams(1, 3, 1000)
    chain.memory = memory

    def steps(n):
        for _ in range(n):
            weigh(chain(*inputs)).backward()

    steps(1)
    gc.collect()
    gc.disable()
    try:
        one, many = (peak_live_bytes(lambda n=n: steps(n)) for n in (1, 5))
    finally:
        gc.enable()
    assert many - one < inputs[0].nbytes


@every_memory
def test_a_graph_that_is_not_used_is_freed(memory):
    chain, inputs = couplings(4), streams(1, 3, 1000)
    chain.memory = memory

    def passes(n):
        for _ in range(n):
            chain(*inputs)

    gc.disable()
    try:
        one, many = (peak_live_bytes(lambda n=n: passes(n)) for n in (1, 5))
    finally:
        gc.enable()
    assert many - one < inputs[0].nbytes


@every_memory
def test_activation_checkpointing_around_the_chain(memory):
    chain, inputs = couplings(2), streams()
    stored = step(chain, inputs, "store")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain

        def forward(self, *state):
            return torch.utils.checkpoint.checkpoint(self.chain, *state, use_reentrant=False)

    chain.memory = memory
    around = step(Outer(), inputs)
    for name, value in stored[1].items():
        assert torch.equal(around[1][name if name.startswith("input") else f"chain.{name}"], value)


@pytest.mark.parametrize("memory", ["checkpoint", "recursive"])
def test_blocks_in_place(memory):
    blocks = [nn.Conv1d(3, 3, 1), nn.ELU(inplace=True), nn.Conv1d(3, 3, 1), nn.LeakyReLU(0.3, inplace=True), nn.Tanh()]
    net = nn.Sequential(nn.Tanh(), Chain(blocks, segment=1))
    gradients = {}
    for name in ("store", memory):
        set_memory(net, name)
        gradients[name] = torch.autograd.grad(weigh(net(streams(n=1)[0].fill_(0.5))), list(net.parameters()))
    assert all(map(torch.equal, *gradients.values()))


@every_memory
@pytest.mark.parametrize("between", [nn.Conv1d(3, 3, 1), nn.Tanh()])
def test_one_activation_for_several_layers(memory, between):
    def make():
        act = nn.LeakyReLU()
        return nn.Sequential(nn.Conv1d(3, 3, 1), act, copy.deepcopy(between), act, nn.Conv1d(3, 3, 1))

    chain, inputs = couplings(2, make), streams()
    assert differing(step(chain, inputs, memory), step(chain, inputs, "store")) == []


@pytest.mark.parametrize("keep", [lambda gradient: gradient, torch.Tensor.detach])
def test_gradients_that_a_hook_keeps_stay_as_they_are(keep):
    chain, inputs, kept = couplings(2, lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding=1))), streams(), []
    chain[0].f.register_full_backward_hook(lambda module, gradients, _: kept.append(keep(gradients[0])))
    for memory in ("store", "invert"):
        step(chain, inputs, memory)
    assert torch.equal(*kept)


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_inference_mode(memory):
    chain, inputs = with_norm(), streams()
    chain.memory = memory
    with torch.inference_mode():
        found = chain(*inputs)
    assert all(map(torch.equal, found, chain(*inputs)))


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_torch_func(memory):
    """Transforms of functions see plain modules under every strategy: gradients, one for each sample, through either order."""
    chain, inputs = with_norm(), streams()
    gradients = step(chain, inputs, memory)[1]
    parameters = {name: p.detach() for name, p in chain.named_parameters()}

    def loss(parameters, *state):
        return weigh(torch.func.functional_call(chain, parameters, state))

    def loss_of_one(parameters, *state):
        return torch.stack(
            [y.sum() for y in torch.func.functional_call(chain, parameters, tuple(x[None] for x in state))]
        ).sum()

    found = torch.func.grad(loss)(parameters, *inputs)
    each = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(parameters, *inputs)
    total = torch.func.grad(lambda p: torch.func.vmap(loss_of_one, (None, 0, 0))(p, *inputs).sum())(parameters)
    for name in parameters:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each[name].sum(0), total[name], rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in total.values()) > 1


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own use of it
def test_forward_mode_differentiation(memory, grad, float64):
    """A tangent is carried through the grid, under ``no_grad`` too: its product with a gradient is the vector-Jacobian one's."""
    chain, inputs = with_norm(), [x.double() for x in streams()]
    chain.memory = memory
    tangents, weights = streams(dtype=torch.float64), streams(dtype=torch.float64)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        outputs = chain(*map(forward_ad.make_dual, inputs, tangents))
        found = [forward_ad.unpack_dual(y).tangent for y in outputs]
    inputs = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(chain(*inputs), inputs, weights)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert expected.abs() > 0.1
    torch.testing.assert_close(sum((w * t).sum() for w, t in zip(weights, found, strict=True)), expected)


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_several_gradients_at_once(memory):
    """``is_grads_batched``, as ``torch.autograd.functional.jacobian(..., vectorize=True)`` has it."""
    chain, inputs = couplings(3), [x.requires_grad_() for x in streams()]
    chain.memory = memory
    weights = [torch.randn(4, *y.shape) for y in chain(*inputs)]
    each = [torch.autograd.grad(chain(*inputs), inputs, [w[i] for w in weights]) for i in range(4)]
    found = torch.autograd.grad(chain(*inputs), inputs, weights, is_grads_batched=True)
    for gradient, parts in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack(parts))


def with_norm():
    return couplings(2, lambda: nn.Sequential(NormLeakyReLU(3, 1), nn.Conv1d(3, 3, 1)))


def test_a_replica_of_data_parallel_is_refused():
    chain = couplings(2)._replicate_for_data_parallel()
    chain.memory = "invert"
    with pytest.raises(ValueError, match="DistributedDataParallel in place of DataParallel"):
        chain(*[x.requires_grad_() for x in streams()])

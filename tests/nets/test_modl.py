"""MoDL: against plain autograd under every strategy, and the honesty of approximate inversion."""

import copy

import pytest
import torch
from torch import nn

from memnet import DriftError, set_memory
from memnet.accounting.live_memory import peak_live_bytes
from memnet.mri.operators import SenseOperator
from memnet.nets.modl import MoDL
from memnet.nets.modl_steps import DataConsistency, Regularization, ResidualCNN
from memnet.workflow.checkpoints import load_weights

SHAPES = {
    "2D": ((2, 8, 12), (2, 3, 8, 12), 2, 2),
    "slab": ((1, 4, 8, 12), (1, 3, 4, 8, 12), 3, 2),
    "3D": ((1, 4, 6, 8), (1, 2, 4, 6, 8), 3, 3),
    "movie": ((1, 4, 8, 12), (1, 3, 1, 8, 12), 3, 2),
}


def example(shape, csm_shape, fft_dims: int = 2, dtype=torch.complex64):
    """K-space, coil maps and mask of a smooth image."""
    csm = torch.randn(csm_shape, dtype=dtype)
    csm = csm / csm.abs().square().sum(1, keepdim=True).sqrt()
    mask = torch.rand(shape[0], 1, *[1] * (len(shape) - 1 - fft_dims), *shape[-fft_dims:]) < 0.6
    image = torch.randn(shape, dtype=dtype)
    return SenseOperator(csm, mask, fft_dims).forward(image), csm, mask


def network(spatial_dims: int = 2, fft_dims: int = 2, contraction: float = 0.2, **arguments) -> MoDL:
    torch.manual_seed(0)
    consistency = DataConsistency(mu=0.5, max_iterations=20, tolerance=1e-7, fft_dims=fft_dims)
    net = MoDL(spatial_dims, channels=4, data_consistency=consistency, **({"n_unrolls": 3, "tile": None} | arguments))
    with torch.no_grad():
        for regularizer in net.regularizers:
            regularizer.residual[-1].weight *= contraction
    return net


def gradients(net: MoDL, inputs) -> dict[str, torch.Tensor]:
    net.zero_grad()
    kspace = inputs[0].detach().clone().requires_grad_()
    output = net(kspace, *inputs[1:])
    (output - 1).abs().square().sum().backward()
    return {"output": output.detach(), "kspace": kspace.grad} | {n: p.grad for n, p in net.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


@pytest.mark.parametrize(("shape", "csm_shape", "spatial_dims", "fft_dims"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("memory", ["checkpoint", "recursive"])
def test_exact_strategies_give_the_gradients_of_plain_autograd(shape, csm_shape, spatial_dims, fft_dims, memory):
    inputs = example(shape, csm_shape, fft_dims)
    net = network(spatial_dims, fft_dims, memory="store")
    expected = gradients(net, inputs)
    net.memory = memory
    found = gradients(net, inputs)
    assert torch.equal(found["output"], expected["output"])
    # what is shared by the unrolls sums its gradients in another order
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("memory", ["store", "checkpoint", "recursive"])
def test_tiles_change_nothing_but_rounding(memory):
    inputs = example((1, 3, 6, 24), (1, 2, 3, 6, 24))
    expected = gradients(network(3, memory="store"), inputs)
    assert distance(gradients(network(3, memory=memory, tile=(8,)), inputs), expected) < 1e-5


@pytest.mark.parametrize("every", [None, 1, 2])
def test_inversion_of_a_contractive_network_gives_nearly_the_gradients(every):
    inputs = example(*SHAPES["2D"][:2])
    expected = gradients(network(memory="store"), inputs)
    found = gradients(network(memory="invert", every=every), inputs)
    assert torch.equal(found["output"], expected["output"])
    assert 0 < distance(found, expected) < 1e-2


def test_the_inverse_of_each_step_gives_its_input_back():
    kspace, csm, mask = example(*SHAPES["2D"][:2])
    operator = SenseOperator(csm, mask)
    adjoint = operator.adjoint(kspace)
    z = torch.randn_like(adjoint)
    net = network()
    regularizer, consistency = net.regularizers[0], net.data_consistency
    regularizer.inverse_iterations = 30
    with torch.no_grad():
        torch.testing.assert_close(regularizer.inverse(regularizer(z)), (z,), rtol=0, atol=1e-4)
        x = consistency(z, adjoint, operator)
        torch.testing.assert_close(consistency.inverse(x, adjoint, operator), z, rtol=0, atol=1e-4)


def test_a_network_that_is_no_contraction_is_refused_in_a_sentence():
    inputs = example(*SHAPES["2D"][:2])
    with pytest.raises(DriftError, match='regularization.*use memory="checkpoint"'):
        gradients(network(memory="invert", contraction=20.0), inputs)


def grown(memory: str, mu: float = 0.5, n_unrolls: int = 10, **arguments) -> MoDL:
    """Unrolls whose weights training has made three times as large as they begin."""
    torch.manual_seed(0)
    consistency = DataConsistency(mu=mu, max_iterations=30, tolerance=1e-7)
    net = MoDL(2, n_unrolls, 4, data_consistency=consistency, tile=None, memory=memory, **arguments)
    with torch.no_grad():
        for p in net.regularizers.parameters():
            p *= 3
    return net


def test_a_contraction_inverts_where_a_free_regulariser_is_refused():
    inputs = example(*SHAPES["2D"][:2])
    with pytest.raises(DriftError, match="regularization gives back its output"):
        gradients(grown("invert", every=4), inputs)
    expected = gradients(grown("store", contraction=0.9), inputs)
    found = gradients(grown("invert", every=4, contraction=0.9), inputs)
    assert distance(found, expected) < 1e-5


def test_errors_that_later_inverses_amplify_are_seen_in_the_voxels_that_are_kept():
    inputs = example(*SHAPES["2D"][:2])
    # each step's own inverse is within the tolerance, and up to 21 times its error is left after each unroll
    with pytest.raises(DriftError, match="input, with what the inverses after it missed"):
        gradients(grown("invert", mu=0.05, contraction=0.9), inputs)


@pytest.mark.parametrize("memory", ["checkpoint", "recursive"])
def test_a_contraction_follows_its_weights_alike_under_every_strategy(memory):
    inputs = example(*SHAPES["2D"][:2])
    nets = [grown(m, contraction=0.5, shared=False, n_unrolls=2) for m in ("store", memory)]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            gradients(net, inputs)
            optimizer.step()
    expected, found = (net.state_dict() for net in nets)
    names = [name for name in expected if name.endswith("direction")]
    assert len(names) == 10 and not torch.equal(
        expected[names[0]], grown("store", contraction=0.5).state_dict()[names[0]]
    )
    assert distance(found, expected) < 1e-5


def test_or_its_unrolls_are_run_again_to_the_exact_gradients():
    inputs = example(*SHAPES["2D"][:2])
    expected = gradients(network(memory="store", contraction=20.0), inputs)
    found = gradients(network(memory="invert", contraction=20.0, on_drift="rerun"), inputs)
    assert distance(found, expected) < 1e-5


def test_conjugate_gradients_stopped_early_drift_and_are_refused():
    inputs = example(*SHAPES["2D"][:2])
    net = network(memory="invert")
    net.data_consistency.max_iterations, net.data_consistency.tolerance = 2, 0.0
    with pytest.raises(DriftError, match="data consistency"):
        gradients(net, inputs)


def test_images_held_on_the_host_are_the_same():
    inputs = example(*SHAPES["2D"][:2])
    assert distance(gradients(network(host=True), inputs), gradients(network(), inputs)) == 0


def test_one_regulariser_or_one_each():
    shared, apart = network(), network(shared=False)
    assert len(shared.regularizers) == 1 and len(apart.regularizers) == 3
    weights = [r.residual[0].weight for r in apart.regularizers]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    inputs = example(*SHAPES["2D"][:2])
    assert all(g.abs().sum() > 0 for g in gradients(apart, inputs).values())


def test_weights_serve_any_number_of_unrolls_and_any_tiles():
    net = network(n_unrolls=2)
    other = network(n_unrolls=5, tile=(8,), memory="invert")
    other.load_state_dict(net.state_dict())
    assert "regularizers.0.residual.0.weight" in net.state_dict() and "data_consistency.log_mu" in net.state_dict()


def test_weights_of_one_regulariser_serve_as_many_as_there_are(tmp_path):
    inputs = example(*SHAPES["slab"][:2])
    one, several = network(3), network(3, shared=False)
    for p in several.parameters():
        torch.nn.init.normal_(p)
    torch.save(one.state_dict(), tmp_path / "one.pt")
    load_weights(several, tmp_path / "one.pt")
    assert torch.equal(several(*inputs), one(*inputs))
    torch.save(several.state_dict(), tmp_path / "several.pt")
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(network(3, shared=False, n_unrolls=4), tmp_path / "several.pt")


@pytest.mark.parametrize(("n", "places"), [(4, [0, 3, 6, 9]), (10, range(10)), (2, [0, 9]), (1, [0]), (3, [0, 4, 9])])
def test_a_training_takes_weights_of_another_number_of_unrolls(n, places, tmp_path):
    """Of ten regularisers the nearest each; it was told to be possible, and refused."""
    ten = network(shared=False, n_unrolls=10)
    torch.save(ten.state_dict(), tmp_path / "ten.pt")
    other = network(shared=False, n_unrolls=n)
    if n != 10:
        with pytest.raises(ValueError, match="do not fit"):
            load_weights(other, tmp_path / "ten.pt")
    load_weights(other, tmp_path / "ten.pt", spread=True)
    for regularizer, place in zip(other.regularizers, places, strict=True):
        for name, weight in regularizer.state_dict().items():
            assert torch.equal(weight, ten.regularizers[place].state_dict()[name])


def bounded(memory, tile=None, channels=4):
    torch.manual_seed(0)
    consistency = DataConsistency(1.0, max_iterations=60)
    return MoDL(
        2, channels=channels, n_unrolls=2, memory=memory, tile=tile, contraction=0.5, data_consistency=consistency
    )


@pytest.mark.parametrize("memory", ["store", "checkpoint", "recursive", "invert"])
def test_two_passes_before_one_backward_of_a_contraction(memory):
    """The power iterations of the second pass changed in place what the first pass's recomputation needs."""
    inputs = [example(*SHAPES["2D"][:2], dtype=torch.complex128) for _ in range(2)]
    found = []
    for strategy in ("store", memory):
        net = bounded(strategy, None if strategy == "store" else (8,), channels=40).double()
        loss = sum(net(*some).abs().sum() for some in inputs)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    for expected, gradient in zip(*found, strict=True):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("scale", [0, 1e-12, 1])
def test_faint_data_are_no_drift(scale):
    """Of an input that is next to nothing beside what biases make of it, rounding is more than all of it."""
    net, found = bounded("invert"), {}
    kspace, csm, mask = example(*SHAPES["2D"][:2])
    for memory in ("store", "invert"):
        net.memory = memory
        found[memory] = gradients(net, (kspace * scale, csm, mask))
    assert distance(found["invert"], found["store"]) < 1e-3


def test_a_regulariser_of_ones_own():
    inputs = example(*SHAPES["2D"][:2])
    own = nn.Conv2d(2, 2, 1)
    net = MoDL(2, 2, regularizer=own)
    assert net.regularizers[0].residual is own
    assert all(torch.isfinite(g).all() for g in gradients(net, inputs).values())
    apart = MoDL(2, 2, regularizer=own, shared=False)
    assert apart.regularizers[1].residual is not own


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_image_is_zero_where_no_coil_sees(memory):
    kspace, csm, mask = example((1, 4, 8, 12), (1, 3, 4, 8, 12))
    csm[..., :5] = 0
    csm[:, 1:, ..., 5] = 0  # one coil is enough
    output = network(3, memory=memory)(kspace, csm, mask)
    assert (output[..., :5] == 0).all()
    assert (output[..., 5:] != 0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_averaging_over_phases_makes_the_image_follow_the_phase_of_the_data(shared):
    kspace, csm, mask = example(*SHAPES["slab"][:2])
    plain, turned = (network(3, shared=shared, contraction=2.0, n_turned=n).eval() for n in (0, 3))
    for net, follows in ((plain, False), (turned, True)):
        assert torch.allclose(net(1j * kspace, csm, mask), 1j * net(kspace, csm, mask), atol=1e-5) == follows
    torch.testing.assert_close(turned.train()(kspace, csm, mask), plain.train()(kspace, csm, mask), rtol=0, atol=0)


@torch.no_grad()
def test_the_last_unrolls_alone_are_averaged():
    inputs = example(*SHAPES["2D"][:2])
    runs = []
    for n_turned in range(4):
        net = network(n_turned=n_turned).eval()
        net.regularizers[0].residual[0].register_forward_hook(lambda *_: runs.append(1))
        runs.clear()
        net(*inputs)
        assert len(runs) == 3 + 3 * n_turned


@pytest.mark.parametrize("memory", ["checkpoint", "recursive", "invert"])
def test_averages_are_differentiated_and_inverted(memory):
    inputs = example(*SHAPES["2D"][:2])
    nets = [network(memory=m, n_turned=2).eval() for m in (memory, "store")]
    assert distance(*(gradients(net, inputs) for net in nets)) <= (1e-2 if memory == "invert" else 1e-6)


def test_mu_is_learned_or_fixed():
    inputs = example(*SHAPES["2D"][:2])
    assert gradients(network(), inputs)["data_consistency.log_mu"].abs() > 0
    net = MoDL(2, 1, 4, data_consistency=DataConsistency(mu=0.1, learn_mu=False))
    assert gradients(net, inputs)["data_consistency.log_mu"] is None


def test_without_a_regulariser_it_is_the_regularised_solution():
    kspace, csm, mask = example((1, 4, 4), (1, 2, 4, 4), dtype=torch.complex128)
    net = MoDL(2, 15, 4, data_consistency=DataConsistency(mu=0.05, max_iterations=20)).double()
    for p in net.regularizers.parameters():
        nn.init.zeros_(p)
    operator = SenseOperator(csm, mask)
    image = net(kspace, csm, mask)
    # z = x: the proximal iteration goes to a least-squares solution, where the gradient vanishes
    gradient = operator.adjoint(operator.forward(image) - kspace)
    assert gradient.abs().max() < 1e-3 * operator.adjoint(kspace).abs().max()


def test_autocast_leaves_the_physics_in_float32():
    inputs = example(*SHAPES["2D"][:2])
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(*inputs)
    assert output.dtype == torch.complex64
    output.abs().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_memory_of_checkpoints_grows_by_images_alone():
    inputs = example((1, 16, 16), (1, 2, 16, 16))
    peaks = {}
    for memory in ("store", "checkpoint"):
        for n in (2, 5):
            net = network(n_unrolls=n, memory=memory)
            net.data_consistency.max_iterations = 4

            def run(net=net):
                net(*inputs).abs().sum().backward()

            peaks[memory, n] = peak_live_bytes(run, net.parameters())
    image = 8 * 16 * 16
    assert peaks["checkpoint", 5] - peaks["checkpoint", 2] < 1.1 * 3 * 2 * image
    assert peaks["store", 5] - peaks["store", 2] > 3 * 20 * image


def test_memory_is_switched_by_name_and_survives_a_copy():
    net = set_memory(network(), "invert")
    assert net.memory == "invert" and copy.deepcopy(net).memory == "invert"
    with pytest.raises(ValueError, match="'all'"):
        net.memory = "all"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoDL(n_unrolls=0), "n_unrolls"),
        (lambda: MoDL(every=0), "every"),
        (lambda: MoDL(n_unrolls=4, n_turned=5), "n_turned"),
        (lambda: DataConsistency(mu=0.0), "mu"),
        (lambda: Regularization(nn.Identity(), tile=(4,)), "halo"),
        (lambda: Regularization(nn.BatchNorm2d(2), contraction=0.9), "cannot bound BatchNorm2d"),
        (lambda: MoDL(contraction=0.0), "lipschitz"),
        (lambda: MoDL(regularizer=nn.Conv2d(2, 2, 1), contraction=0.9), "default regulariser"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_papers_network_sees_its_halo_and_no_farther():
    cnn = ResidualCNN(1, 4, 3)
    x = torch.zeros(1, 2, 21, requires_grad=True)
    with torch.no_grad():
        for p in cnn.parameters():
            p.fill_(0.1)
    (gradient,) = torch.autograd.grad(cnn(x)[0, 0, 10], x)
    assert gradient[0, 0].nonzero().flatten().tolist() == list(range(10 - cnn.halo, 10 + cnn.halo + 1))


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_host_memory_under_autocast(memory):
    kspace, csm, mask = example(*SHAPES["2D"][:2])
    net, gradients = network(memory=memory), []
    for net.host in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            image = net(kspace, csm, mask)
        gradients.append(torch.autograd.grad(image.abs().sum(), list(net.parameters())))
    assert all(map(torch.equal, *gradients))

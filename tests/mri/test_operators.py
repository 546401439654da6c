"""The encoding operator: against its definition, its adjoint and its gradients."""

import re

import pytest
import torch

from memnet.accounting.live_memory import peak_live_bytes
from memnet.mri.operators import SenseOperator

CASES = {
    "2D": ((2, 3, 6, 8), (2, 1, 6, 8), (2, 6, 8), 2),
    "2D, odd": ((1, 2, 5, 7), (1, 2, 5, 7), (1, 5, 7), 2),
    "slab": ((1, 2, 3, 4, 5), (1, 1, 1, 4, 5), (1, 3, 4, 5), 2),
    "3D": ((1, 2, 3, 4, 5), (1, 1, 3, 4, 5), (1, 3, 4, 5), 3),
    "movie": ((2, 3, 1, 4, 6), (2, 1, 5, 4, 6), (2, 5, 4, 6), 2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, device):
    csm, mask, image, fft_dims = request.param
    operator = SenseOperator(
        torch.randn(csm, dtype=torch.complex128, device=device), torch.rand(mask, device=device) < 0.6, fft_dims
    )
    return operator, torch.randn(image, dtype=torch.complex128, device=device)


def defined(operator: SenseOperator, image: torch.Tensor) -> torch.Tensor:
    dims = operator.fft_dims
    coils = torch.fft.ifftshift(image[:, None] * operator.csm, dim=dims)
    return operator.mask * torch.fft.fftshift(torch.fft.fftn(coils, dim=dims, norm="ortho"), dim=dims)


def test_forward_is_the_centred_orthonormal_transform_of_the_coil_images(case):
    operator, image = case
    torch.testing.assert_close(operator.forward(image), defined(operator, image))


def test_adjoint_is_adjoint(case):
    operator, image = case
    kspace = torch.randn_like(defined(operator, image))
    left = torch.vdot(kspace.flatten(), operator.forward(image).flatten())
    torch.testing.assert_close(left, torch.vdot(operator.adjoint(kspace).flatten(), image.flatten()))


def test_normal_is_adjoint_of_forward(case):
    operator, image = case
    torch.testing.assert_close(operator.normal(image), operator.adjoint(operator.forward(image)))


@pytest.mark.parametrize("method", ["forward", "adjoint", "normal"])
def test_gradients_are_those_of_finite_differences(case, method):
    operator, image = case
    x = operator.forward(image) if method == "adjoint" else image
    apply = getattr(operator, method)
    assert torch.autograd.gradcheck(apply, x.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: apply(x).abs().square(), x.detach().requires_grad_())


def test_weights_between_zero_and_one_are_a_mask(case):
    operator, image = case
    weights = torch.rand(operator.mask.shape, device=image.device, dtype=torch.float64)
    weighted = SenseOperator(operator.csm, weights, len(operator.fft_dims))
    torch.testing.assert_close(weighted.forward(image), defined(weighted, image))
    torch.testing.assert_close(weighted.normal(image), weighted.adjoint(weighted.forward(image)))


def test_memory_of_the_normal_operator_does_not_grow_with_the_coils():
    image = torch.randn(1, 32, 32, dtype=torch.complex64)
    peaks = {}
    for n_coils in (2, 16):
        operator = SenseOperator(torch.randn(1, n_coils, 32, 32, dtype=torch.complex64), torch.ones(1, 1, 32, 32))
        peaks[n_coils] = peak_live_bytes(lambda operator=operator: operator.normal(image))
    assert peaks[16] == peaks[2] <= 6 * image.nbytes


@pytest.mark.parametrize(
    ("csm", "mask", "fft_dims", "message"),
    [
        (torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4), 2, "complex"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), torch.ones(4, 4), 2, "4 dimensions"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 3, 4, 4), 2, "3 coils"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 4), 3, "fft_dims"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 5), 2, r"\(1, 1, 4, 5\) does not fit"),
        (torch.zeros(3, 2, 4, 4, dtype=torch.complex64), torch.ones(2, 1, 4, 4), 2, r"\(2, 1, 4, 4\) does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(csm, mask, fft_dims, message):
    with pytest.raises(ValueError, match=message):
        SenseOperator(csm, mask, fft_dims)


def test_an_image_of_another_shape_is_refused():
    operator = SenseOperator(torch.zeros(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 4))
    for shape in ((1, 3, 4), (1, 1, 4)):  # a line would be encoded as an image of one line
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            operator.normal(torch.zeros(shape, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("csm", "mask", "shape"),
    [
        ((3, 2, 4, 4), (3, 1, 4, 4), (1, 4, 4)),  # would be three images, the gradient of one
        ((3, 2, 4, 4), (1, 1, 4, 4), (2, 4, 4)),
        ((1, 2, 1, 4, 4), (1, 1, 5, 4, 4), (1, 1, 4, 4)),
        ((1, 2, 1, 4, 4), (1, 1, 5, 4, 4), (1, 8, 4, 4)),
    ],
    ids=["one for three", "two for three", "a frame for five", "eight frames for five"],
)
def test_other_batches_and_frames_are_refused(csm, mask, shape):
    operator = SenseOperator(torch.zeros(csm, dtype=torch.complex64), torch.ones(mask))
    for apply, of in ((operator.normal, shape), (operator.adjoint, (shape[0], 2, *shape[1:]))):
        with pytest.raises(ValueError, match=re.escape(f"got torch.complex64, {of}")):
            apply(torch.zeros(of, dtype=torch.complex64))


def test_maps_of_one_serve_a_batch():
    operator = SenseOperator(torch.randn(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 4))
    images = torch.randn(3, 4, 4, dtype=torch.complex64)
    one_by_one = torch.cat([operator.normal(image[None]) for image in images])
    torch.testing.assert_close(operator.normal(images), one_by_one)


@pytest.mark.parametrize("n_coils", [1, 3])
def test_kspace_of_other_coils_is_refused(n_coils):
    for n_maps in {1, 2} - {n_coils}:
        operator = SenseOperator(torch.zeros(1, n_maps, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 4))
        with pytest.raises(ValueError, match=rf"\(1, {n_coils}, 4, 4\)"):
            operator.adjoint(torch.zeros(1, n_coils, 4, 4, dtype=torch.complex64))

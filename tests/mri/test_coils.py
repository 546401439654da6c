"""Coil maps: those that made the data come back from its centre."""

import pytest
import torch

from memnet.mri.coils import calibration_region, compress_coils, espirit_maps, simulated_maps
from memnet.mri.fourier import image_to_kspace, kspace_to_image
from memnet.mri.operators import SenseOperator


def disc(n_slices: int = 2, size: tuple[int, int] = (40, 36)) -> torch.Tensor:
    y, z = (torch.linspace(-1, 1, n) for n in size)
    image = ((y[:, None] / 0.8) ** 2 + (z / 0.7) ** 2 < 1) * (1 + 0.5 * torch.cos(9 * y)[:, None] * torch.sin(7 * z))
    return image.expand(n_slices, *size)


def example(noise: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = disc()
    csm = simulated_maps((2, 40, 36), 4, torch.Generator().manual_seed(0))
    kspace = image_to_kspace(csm * image, (-2, -1))
    return kspace + noise * torch.randn_like(kspace), csm, image


def test_transform_is_that_of_the_encoding_operator():
    image = torch.randn(1, 3, 5, 6, dtype=torch.complex128)
    operator = SenseOperator(torch.ones(1, 1, 3, 5, 6, dtype=torch.complex128), torch.ones(1, 1, 1, 1, 1))
    torch.testing.assert_close(image_to_kspace(image, (-2, -1)), operator.forward(image)[:, 0])
    torch.testing.assert_close(kspace_to_image(image_to_kspace(image, (-3, -1)), (-3, -1)), image)


def test_simulated_maps_are_smooth_and_normalised():
    csm = simulated_maps((3, 20, 24), 6)
    torch.testing.assert_close(csm.abs().square().sum(0), torch.ones(3, 20, 24))
    assert csm.diff(dim=-1).abs().max() < 0.2
    # every coil sees a region of its own
    assert len({int(c.abs().flatten().argmax()) for c in csm}) == 6


def test_espirit_finds_the_maps_that_made_the_data():
    kspace, csm, image = example()
    found = espirit_maps(kspace, (20, 20))
    inside = image > 0
    agreement = (found.conj() * csm).sum(0).abs()
    assert agreement[inside].min() > 0.99
    torch.testing.assert_close(found.abs().square().sum(0)[inside], torch.ones(int(inside.sum())))
    assert (found.abs().sum(0) == 0)[:, 0, 0].all(), "air at the corner has a map"


def test_espirit_uses_the_calibration_region_alone():
    kspace, _, _ = example()
    cut = torch.zeros_like(kspace)
    cut[..., 10:30, 8:28] = kspace[..., 10:30, 8:28]
    torch.testing.assert_close(espirit_maps(cut, (20, 20)), espirit_maps(kspace, (20, 20)))


def test_phase_of_the_maps_is_smooth():
    kspace, _, image = example()
    found = espirit_maps(kspace, (20, 20))
    both = (image[..., 1:] > 0) & (image[..., :-1] > 0)
    assert (found[..., 1:] - found[..., :-1]).abs().amax(0)[both].max() < 0.2


def test_phase_of_the_maps_does_not_jump_between_slices():
    csm = simulated_maps((6, 40, 36), 4, torch.Generator().manual_seed(0))
    kspace = image_to_kspace(csm * disc(6), (-2, -1))
    found = espirit_maps(kspace, (20, 20))
    assert (found[:, 1:] - found[:, :-1]).abs().amax(0)[:, disc(1)[0] > 0].max() < 0.4


def test_the_strongest_virtual_coil_is_real():
    kspace, _, _ = example()
    turned = compress_coils(kspace[:, :1] * torch.polar(torch.ones(4), torch.arange(4.0)).view(4, 1, 1, 1), 4)
    found = espirit_maps(turned, (24, 24))[0]
    assert found.real.min() > -1e-4 and found.imag.abs().max() < 1e-3


def test_an_empty_slice_has_no_maps():
    kspace = torch.zeros(3, 1, 16, 16, dtype=torch.complex64)
    assert not espirit_maps(kspace, (16, 16)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_data_does_not_matter(scale):
    """Float32 squares neither; a slice that vanishes beside the others has no maps."""
    kspace, _, _ = example()
    torch.testing.assert_close(
        espirit_maps(kspace * scale, (20, 20)), espirit_maps(kspace, (20, 20)), atol=1e-4, rtol=0
    )
    kspace[:, 0] *= 1e-30
    found = espirit_maps(kspace, (20, 20))
    assert not found[:, 0].any() and found[:, 1].any()


def test_maps_need_reference_lines():
    kspace, _, _ = example()
    with pytest.raises(ValueError, match="4 x 20 samples"):
        espirit_maps(kspace, (4, 20))


def test_calibration_region_ends_at_the_first_gap():
    mask = torch.zeros(16, 20, dtype=torch.bool)
    assert calibration_region(mask) == (0, 0)
    mask[4:12, 7:13] = True
    assert calibration_region(mask) == (8, 6)
    mask[:, :] = True
    assert calibration_region(mask) == (16, 20)


def test_compression_keeps_the_energy_and_the_strongest_first():
    basis = torch.randn(6, 2, dtype=torch.complex64)
    kspace = (basis @ torch.randn(2, 60, dtype=torch.complex64)).view(6, 3, 4, 5)
    virtual = compress_coils(kspace, 2)
    torch.testing.assert_close(virtual.abs().square().sum(), kspace.abs().square().sum())
    power = compress_coils(kspace, 6).abs().square().sum((1, 2, 3))
    assert (power.diff() <= 1e-3).all() and power[2:].max() < 1e-4 * power[0]

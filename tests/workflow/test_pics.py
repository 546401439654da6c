"""Reconstructions that learn nothing: ours agrees with SigPy's and BART's, and all beat the zero-filled image."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from memnet.datasets.bart import read_cfl, write_cfl
from memnet.mri.coils import simulated_maps
from memnet.mri.fourier import image_to_kspace, kspace_to_image
from memnet.mri.operators import SenseOperator
from memnet.mri.sampling import golden_ratio_lines, poisson_disc
from memnet.workflow.pics import METHODS, bart_pics, cg_sense, sigpy_pics, zero_filled

bart = pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def example(movie: bool = False) -> Data:
    """Return undersampled k-space, coil maps, mask and image of boxes with a line of noise."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(6, 32, 28)
    image[:, 6:26, 4:24] = 1.0
    for t in range(6):
        image[t, 12:20, 8 + t : 16 + t] = 0.4
    csm = simulated_maps((1, 32, 28) if movie else (6, 32, 28), 4, generator).expand(4, 6, 32, 28)
    random = np.random.RandomState(0)
    if movie:
        mask = torch.from_numpy(golden_ratio_lines(6, 28, 3, 4, random))[None, :, None]
    else:
        mask = torch.from_numpy(poisson_disc((32, 28), 3, 8, random))[None, None]
    noise = 0.01 * torch.randn(4, 6, 32, 28, dtype=torch.complex64, generator=generator)
    kspace = (image_to_kspace(image * csm, (-2, -1)) + noise) * mask
    return kspace, csm, mask, image


def error(found: torch.Tensor, image: torch.Tensor) -> float:
    return float((found - image).norm() / image.norm())


def test_cg_sense_is_where_the_gradient_vanishes() -> None:
    kspace, csm, mask, _ = example()
    x = cg_sense(kspace, csm, mask, 0.05)
    operator = SenseOperator(csm[None], mask[None])
    gradient = operator.normal(x[None]) - operator.adjoint(kspace[None]) + 0.05 * x
    assert gradient.norm() < 1e-4 * x.norm()


def test_zero_filled_is_the_combined_inverse_transform() -> None:
    kspace, csm, mask, _ = example()
    expected = (csm.conj() * kspace_to_image(kspace, (-2, -1))).sum(0)
    torch.testing.assert_close(zero_filled(kspace, csm, mask), expected)


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, table in METHODS.items() for n in table if n != "zero-filled"]
)
def test_each_method_beats_the_zero_filled_image(kind: str, name: str) -> None:
    method = METHODS[kind][name]
    if not method.is_installed:
        pytest.skip(f"{method.needs} is not installed")
    kspace, csm, mask, image = example(kind == "movie")
    found = method.solve(kspace, csm, mask, method.weight)
    assert found.shape == image.shape and found.dtype == torch.complex64
    assert error(found, image) < 0.75 * error(zero_filled(kspace, csm, mask), image)


@bart
@pytest.mark.parametrize("n_slices", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["BART l1-wavelet", "BART TV"])
def test_bart_reconstructs_a_few_slices(name: str, n_slices: int) -> None:
    """Of two to four its wavelets ended in an assertion."""
    method = METHODS["volume"][name]
    kspace, csm, mask, image = (x[..., :n_slices, :, :] for x in example())
    found = method.solve(kspace, csm, mask, method.weight)
    assert error(found, image) < 0.75 * error(zero_filled(kspace, csm, mask), image)


def test_wavelets_of_a_thin_slab_see_its_planes() -> None:
    pytest.importorskip("sigpy", reason="SigPy is not installed")
    kspace, csm, mask, image = example()
    found = sigpy_pics(kspace, csm, mask, 0.01)
    torch.testing.assert_close(found, sigpy_pics(kspace, csm, mask, 0.01, axes=(1, 2)))
    assert error(found, image) < 0.8 * error(sigpy_pics(kspace, csm, mask, 0.01, "l2"), image)


@bart
def test_cg_sense_agrees_on_barts_phantom(tmp_path: Path) -> None:
    size = "24"
    for command in (f"phantom -3 -k -s 4 -x {size} kspace", f"phantom -3 -S 4 -x {size} maps"):
        subprocess.run(["bart", *command.split()], cwd=tmp_path, check=True)
    kspace, maps = (
        torch.from_numpy(read_cfl(tmp_path / name)).movedim(-1, 0).contiguous() for name in ("kspace", "maps")
    )
    csm = maps / maps.abs().square().sum(0).sqrt()
    mask = torch.from_numpy(poisson_disc(kspace.shape[2:], 2.5, 8, np.random.RandomState(0)))[None, None]
    hybrid = kspace_to_image(kspace, (1,))
    reference = zero_filled(hybrid, csm, torch.ones_like(mask)).abs()
    peak = float(reference.max())

    def psnr(image: torch.Tensor) -> float:
        return float(20 * torch.log10(peak / (image.abs() - reference).square().mean().sqrt()))

    ours = psnr(cg_sense(hybrid * mask, csm, mask, 0.01, 100))
    assert psnr(bart_pics(hybrid * mask, csm, mask, 0.01, "Q:{weight}")) == pytest.approx(ours, abs=0.01)
    if METHODS["volume"]["SigPy TV"].is_installed:
        found = sigpy_pics(hybrid * mask, csm, mask, 0.01, "l2")
        assert psnr(found) == pytest.approx(ours, abs=0.01)
    assert ours > psnr(zero_filled(hybrid * mask, csm, mask)) + 3


@bart
@pytest.mark.parametrize("n_slices", [4, 5, 6])
def test_bart_centres_as_we_do(n_slices: int) -> None:
    kspace, csm, mask, _ = (x[:, :n_slices] if x.dim() == 4 else x for x in example())
    expected = cg_sense(kspace, csm, mask, 0.02, 100)
    assert error(bart_pics(kspace, csm, mask, 0.02, "Q:{weight}"), expected) < 1e-2


@bart
def test_what_bart_says_is_passed_on() -> None:
    kspace, csm, mask, _ = example()
    with pytest.raises(ValueError, match="even sides"):
        bart_pics(kspace[..., 1:], csm[..., 1:], mask[..., 1:], 0.01)
    with pytest.raises(ValueError, match="bart pics.* failed"):
        partial(bart_pics, penalty="nonsense")(kspace, csm, mask, 0.01)


def test_cfl_files_come_back_as_they_went(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 1, 4, 2)).astype(np.complex64)
    write_cfl(tmp_path / "scan.v1", array)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scan.v1.cfl", "scan.v1.hdr"]
    np.testing.assert_array_equal(read_cfl(tmp_path / "scan.v1.cfl"), array)
    # the first dimension counts fastest
    assert np.fromfile(tmp_path / "scan.v1.cfl", "<c8")[1] == array[1, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("# Dimensions\n3 2\n", "truncated"), ("", "dimensions"), ("# D\n3 x\n", "'3 x'")],
)
def test_damaged_cfl_files_are_told(content: str | None, message: str, tmp_path: Path) -> None:
    write_cfl(tmp_path / "scan", np.zeros((3, 4)))
    if content is None:
        (tmp_path / "scan.hdr").unlink()
    else:
        (tmp_path / "scan.hdr").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_cfl(tmp_path / "scan")

"""Deformed copies of a diffusion series."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusion_cases import GRIDS, field, positions, write_series
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage

from memnet.cli import main
from memnet.datasets.diffusion_copies import deform
from memnet.datasets.diffusion_files import read_series
from memnet.diffusion.tensors import DiffusionSeries, as_matrices, fit_tensors, predict_signals

grids = pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)


@grids
def test_tensors_predict_the_signals_that_they_were_fitted_to(affine: np.ndarray, tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, affine=affine))
    predicted = predict_signals(fit_tensors(series), series, series.signals[..., 0])
    np.testing.assert_allclose(predicted[series.mask], series.signals[series.mask], rtol=1e-4)


@grids
def test_what_is_turned_turns_with_its_tensors(affine: np.ndarray, tmp_path: Path) -> None:
    """A rotation alone: the copy's tensors are those that a rotation of the analytic field has."""
    series = read_series(write_series(tmp_path, (14, 14, 14), affine=affine, margin=0))
    copy = deform(series, seed=3, rotation=20.0, displacement=0.0, noise=0.0)
    world = positions(series.mask.shape, affine)
    centre = world[series.mask].mean(0)
    turn, error = _turn_between(series, copy, world - centre)
    assert error < 1e-3 and 5 < np.degrees(np.arccos((np.trace(turn) - 1) / 2)) < 40
    found = as_matrices(fit_tensors(copy))
    expected = turn.T @ field(centre + (world - centre) @ turn.T) @ turn
    inner = ndimage.binary_erosion(copy.mask, iterations=3)
    assert inner.sum() > 100
    assert np.abs(found - expected)[inner].max() < 1e-5  # mm^2/s, of an anisotropy of 1.2e-3
    assert np.abs(field(world) - expected)[inner].max() > 2e-4


def _turn_between(series, copy, centred):  # type: ignore[no-untyped-def]
    """Find the rotation by fitting where the copy's voxels come from, shown by positions in place of b = 0."""
    ramps = [deform(_showing(series, centred[..., i]), 3, 20.0, 0.0, noise=0.0).signals[..., 0] for i in range(3)]
    shown = np.stack(ramps, -1) - _OFFSET
    inner = ndimage.binary_erosion(copy.mask, iterations=3)
    solution, *_ = np.linalg.lstsq(centred[inner], shown[inner], rcond=None)
    return solution.T, float(np.abs(solution.T @ solution - np.eye(3)).max())


_OFFSET = 1000.0


def _showing(series, values):  # type: ignore[no-untyped-def]
    scale = (values + _OFFSET)[..., None] / series.signals[..., :1]
    return replace(series, signals=(series.signals * scale).astype(np.float64))


def test_warp_moves_noise_stays_and_seeds_differ(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, (14, 14, 14), noise=20.0))
    first, again, other = (deform(series, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.signals, again.signals)
    both = first.mask & other.mask
    assert np.abs(first.signals - other.signals)[both].mean() > 20
    assert (first.signals >= 0).all()
    residuals = []
    for one in (series, first):
        predicted = predict_signals(fit_tensors(one), one, one.signals[..., 0])
        residuals.append((one.signals - predicted)[one.mask][:, 1:].std())
    assert residuals[1] == pytest.approx(residuals[0], rel=0.35)


def test_command_writes_series_that_can_be_read(tmp_path: Path) -> None:
    data = write_series(tmp_path / "one", (12, 12, 12))
    out = tmp_path / "copies"
    assert main(["diffusion-copies", str(data), "--output_dir", str(out), "--copies", "2", "--seed", "5"]) == 0
    series = read_series(out / "copy001.nii.gz")
    expected = deform(read_series(data).select(), 6)
    np.testing.assert_allclose(series.signals, expected.signals, rtol=1e-6)
    np.testing.assert_array_equal(series.mask, expected.mask)
    np.testing.assert_allclose(series.bvecs, expected.bvecs, atol=1e-6)


def test_command_draws_from_ranges(tmp_path: Path) -> None:
    data = write_series(tmp_path / "one", (12, 12, 12))
    words = ["diffusion-copies", str(data), "--output_dir", str(tmp_path), "--copies", "2", "--noise", "0", "0"]
    assert main([*words, "--voxel_size", "2.5", "3.5", "--margin", "1", "2"]) == 0
    copies = [read_series(tmp_path / f"copy00{i}.nii.gz") for i in range(2)]
    sizes = [float(voxel_sizes(copy.affine)[0]) for copy in copies]
    assert all(2.5 <= size <= 3.5 for size in sizes) and abs(sizes[0] - sizes[1]) > 1e-3
    expected = deform(read_series(data).select(), 1, noise=0.0, voxel_size=sizes[1], margin=1.5)
    np.testing.assert_allclose(copies[1].signals, expected.signals, rtol=1e-4)


def coarse_error(copy: DiffusionSeries) -> float:
    """Return by how much tensors fitted to the copy differ from the analytic field at its voxels, at most, mm^2/s."""
    expected = field(positions(copy.mask.shape, copy.affine))
    inner = ndimage.binary_erosion(copy.mask, iterations=1)
    assert inner.sum() > 20
    return float(np.abs(as_matrices(fit_tensors(copy)) - expected)[inner].max())


@grids
def test_voxels_of_any_size_lie_where_the_content_is(affine: np.ndarray, tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, (14, 14, 14), affine=affine, margin=0))
    copy = deform(series, 0, rotation=0.0, displacement=0.0, noise=0.0, voxel_size=3.0)
    assert copy.mask.shape == (9, 9, 9)
    np.testing.assert_allclose(voxel_sizes(copy.affine), 3)
    corner, expected = (apply_affine(one.affine, [-0.5] * 3) for one in (copy, series))
    np.testing.assert_allclose(corner, expected, atol=1e-9)
    # a shift by half a voxel would make 1e-4
    assert coarse_error(copy) < 4e-5
    assert coarse_error(replace(copy, affine=copy.affine @ from_matvec(np.eye(3), [0.5] * 3))) > 6e-5


def test_signals_of_larger_voxels_are_the_mean_of_those_in_them(tmp_path: Path) -> None:
    """And not the signals of a mean tensor, which are lower."""
    series = read_series(write_series(tmp_path, (12, 12, 12), margin=0))
    copy = deform(series, 0, rotation=0.0, displacement=0.0, noise=0.0, voxel_size=4.0)
    np.testing.assert_allclose(copy.signals, series.coarse(2).signals, rtol=1e-4)


def test_noise_is_a_multiple_of_the_series(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, (14, 14, 14), noise=5.0))
    clean, once, thrice = (deform(series, 0, noise=noise) for noise in (0.0, 1.0, 3.0))
    once, thrice = ((noisy.signals - clean.signals)[clean.mask].std() for noisy in (once, thrice))
    assert thrice == pytest.approx(3 * once, rel=0.05) and 3 < once < 6


def test_margin_moves_the_edge_of_the_brain_and_shows_what_is_there(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, (12, 12, 12), margin=3))
    still = partial(deform, series, 0, rotation=0.0, displacement=0.0, noise=0.0)
    sides = [int(still(margin=margin).mask.any((0, 1)).sum()) for margin in (-2.0, 0.0, 2.0)]
    assert sides == [4, 6, 8]  # of 2 mm
    copy = still()
    shown = copy.signals.any(-1)
    assert shown.sum() == 12**3 - 8  # the corners are farther than 10 mm
    np.testing.assert_allclose(copy.signals[shown], series.signals[shown], rtol=1e-4)
    with pytest.raises(ValueError, match="mask is empty"):
        still(margin=-9.0)


def test_impossible_voxels_are_refused(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path, (12, 12, 12)))
    with pytest.raises(ValueError, match="voxels of .* 2.* mm, of which none of 1.5 mm"):
        deform(series, 0, voxel_size=1.5)
    with pytest.raises(ValueError, match="leave .* of 13 mm"):
        deform(series, 0, voxel_size=13.0)


@pytest.mark.parametrize("words", [["--noise", "-2", "-1"], ["--margin", "3", "-3"], ["--voxel_size", "4", "2"]])
def test_impossible_ranges_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_series(tmp_path / "one", (6, 6, 6))
    assert main(["diffusion-copies", str(data), "--output_dir", str(tmp_path / "out"), *words]) == 1
    assert f"{words[0]} is {words[1]} {words[2]}, expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

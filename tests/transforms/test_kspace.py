"""From raw data to the network's input and back to an image in space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import phantom
from monai.apps.reconstruction.transforms.array import KspaceMask
from monai.data import MetaTensor
from monai.transforms import Transform

from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.mri.coils import compress_coils
from memnet.mri.fourier import image_to_kspace, kspace_to_image
from memnet.mri.operators import SenseOperator
from memnet.mri.sampling import GoldenRatioMask, PoissonDiscMask
from memnet.mri.simulated_scans import simulate_movie, simulate_volume
from memnet.nets.packed import PackedMoDL, unpack
from memnet.transforms.kspace import (
    CombineCoilsd,
    CompressCoilsd,
    EstimateMapsd,
    PackKspaced,
    RandKspaceNoised,
    RandSlabd,
    RandUndersampled,
    ScaleKspaced,
)
from memnet.transforms.kspace_inputs import LoadKspaced, fit_field_of_view
from memnet.transforms.kspace_outputs import CompareMagnitudesd, ToVolumed

AFFINE = np.array([[-0.9, 0, 0, 20], [0, 1.1, 0, -30], [0, 0, 1.3, 5], [0, 0, 0, 1]], dtype=float)


@pytest.fixture
def volume(write_nifti: Callable[..., Path]) -> Path:
    return write_nifti("t1.nii.gz", phantom((12, 20, 18))[0], AFFINE)


@pytest.fixture
def movie(write_nifti: Callable[..., Path]) -> Path:
    frames = np.stack([phantom((20, 18, 3), seed=k)[0] for k in range(5)], -1)
    return write_nifti("cine.nii.gz", frames, AFFINE)


def prepared(path: Path, movie: bool = False, **keywords: Any) -> dict[Any, Any]:
    data = LoadKspaced("image", movie=movie, n_coils=4, **keywords)({"image": str(path)})
    return CombineCoilsd()(EstimateMapsd(12, 5)(CompressCoilsd(n_coils=4)(data)))


def test_reference_of_simulated_raw_data_is_the_magnitude_they_were_made_from(volume: Path) -> None:
    label = prepared(volume, noise=1e-3)["label"].norm(dim=0)
    magnitude = torch.from_numpy(np.asarray(nib.load(volume).dataobj)).clamp_min(0)
    inside = magnitude > 100
    ratio = (label / magnitude)[inside]
    assert ratio.std() < 0.02 * ratio.mean()


def test_simulation_is_the_same_every_time_and_differs_between_files(volume: Path, tmp_path: Path) -> None:
    load = LoadKspaced("image")
    first, again = (load({"image": str(volume)})["kspace"] for _ in range(2))
    other = tmp_path / "other.nii.gz"
    other.write_bytes(volume.read_bytes())
    assert torch.equal(first, again)
    assert not torch.equal(first, load({"image": str(other)})["kspace"])


def test_of_the_first_simulated_scan_it_is_told(volume: Path, movie: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="memnet")
    load = LoadKspaced("image", n_coils=2, noise=0.02)
    for _ in range(2):
        load({"image": str(volume)})
    (told,) = caplog.messages
    assert told.startswith(f"{volume}: ") and "simulated" in told and "2 coils and noise of 0.02" in told
    load = LoadKspaced("image", movie=True, n_coils=2)
    load({"image": str(movie)})
    load({"image": str(movie), "slice_index": 1})
    assert len(caplog.messages) == 2 and "of slice " in caplog.messages[1]


def test_a_simulated_scan_is_planned_around_what_there_is() -> None:
    magnitude = np.zeros((30, 40, 12), np.float32)
    magnitude[5:14, 20:36, 1:12] = 1
    part, affine = fit_field_of_view(magnitude, AFFINE, 2)
    assert part.shape == (16, 24, 12) and part.sum() == magnitude.sum()
    corner = np.argwhere(part > 0).min(0)
    np.testing.assert_allclose(affine @ [*corner, 1], AFFINE @ [5, 20, 1, 1])


def test_noise_is_as_strong_as_asked() -> None:
    magnitude = torch.ones(4, 32, 32)
    noise = simulate_volume(magnitude, 2, 0.1, 3) - simulate_volume(magnitude, 2, 0.0, 3)
    assert noise.real.std() == pytest.approx(0.1, rel=0.05)
    assert noise.imag.std() == pytest.approx(0.1, rel=0.05)


def test_maps_of_a_movie_do_not_move() -> None:
    frames = torch.rand(3, 12, 10) + 0.5
    images = kspace_to_image(simulate_movie(frames, 2, 0.0), (-2, -1))
    ratio = images[0] / images[1]
    torch.testing.assert_close(ratio[0], ratio[2], rtol=1e-3, atol=1e-4)


def test_raw_data_and_simulation_go_the_same_way(volume: Path, tmp_path: Path) -> None:
    data = LoadKspaced("image", n_coils=3)({"image": str(volume)})
    kspace = image_to_kspace(data["kspace"].as_tensor(), (1,)).numpy()[None]
    write_ismrmrd(tmp_path / "raw.h5", kspace, np.ones((1, 20, 18), bool), AFFINE)
    read = LoadKspaced("image")({"image": str(tmp_path / "raw.h5")})
    torch.testing.assert_close(read["kspace"].as_tensor(), data["kspace"].as_tensor(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read["kspace"].affine, data["kspace"].affine, rtol=0, atol=1e-4)
    assert read["mask"].shape == data["mask"].shape == (1, 1, 20, 18)


def test_a_movies_raw_data_and_simulation_go_the_same_way(movie: Path, tmp_path: Path) -> None:
    data = LoadKspaced("image", movie=True, n_coils=3)({"image": str(movie)})
    kspace = data["kspace"].as_tensor().movedim(0, 1).numpy()[..., None]
    write_ismrmrd(tmp_path / "raw.h5", kspace, np.ones((5, 18, 1), bool), AFFINE)
    read = LoadKspaced("image", movie=True)({"image": str(tmp_path / "raw.h5")})
    assert torch.equal(read["kspace"].as_tensor(), data["kspace"].as_tensor())
    assert read["mask"].shape == data["mask"].shape == (1, 5, 1, 18)


@pytest.mark.parametrize("is_movie", [False, True], ids=["volume", "movie"])
def test_zero_filled_image_of_what_is_packed_is_of_order_one(is_movie: bool, request: pytest.FixtureRequest) -> None:
    data = prepared(request.getfixturevalue("movie" if is_movie else "volume"), movie=is_movie)
    mask = GoldenRatioMask([2.0], 4) if is_movie else PoissonDiscMask([2.0], 6)
    packed = PackKspaced()(ScaleKspaced()(RandUndersampled(mask, seed=1)(data)))
    kspace, csm, taken = unpack(packed["image"].as_tensor()[None])
    assert torch.equal((kspace != 0).any(1, keepdim=True), taken > 0)
    assert float(taken.mean()) == pytest.approx(0.5, abs=0.02)
    magnitude = SenseOperator(csm, taken).adjoint(kspace).abs().flatten()
    assert magnitude.quantile(0.99) == pytest.approx(1, rel=1e-2)
    # the reference went along
    assert 0.5 < packed["label"].norm(dim=0).flatten().quantile(0.99) < 3
    output = PackedMoDL(n_unrolls=1, channels=4)(packed["image"][None])
    assert output.shape == (1, 2, *packed["image"].shape[1:]) and output.dtype == torch.float32


def test_maps_of_a_movie_come_from_all_its_frames(movie: Path) -> None:
    data = LoadKspaced("image", movie=True, n_coils=4, noise=0)({"image": str(movie)})
    full = EstimateMapsd(12, 5)(data)["csm"]
    data = RandUndersampled(GoldenRatioMask([2.0], 2), seed=0)(data)
    # no frame alone has reference lines enough
    found = EstimateMapsd(12, 5)(data)["csm"]
    assert found.shape == full.shape == (4, 1, 20, 18)
    shown = (full.abs().sum(0) > 0) & (found.abs().sum(0) > 0)
    assert (found.conj() * full).sum(0).abs()[shown].median() > 0.99


@pytest.mark.parametrize("is_movie", [False, True], ids=["volume", "movie"])
def test_maps_come_of_a_reference_scan_where_the_centre_has_gaps(
    is_movie: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of a scan of three times the signal, which must not become part of the image, in the same virtual coils."""
    source = request.getfixturevalue("movie" if is_movie else "volume")
    data = LoadKspaced("image", movie=is_movie, n_coils=4, noise=0)({"image": str(source)})
    kspace = data["kspace"].as_tensor()
    whole = (kspace.movedim(0, 1)[..., None] if is_movie else image_to_kspace(kspace, (1,))[None]).numpy()
    sampled = np.zeros((whole.shape[0] + 1, *whole.shape[3:]), bool)
    sampled[:, ::2] = sampled[-1] = True
    write_ismrmrd(tmp_path / "raw.h5", np.concatenate([whole, 3 * whole[:1]]), sampled, AFFINE)
    with h5py.File(tmp_path / "raw.h5", "r+") as file:
        rows = file["dataset/data"][()]
        reference = rows["head"]["idx"]["phase"] == whole.shape[0]
        rows["head"]["flags"][reference], rows["head"]["idx"]["phase"][reference] = 1 << 19, 0
        file["dataset/data"][...] = rows
        xml = file["dataset/xml"][0].decode()
        mode = "<parallelImaging><calibrationMode>separate</calibrationMode></parallelImaging></encoding>"
        file["dataset/xml"][0] = xml.replace("</encoding>", mode)
    read = LoadKspaced("image", movie=is_movie)({"image": str(tmp_path / "raw.h5")})
    torch.testing.assert_close(read["kspace"].as_tensor(), kspace * read["mask"], rtol=1e-4, atol=1e-5)
    found = EstimateMapsd(12, 5)(CompressCoilsd(n_coils=4)(read))
    assert "calibration" not in found
    csm, coils = found["csm"], kspace_to_image(compress_coils(kspace, 4, read["kspace"].as_tensor()), (-2, -1))
    combined = (csm.conj() * coils).sum(0)
    assert (coils - csm * combined).norm() < 0.1 * coils.norm()


def test_a_fourth_dimension_of_one_is_no_movie(volume: Path, tmp_path: Path) -> None:
    values = np.asarray(nib.load(volume).dataobj)
    (tmp_path / "again").mkdir()
    nib.save(nib.Nifti1Image(values[..., None], AFFINE), tmp_path / "again" / volume.name)
    load = LoadKspaced("image", n_coils=2)
    again, plain = (load({"image": str(path)})["kspace"] for path in (tmp_path / "again" / volume.name, volume))
    assert torch.equal(again.as_tensor(), plain.as_tensor())


def test_slabs_lie_where_there_is_something() -> None:
    label = torch.zeros(2, 30, 2, 2)
    label[:, 18:20] = 1
    cut = RandSlabd(["label", "csm"], 4).set_random_state(seed=0)
    starts = set()
    for _ in range(20):
        slab = cut({"label": label, "csm": torch.arange(30.0).view(1, 30, 1, 1).expand(3, 30, 2, 2)})
        assert slab["label"].shape == (2, 4, 2, 2) and slab["label"].any()
        starts.add(int(slab["csm"][0, 0, 0, 0]))
    assert starts == {16, 17}


def test_masks_are_drawn_anew_but_for_a_seed(volume: Path) -> None:
    data = prepared(volume)
    random = RandUndersampled(PoissonDiscMask([3.0], 4)).set_random_state(seed=1)
    assert not torch.equal(random(data)["mask"], random(data)["mask"])
    again = RandUndersampled(PoissonDiscMask([3.0], 4)).set_random_state(seed=1)
    random.set_random_state(seed=1)
    assert torch.equal(random(data)["mask"], again(data)["mask"])
    fixed = RandUndersampled(PoissonDiscMask([3.0], 4), seed=2)
    assert torch.equal(fixed(data)["mask"], fixed(data)["mask"])


def test_added_noise_is_in_the_reference_too_and_of_any_strength_up_to_the_largest(volume: Path) -> None:
    data = prepared(volume, noise=0.0)
    data["mask"][..., 0, 0] = False  # a corner that no scan takes
    data = CombineCoilsd()(data)
    random, unit = RandKspaceNoised(0.1).set_random_state(seed=0), float(data["label"].norm(dim=0).quantile(0.99))
    strengths = []
    for _ in range(40):
        noised = random(data)
        added = (noised["kspace"] - data["kspace"]).as_tensor()
        assert not added[..., 0, 0].any()
        torch.testing.assert_close(noised["label"], CombineCoilsd()(noised)["label"], rtol=0, atol=1e-5 * unit)
        strengths.append(float(added[..., 1:, :].real.std()) / unit)
    assert 0 < min(strengths) < 0.01 and 0.09 < max(strengths) < 0.102
    assert torch.equal(
        RandKspaceNoised(0.1).set_random_state(seed=0)(data)["label"], random.set_random_state(seed=0)(data)["label"]
    )
    assert RandKspaceNoised(0.0)(data)["kspace"] is data["kspace"]


def test_output_gets_the_scale_and_place_of_the_raw_data(volume: Path) -> None:
    data = PackKspaced()(ScaleKspaced()(prepared(volume)))
    unscaled = prepared(volume)["label"]
    data["pred"] = data["label"].as_tensor().clone()
    out = ToVolumed("pred", phase=True)(data)
    torch.testing.assert_close(out["pred"].as_tensor()[0], unscaled.as_tensor().norm(dim=0))
    np.testing.assert_allclose(out["pred"].affine, AFFINE)
    torch.testing.assert_close(
        torch.polar(out["pred"].as_tensor(), out["phase"].as_tensor())[0], torch.complex(*unscaled.as_tensor())
    )
    assert ToVolumed("pred", movie=True)(data)["pred"].shape == (12, 20, 18, 1)


def test_compared_magnitudes_are_relative_to_the_reference() -> None:
    label = torch.tensor([3.0, 0, 0]).view(1, 3, 1, 1).repeat(2, 1, 1, 1) * torch.tensor([1, 4 / 3]).view(2, 1, 1, 1)
    out = CompareMagnitudesd()({"pred": label / 2, "label": label})
    assert out["label"].flatten().tolist() == [1, 0, 0] and out["pred"].flatten().tolist() == [0.5, 0, 0]


def test_a_reference_must_be_fully_sampled(volume: Path) -> None:
    data = RandUndersampled(PoissonDiscMask([2.0], 8), seed=0)(LoadKspaced("image")({"image": str(volume)}))
    with pytest.raises(ValueError, match="t1.nii.gz: 50 % of k-space is sampled"):
        CombineCoilsd()(EstimateMapsd(8, 5)(data))


def _reference(mask: torch.Tensor) -> dict[Any, Any]:
    shape = (2, 3, *mask.shape[2:])
    kspace = MetaTensor(torch.randn(shape, dtype=torch.complex64), meta={"filename_or_obj": "scan.h5"})
    return CombineCoilsd()({"kspace": kspace, "csm": torch.ones(shape, dtype=torch.complex64), "mask": mask})


def test_a_reference_may_lack_corners_and_borders_alone(caplog: pytest.LogCaptureFixture) -> None:
    y, z = (torch.arange(n) - n // 2 for n in (31, 40))
    ellipse = (y[:, None] / 15.5) ** 2 + (z / 20) ** 2 <= 1
    padded = torch.zeros(31, 40, dtype=torch.bool)
    padded[2:29, 3:38] = True
    for mask in (ellipse, padded, torch.ones(31, 40, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)):
        _reference(mask[None, None])
    assert not caplog.records
    generator = torch.Generator().manual_seed(0)
    scattered = torch.rand(31, 40, generator=generator) < 0.75
    frames = torch.ones(1, 3, 1, 40, dtype=torch.bool)
    frames[0, 1, 0, 5::8] = False
    for mask in (scattered[None, None], frames):
        with pytest.raises(ValueError, match=r"scan.h5: \d+ % of its ellipse is sampled"):
            _reference(mask)


def test_a_reference_of_partial_fourier_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    combine, half = CombineCoilsd(), torch.ones(1, 1, 32, 40, dtype=torch.bool)
    half[..., :10] = False  # 6/8
    kspace = MetaTensor(torch.randn(2, 1, 32, 40, dtype=torch.complex64), meta={"filename_or_obj": "scan.h5"})
    for _ in range(2):
        combine({"kspace": kspace, "csm": torch.ones(2, 1, 32, 40, dtype=torch.complex64), "mask": half})
    assert [record.getMessage() for record in caplog.records] == [
        "scan.h5: k-space reaches 50 % as far to one side as to the other; the reference is blurred"
    ]


def test_missing_reference_lines_are_named(volume: Path) -> None:
    data = LoadKspaced("image")({"image": str(volume)})
    data["mask"][..., 9, 9] = False
    with pytest.raises(ValueError, match="t1.nii.gz: the centre of k-space .* reference lines"):
        EstimateMapsd()(data)


class _MaskOfAnotherScan(KspaceMask):
    def __init__(self) -> None:
        super().__init__([0.0], [2.0])

    def __call__(self, kspace: torch.Tensor) -> Sequence[torch.Tensor]:
        return kspace, torch.ones(1, 1, 20, 16, dtype=torch.bool)


@pytest.mark.parametrize(
    ("transform", "mask"),
    [
        (RandUndersampled(_MaskOfAnotherScan()), torch.ones(1, 1, 20, 18, dtype=torch.bool)),
        (EstimateMapsd(), torch.ones(1, 1, 20, 16, dtype=torch.bool)),
        (RandUndersampled(PoissonDiscMask([3.0], 4)), torch.ones(1, 1, 20, 16, dtype=torch.bool)),
    ],
    ids=["drawn", "read, for maps", "read, to be drawn from"],
)
def test_a_mask_of_another_shape_than_kspace_is_refused(volume: Path, transform: Transform, mask: torch.Tensor) -> None:
    data = LoadKspaced("image", n_coils=4)({"image": str(volume)}) | {"mask": mask}
    with pytest.raises(ValueError, match=r"t1.nii.gz: .* \(1, 1, 20, 16\), k-space \(4, 12, 20, 18\)"):
        transform(data)


@pytest.mark.parametrize(
    ("name", "is_movie", "message"),
    [("cine", False, "expected a volume"), ("t1", True, "expected a movie"), ("none", False, "no such file")],
)
def test_files_of_the_other_kind_are_refused(
    volume: Path, movie: Path, name: str, is_movie: bool, message: str
) -> None:
    path = volume.with_name(f"{name}.nii.gz")
    with pytest.raises(ValueError, match=f"{name}.nii.gz.*{message}"):
        LoadKspaced("image", movie=is_movie)({"image": str(path)})


def test_raw_data_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    kspace = np.ones((2, 1, 4, 4, 1), np.complex64)
    write_ismrmrd(tmp_path / "raw.h5", kspace, np.ones((2, 4, 1), bool), np.eye(4))
    with pytest.raises(ValueError, match="2 frames and 1 steps along z; expected one 3D volume"):
        LoadKspaced("image")({"image": str(tmp_path / "raw.h5")})


def test_an_empty_image_cannot_be_scanned() -> None:
    with pytest.raises(ValueError, match="nowhere above 0"):
        simulate_volume(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("every", "seed", "told"), [(1, 0, False), (2, 0, True), (2, None, False)])
def test_throwing_away_from_an_undersampled_scan_is_told(every, seed, told, caplog):
    """In inference, which has a seed; what trains was refused before, unless it is fully sampled."""
    mask = torch.zeros(1, 1, 24, 20, dtype=torch.bool)
    mask[..., ::every, :] = True
    kspace = MetaTensor(torch.randn(2, 3, 24, 20, dtype=torch.complex64), meta={"filename_or_obj": "a.h5"})
    undersample = RandUndersampled(PoissonDiscMask([2.0], 6), seed)
    for _ in range(2):
        undersample({"kspace": kspace, "mask": mask})
    assert caplog.text.count("a.h5: 50 % of k-space is sampled, and an acceleration takes more away") == told

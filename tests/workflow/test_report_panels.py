"""The pictures of a report: what is shown of a case, in which colours."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image, ImageColor

from memnet.workflow import report_panels
from memnet.workflow.legends import LEGENDS
from memnet.workflow.report_panels import ComparisonPanel, ImagePanel


@pytest.mark.parametrize("legend", list(LEGENDS))
def test_classes_of_an_evaluation_have_the_colours_of_the_overlay(legend: str) -> None:
    labels = torch.arange(4).repeat_interleave(2).expand(1, 8, 8)[..., None]  # a stripe for each class
    if legend == "tissue":
        masks = torch.cat([labels == value for value in range(4)])
    else:  # TC, WT and ET, one within the other: what is WT alone is oedema, TC without ET the necrotic core
        masks = torch.cat([labels >= value for value in (2, 1, 3)])
    image = MetaTensor(torch.rand(1, 8, 8, 1), meta={"filename_or_obj": "a.nii.gz"})
    panel = ComparisonPanel({"image": "image", "reference": "label"}, legend)
    found = panel({"image": image, "label": masks.float()}).picture
    assert found is not None
    picture = np.asarray(Image.open(BytesIO(found)).convert("RGB")).astype(int)
    # from the lower stripe up, in the right half
    column = picture[::-1, picture.shape[1] * 3 // 4]
    seen = []
    for name, (_, colour) in LEGENDS[legend].classes.items():
        rows = np.flatnonzero((column == ImageColor.getrgb(colour)).all(-1))
        assert len(rows) > len(column) / 8, name
        seen.append(np.median(rows))
    assert seen == sorted(seen)


def test_planes_have_one_scale_and_end_with_the_brain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the network's output and the interpolation know nothing of the grid."""
    monkeypatch.setattr(report_panels, "mark_sides", lambda *_, **__: None)  # no letters beside the brain
    random = torch.Generator().manual_seed(0)
    tensors = (
        torch.rand(3, 6, 12, 12, 3, generator=random) * torch.tensor([1.0, 0.1, 1, 0.1, 0.1, 1])[:, None, None, None]
    )
    brain = torch.zeros(1, 12, 12, 3)
    brain[:, 3:9, 3:9] = 1
    label = MetaTensor(torch.cat([tensors[0], brain]), torch.diag(torch.tensor([2.5, 2.5, 2.5, 1])))
    case = {"cubic": MetaTensor(tensors[1]), "pred": tensors[2], "label": label}
    case["image"] = MetaTensor(torch.zeros(1), meta={"filename_or_obj": "a.nii.gz"})
    entries = {"cubic": "cubic", "prediction": "pred", "reference": "label"}
    found = ComparisonPanel(entries, tensors=True, within="label")(case).picture
    assert found is not None
    picture = np.asarray(Image.open(BytesIO(found)).convert("RGB")).astype(int)
    places = []
    for third in np.array_split(picture[40:], 3, axis=1):
        # what is neither black nor the page, which is bluish
        grey = (np.ptp(third, axis=-1) == 0) & (third[..., 0] > 60)
        places.append([np.ptp(np.flatnonzero(grey.any(axis))) for axis in (0, 1)])
    widths, heights = np.transpose(places)
    assert np.ptp(widths) < 0.15 * widths.mean() and np.ptp(heights) < 0.15 * heights.mean()
    # half of the plane's side
    assert widths.mean() == pytest.approx(picture.shape[1] / 6, rel=0.15)


@pytest.mark.parametrize("movie", [False, True])
def test_a_reconstruction_has_the_shape_and_brightness_of_its_voxels(movie: bool) -> None:
    """The entries know no grid; the image that they came of does, of a movie that of the two planes' axes."""
    sides = [2.0, 1.0, 5.0] if movie else [5.0, 2.0, 1.0]
    image = MetaTensor(torch.zeros(1, 3, 20, 20), torch.diag(torch.tensor([*sides, 1.0])))
    image.meta["filename_or_obj"] = "a.h5"
    label = torch.ones(1, 3, 20, 20)
    case = {"image": image, "label": label, "pred": label / 2}
    found = ComparisonPanel({"reconstructed": "pred", "reference": "label"}, axis=1, movie=movie)(case).picture
    assert found is not None
    picture = np.asarray(Image.open(BytesIO(found)).convert("RGB")).astype(int)[40:]
    halves = np.array_split(picture, 2, axis=1)
    for half, brightness in zip(halves, (127, 255), strict=True):
        shown = abs(half[..., 0] - brightness) < 3
        width, height = (np.ptp(np.flatnonzero(shown.any(axis))) for axis in (0, 1))
        assert width / height == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("affine", "axis", "movie", "sides"),
    [
        (np.diag([-1.0, 1, 1, 1]), 3, False, ("R", "L")),
        (np.diag([1.0, 1, 2, 1]), 3, False, ("L", "R")),
        (np.array([[0.0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), 1, False, ("I", "S")),
        (np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]), 1, True, ("A", "P")),
        (np.eye(4), 3, False, ("", "")),  # of which nothing is known
    ],
)
def test_sides_of_a_plane_are_named(
    affine: np.ndarray, axis: int, movie: bool, sides: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report_panels, "_png", lambda figure: figures.append(figure) or b"")
    image = MetaTensor(torch.rand(1, 4, 4, 4), torch.from_numpy(affine), meta={"filename_or_obj": "a.nii.gz"})
    ComparisonPanel({"image": "image"}, axis=axis, movie=movie)({"image": image})
    assert [text.get_text() for text in figures[0].axes[0].texts] == list(sides)
    assert figures[0].axes[0].texts[0].get_position()[0] < 0.5


def test_sides_of_a_saved_image_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report_panels, "_png", lambda figure: figures.append(figure) or b"")
    file = tmp_path / "image.nii.gz"
    affine = np.array([[0.0, -2, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # up, left, front
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), dtype=np.float32), affine), file)
    pred = MetaTensor(torch.ones(1), meta={"filename_or_obj": "a.h5", "saved_to": str(file)})
    ImagePanel()({"pred": pred})
    named = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figures[0].axes}
    assert named == {
        "first and second axis": ["I", "S"],
        "first and third axis": ["I", "S"],
        "second and third axis": ["R", "L"],
    }

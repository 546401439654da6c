"""The picture of a label map over its scan, and tissue volumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import phantom
from matplotlib.image import imread

from memnet.workflow.legends import LEGENDS, Legend
from memnet.workflow.metrics import label_volumes
from memnet.workflow.overlay import draw_overlay, overlay_figure
from memnet.workflow.reporting import middle_planes

TISSUE = LEGENDS["tissue"]


def test_volumes_are_in_millilitres() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[0] = 1
    labels[1, :5] = 3
    volumes = label_volumes(labels, np.diag([2.0, -1.0, 5.0, 1.0]), LEGENDS["tissue"].volumes)
    assert volumes == pytest.approx({"CSF": 1.0, "GM": 0.0, "WM": 0.5})


def test_enhancing_tumour_is_three_or_four() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[0], labels[1], labels[2] = 1, 2, 4
    volumes = label_volumes(labels, np.eye(4), LEGENDS["tumor"].volumes)
    assert volumes == pytest.approx({"whole tumour": 0.3, "core": 0.2, "enhancing": 0.1})
    labels[2] = 3
    assert label_volumes(labels, np.eye(4), LEGENDS["tumor"].volumes) == volumes


@pytest.mark.parametrize("enhancing", [3, 4])
def test_lesion_is_drawn_in_its_brain(enhancing: int, write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    flair = phantom((60, 60, 60))[0]
    labels = np.zeros(flair.shape, np.uint8)
    labels[36:46, 30:40, 30:40] = 2
    labels[39:43, 33:37, 33:37] = enhancing
    files = write_nifti("flair.nii", flair), write_nifti("l.nii", labels)
    draw_overlay(*files, tmp_path / "o.png", LEGENDS["tumor"])
    picture = imread(tmp_path / "o.png")[..., :3]
    lower = picture[picture.shape[0] // 2 : int(0.9 * picture.shape[0]), : picture.shape[1] // 3]
    blue = lower[..., 2] - lower[..., 0] > 0.15
    orange = lower[..., 0] - lower[..., 2] > 0.15
    # the picture shows the whole brain, the lesion on its right, which is the patient's right
    assert 0.02 < blue.mean() < 0.2 and 0.1 < orange.sum() / blue.sum() < 0.5
    assert np.nonzero(blue)[1].mean() > 0.52 * lower.shape[1]


@pytest.mark.parametrize("affine", [np.diag([1.0, 1, 1, 1]), np.diag([-1.0, -1, 1, 1])], ids=["RAS", "LPS"])
def test_left_is_left(affine: np.ndarray, write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    t1, _, _ = phantom((40, 40, 40))
    # grey matter on the patient's left alone, white on the right
    left = np.arange(40)[:, None, None] * affine[0, 0] < 19.5 * affine[0, 0]
    labels = np.where(t1 > 0, np.where(left, 2, 3), 0).astype(np.uint8)
    draw_overlay(write_nifti("t1.nii", t1, affine), write_nifti("l.nii", labels, affine), tmp_path / "o.png", TISSUE)
    picture = imread(tmp_path / "o.png")[..., :3]
    lower = picture[picture.shape[0] // 2 : int(0.9 * picture.shape[0]), : picture.shape[1] // 3]

    blue = lower[..., 2] / (lower[..., 0] + 1e-3)
    coloured = lower[..., 0] - lower[..., 2] > 0.1
    columns = np.arange(lower.shape[1])[None].repeat(lower.shape[0], 0)
    # orange (GM) has far less blue to its red than pale yellow (WM)
    assert columns[coloured & (blue < 0.55)].mean() < columns[coloured & (blue > 0.6)].mean()


@pytest.mark.parametrize("legend", LEGENDS.values(), ids=LEGENDS)
def test_nothing_labelled_is_drawn_as_well(legend: Legend, write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    t1 = phantom()[0]
    labels = write_nifti("l.nii", np.zeros(t1.shape, np.uint8))
    draw_overlay(write_nifti("t1.nii", t1), labels, tmp_path / "o.png", legend)
    assert [p.name for p in tmp_path.glob("*o.png")] == ["o.png"]


def test_planes_for_tensorboard() -> None:
    case = {"image": torch.stack([torch.zeros(4, 6, 8), torch.rand(4, 6, 8)]), "pred": torch.eye(4)[..., None, None]}
    case["pred"] = case["pred"].expand(4, 4, 1, 8)
    images, predictions = middle_planes("image", "pred")([case])
    assert images[0].shape == (1, 6, 4) and images[0].any()
    assert predictions[0].flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    nested = torch.tensor([1.0, 1, 0]).reshape(3, 1, 1, 1)
    assert middle_planes("pred")([{"pred": nested}])[0].item() == pytest.approx(2 / 3)
    tumour = torch.zeros(3, 4, 6, 8)
    tumour[:2, 1, 2, 1:4] = 1
    case = {"image": torch.rand(2, 4, 6, 8), "label": tumour, "pred": torch.zeros(3, 4, 6, 8)}
    images, labels = middle_planes("image", "label")([case])
    assert torch.equal(images[0][0], case["image"][0, ..., 2].T.flip(0)) and labels[0].sum() == pytest.approx(2 / 3)
    four = torch.stack([torch.zeros(4, 6, 8), *torch.rand(3, 4, 6, 8)])
    assert torch.equal(middle_planes("image")([{"image": four}])[0][0], four[1, ..., 4].T.flip(0))


def test_small_volumes_are_not_called_none(write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    """A lesion of half a millilitre was "0 ml"."""
    t1, values = phantom()[0], np.zeros(phantom()[0].shape, np.uint8)
    values.flat[:448] = 2  # voxels of 1 mm
    figure = overlay_figure(write_nifti("t1.nii", t1), write_nifti("l.nii", values), LEGENDS["tumor"])
    told = [text.get_text().split("   ") for text in figure.legends[0].get_texts()]
    assert ["oedema", "0.45 ml"] in told and [volume for _, volume in told].count("0 ml") == 2

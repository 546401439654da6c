"""The picture of a label map over its scan, and tissue volumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import phantom
from matplotlib.image import imread

from memnet.metrics import tissue_volumes
from memnet.overlay import draw_overlay
from memnet.reporting import middle_planes


def test_volumes_are_in_millilitres() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[0] = 1
    labels[1, :5] = 3
    volumes = tissue_volumes(labels, np.diag([2.0, -1.0, 5.0, 1.0]))
    assert volumes == pytest.approx({"CSF": 1.0, "GM": 0.0, "WM": 0.5})


@pytest.mark.parametrize("affine", [np.diag([1.0, 1, 1, 1]), np.diag([-1.0, -1, 1, 1])], ids=["RAS", "LPS"])
def test_left_is_left(affine: np.ndarray, write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    t1, _, _ = phantom((40, 40, 40))
    # grey matter on the patient's left alone, white on the right
    left = np.arange(40)[:, None, None] * affine[0, 0] < 19.5 * affine[0, 0]
    labels = np.where(t1 > 0, np.where(left, 2, 3), 0).astype(np.uint8)
    draw_overlay(write_nifti("t1.nii", t1, affine), write_nifti("l.nii", labels, affine), tmp_path / "o.png")
    picture = imread(tmp_path / "o.png")[..., :3]
    lower = picture[picture.shape[0] // 2 : int(0.9 * picture.shape[0]), : picture.shape[1] // 3]

    blue = lower[..., 2] / (lower[..., 0] + 1e-3)
    coloured = lower[..., 0] - lower[..., 2] > 0.1
    columns = np.arange(lower.shape[1])[None].repeat(lower.shape[0], 0)
    # orange (GM) has far less blue to its red than pale yellow (WM)
    assert columns[coloured & (blue < 0.55)].mean() < columns[coloured & (blue > 0.6)].mean()


def test_no_tissue_is_drawn_as_well(write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    t1 = phantom()[0]
    draw_overlay(write_nifti("t1.nii", t1), write_nifti("l.nii", np.zeros(t1.shape, np.uint8)), tmp_path / "o.png")
    assert [p.name for p in tmp_path.glob("*o.png")] == ["o.png"]


def test_planes_for_tensorboard() -> None:
    case = {"image": torch.stack([torch.zeros(4, 6, 8), torch.rand(4, 6, 8)]), "pred": torch.eye(4).reshape(4, 4, 1, 1)}
    images, predictions = middle_planes("image", "pred")([case])
    assert images[0].shape == (1, 6, 4) and images[0].any()
    assert predictions[0].flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])

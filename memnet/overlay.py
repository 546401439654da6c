"""Draws a label map over its scan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from memnet.metrics import tissue_volumes
from memnet.transforms.labels import TISSUES

__all__ = ["TISSUE_COLOURS", "draw_overlay"]

# apart for the colour-blind and on grey: blue, orange, pale yellow
TISSUE_COLOURS = {"CSF": "#3b8fd4", "GM": "#e8743b", "WM": "#f6e8a6"}
_BACKGROUND = "#101216"
_MARGIN_MM = 12.0


def draw_overlay(scan: str | Path, labels: str | Path, target: str | Path) -> None:
    """Draw axial, coronal and sagittal planes of a scan, alone above and with its tissue labels below.

    The planes pass through the middle of the labelled tissue, left is left, and the legend gives volumes in ml.

    Args:
        scan: the 3D image that was segmented.
        labels: its label map on the same grid, 1 CSF, 2 GM, 3 WM.
        target: PNG file to write; complete or absent.
    """
    # here, since drawing is optional and the import slow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    image, tissue, affine = _canonical(scan), _canonical(labels), nib.load(labels).affine
    voxel = np.array(tissue.header.get_zooms()[:3], dtype=float)
    segmentation = np.asarray(tissue.dataobj).reshape(tissue.shape[:3]).astype(np.uint8)
    intensities = np.asarray(image.dataobj, dtype=np.float32).reshape(segmentation.shape)
    window = np.percentile(intensities[intensities > intensities.min()], (0.5, 99.5))
    middle, box = _middle_and_box(segmentation if segmentation.any() else intensities > window.mean(), voxel)

    planes = []
    for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        shown = [a for a in range(3) if a != axis]
        region = tuple(middle[a] if a == axis else box[a] for a in range(3))
        sides = [len(range(*box[a].indices(segmentation.shape[a]))) * voxel[a] for a in shown]
        planes.append((name, region, sides))
    widths = [sides[0] for _, _, sides in planes]
    height = max(sides[1] for _, _, sides in planes)

    figure = Figure(figsize=(13, 13 * 2 * height / sum(widths) + 1.4), facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 3, width_ratios=widths, left=0.01, right=0.99, top=0.93, bottom=0.09, wspace=0.02, hspace=0.02
    )
    colours = ListedColormap([TISSUE_COLOURS[name] for name in TISSUES])
    for row in range(2):
        for column, (name, region, sides) in enumerate(planes):
            axes = figure.add_subplot(grid[row, column])
            axes.set_axis_off()
            frame: dict[str, Any] = {"origin": "lower", "extent": (0, sides[0], 0, sides[1])}
            axes.imshow(
                intensities[region].T, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear", **frame
            )
            if row == 1:
                part = np.ma.masked_equal(segmentation[region].T, 0)
                axes.imshow(part, cmap=colours, vmin=0.5, vmax=3.5, alpha=0.6, interpolation="nearest", **frame)
            else:
                axes.set_title(name, color="white", fontsize=13, pad=6)
            ends = ("A", "P") if name == "sagittal" else ("R", "L")
            # canonical axes grow to the right, to the front and up
            for text, x, side in ((ends[1], 0.02, "left"), (ends[0], 0.98, "right")):
                axes.text(x, 0.5, text, color="#b8c0cc", fontsize=11, ha=side, va="center", transform=axes.transAxes)
    volumes = tissue_volumes(segmentation, affine)
    handles = [Patch(color=TISSUE_COLOURS[name], label=f"{name}   {volumes[name]:.0f} ml") for name in TISSUES]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=3,
        frameon=False,
        labelcolor="white",
        fontsize=14,
        bbox_to_anchor=(0.5, 0.015),
    )
    figure.suptitle(Path(scan).name, color="#b8c0cc", fontsize=11, x=0.012, y=0.985, ha="left")

    target = Path(target)
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        figure.savefig(partial, dpi=110, facecolor=_BACKGROUND, format="png")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _canonical(path: str | Path) -> Any:
    return nib.funcs.as_closest_canonical(nib.funcs.squeeze_image(nib.load(path)))


def _middle_and_box(mask: np.ndarray, voxel: np.ndarray) -> tuple[list[int], list[slice]]:
    """Return the median voxel of a mask and its bounding box, grown by a margin."""
    middle, box = [], []
    for axis in range(3):
        profile = mask.sum(tuple(a for a in range(3) if a != axis))
        inside = np.flatnonzero(profile)
        middle.append(int(np.searchsorted(profile.cumsum(), profile.sum() / 2)))
        margin = int(np.ceil(_MARGIN_MM / voxel[axis]))
        box.append(slice(max(0, int(inside[0]) - margin), min(mask.shape[axis], int(inside[-1]) + margin + 1)))
    # a little off the midline, where a sagittal plane shows more than the fissure
    middle[0] = min(mask.shape[0] - 1, middle[0] + int(round(9 / voxel[0])))
    return middle, box

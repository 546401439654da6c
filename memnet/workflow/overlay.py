"""Draws a label map over its scan."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from memnet.dicom import split_uid
from memnet.transforms.volumes import read_volume
from memnet.whole_files import whole_file
from memnet.workflow.legends import Legend
from memnet.workflow.metrics import label_volumes

__all__ = ["draw_overlay", "mark_sides", "overlay_figure", "write_png"]

_BACKGROUND = "#101216"
_MARGIN_MM = 12.0


def draw_overlay(scan: str | Path, labels: str | Path, target: str | Path, legend: Legend) -> None:
    """Write :func:`overlay_figure` as a PNG file, complete or absent."""
    figure = overlay_figure(scan, labels, legend)
    with whole_file(target) as partial:
        write_png(figure, partial, 110)


def write_png(figure: Any, target: Path | BytesIO, dpi: int) -> None:
    """Write a figure on its own background; a file's name in an alphabet that the font lacks is no one's concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(target, dpi=dpi, facecolor=figure.get_facecolor(), format="png")


def overlay_figure(scan: str | Path, labels: str | Path, legend: Legend) -> Any:
    """Draw axial, coronal and sagittal planes of a scan, alone above and with its labels below.

    The planes pass through the middle of what is labelled, left is left, and the legend gives volumes in ml.

    Args:
        scan: the 3D image that was segmented, see :func:`memnet.transforms.volumes.read_volume`.
        labels: its label map on the same grid.
        legend: what the labels are.

    Returns:
        A figure of matplotlib.
    """
    # here, since drawing is optional and the import slow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    volume, segmented = read_volume(scan, constant=True), nib.squeeze_image(nib.load(labels))
    affine = segmented.affine
    image = nib.as_closest_canonical(nib.Nifti1Image(volume[0].numpy(), volume.affine.numpy()))
    label_map = nib.as_closest_canonical(segmented)
    voxel = np.array(label_map.header.get_zooms()[:3], dtype=float)
    values = np.asarray(label_map.dataobj).reshape(label_map.shape[:3]).astype(np.uint8)
    # classes by their place in the legend, so that a colour map counts them
    segmentation = np.zeros_like(values)
    for place, (of_class, _) in enumerate(legend.classes.values(), 1):
        segmentation[np.isin(values, of_class)] = place
    intensities = np.asarray(image.dataobj, dtype=np.float32).reshape(segmentation.shape)
    window = np.percentile(intensities[intensities > intensities.min()], (0.5, 99.5))
    found = segmentation > 0 if segmentation.any() else intensities > window.mean()
    middle, box = _middle(found), _box(intensities > window[0] if legend.is_lesion else found, voxel)
    if not legend.is_lesion:
        # a little off the midline, where a sagittal plane shows more than the fissure
        middle[0] = min(found.shape[0] - 1, middle[0] + int(round(9 / voxel[0])))

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
    colours = ListedColormap([colour for _, colour in legend.classes.values()])
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
                axes.imshow(
                    part, cmap=colours, vmin=0.5, vmax=colours.N + 0.5, alpha=0.6, interpolation="nearest", **frame
                )
            else:
                axes.set_title(name, color="white", fontsize=13, pad=6)
            ends = ("A", "P") if name == "sagittal" else ("R", "L")
            # canonical axes grow to the right, to the front and up
            mark_sides(axes, ends[1], ends[0])
    volumes = label_volumes(values, affine, {name: of_class for name, (of_class, _) in legend.classes.items()})
    handles = [
        Patch(color=c, label=f"{name}   {_millilitres(volumes[name])}") for name, (_, c) in legend.classes.items()
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=3,
        frameon=False,
        labelcolor="white",
        fontsize=14,
        bbox_to_anchor=(0.5, 0.015),
    )
    figure.suptitle(split_uid(scan)[0].name, color="#b8c0cc", fontsize=11, x=0.012, y=0.985, ha="left")
    return figure


def _millilitres(volume: float) -> str:
    return f"{volume:.0f} ml" if volume >= 9.5 or volume == 0 else f"{volume:.2g} ml"


def mark_sides(axes: Any, left: str, right: str, fontsize: int = 12) -> None:
    """Write at a plane's sides where in the body they are, such as ``L`` and ``R``."""
    from matplotlib.patheffects import withStroke

    for text, x, side in ((left, 0.02, "left"), (right, 0.98, "right")):
        letter = axes.text(
            x, 0.5, text, color="white", fontsize=fontsize, ha=side, va="center", transform=axes.transAxes
        )
        letter.set_path_effects([withStroke(linewidth=2.5, foreground="black")])


def _profiles(mask: np.ndarray) -> list[np.ndarray]:
    return [mask.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]


def _middle(mask: np.ndarray) -> list[int]:
    """Return the median voxel of a mask."""
    return [int(np.searchsorted(profile.cumsum(), profile.sum() / 2)) for profile in _profiles(mask)]


def _box(mask: np.ndarray, voxel: np.ndarray) -> list[slice]:
    """Return the bounding box of a mask, grown by a margin."""
    box = []
    for axis, profile in enumerate(_profiles(mask)):
        inside = np.flatnonzero(profile)
        margin = int(np.ceil(_MARGIN_MM / voxel[axis]))
        box.append(slice(max(0, int(inside[0]) - margin), min(mask.shape[axis], int(inside[-1]) + margin + 1)))
    return box

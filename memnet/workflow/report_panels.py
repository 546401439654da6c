"""What a report shows of each case: its numbers and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

from memnet.dicom import split_uid
from memnet.diffusion.tensors import fractional_anisotropy
from memnet.workflow.legends import LEGENDS
from memnet.workflow.metrics import label_volumes
from memnet.workflow.overlay import mark_sides, overlay_figure, write_png
from memnet.workflow.reporting import class_map, first_filled, shown_plane

__all__ = ["ComparisonPanel", "ImagePanel", "LabelPanel", "ReportedCase", "TensorPanel"]

_BACKGROUND, _DPI = "#101216", 100
_WIDTH, _NARROWEST, _TALLEST = 2.6, 1.7, 6.0  # of a plane on average, with its title at least, at most; inches
# without the background, which is not shown; one plane alike for people who are colour-blind, see memnet.workflow.legends
_COLOURS = ("#3b8fd4", "#e8743b", "#f6e8a6", "#9fd356", "#c77dd1")

Case = Mapping[str, Any]


class _Plane(NamedTuple):
    """Values ``(up, right)``, the sides of a pixel to the right and up, and where in the body left and right are."""

    values: np.ndarray
    pixel: tuple[float, float]
    ends: tuple[str, str] = ("", "")


@dataclass
class ReportedCase:
    """A case of a report.

    Args:
        source: its input.
        numbers: its row of the table, by the columns' names.
        picture: a PNG file's content, if there is one to show.
        shows: what the picture shows, in words.
    """

    source: str
    numbers: dict[str, str | float] = field(default_factory=dict)
    picture: bytes | None = None
    shows: str = ""


class LabelPanel:
    """A label map's volumes, and its overlay on three planes of the scan.

    Args:
        legend: name of one of :data:`memnet.workflow.legends.LEGENDS`.
    """

    def __init__(self, legend: str) -> None:
        self.legend = LEGENDS[legend]

    def __call__(self, case: Case, draw: bool = True) -> ReportedCase:
        """Report a case whose label map was saved with ``savepath_in_metadict``; the picture if asked."""
        meta = case["pred"].meta
        labels = nib.load(meta["saved_to"])
        volumes = label_volumes(np.asarray(labels.dataobj), labels.affine, self.legend.volumes)
        numbers: dict[str, str | float] = {f"{name} [ml]": volume for name, volume in volumes.items()}
        beside = {"read beside it": meta["beside"]} if meta.get("beside") else {}
        found = ReportedCase(_source(meta), {**beside, "label map": Path(meta["saved_to"]).name, **numbers})
        if draw:
            figure = overlay_figure(meta.get("shown", meta["filename_or_obj"]), meta["saved_to"], self.legend)
            found.picture = _png(figure, 80)
            shown = Path(str(split_uid(meta["shown"])[0])).name if "shown" in meta else ""
            found.shows = f"axial, coronal and sagittal planes{f' of {shown}' * bool(shown)}, "
            found.shows += f"with {', '.join(self.legend.classes)} below"
        return found


class ImagePanel:
    """A saved image's size and range, and its middle planes; of a movie its first and middle frame and a line in time.

    Args:
        key: the entry that was saved with ``savepath_in_metadict``.
    """

    def __init__(self, key: str = "pred") -> None:
        self.key = key

    def __call__(self, case: Case, draw: bool = True) -> ReportedCase:
        """Report a case; the picture if asked."""
        meta = case[self.key].meta
        image = nib.load(meta["saved_to"])
        values = np.asarray(image.dataobj, dtype=np.float32)
        found = ReportedCase(_source(meta), {"image": Path(meta["saved_to"]).name, **_size(image)})
        found.numbers |= {name: float(getattr(values, name)()) for name in ("min", "mean", "max")}
        if "sampled" in meta:
            found.numbers |= {"k-space [%]": 100 * float(meta["sampled"])}
            found.numbers |= {"raw data": "simulated from magnitudes" if meta.get("is_simulated") else "as read"}
        if draw:
            _draw(found, _planes(values, image), float(np.percentile(values, 99.5)))
        return found


class TensorPanel:
    """A tensor image's size, mean diffusivity and anisotropy in the brain, and the panel that was drawn of it, or its FA.

    Args:
        image_key: the entry whose metadata :class:`memnet.transforms.tensor_outputs.SaveTensorsd` has completed.
    """

    def __init__(self, image_key: str = "image") -> None:
        self.image_key = image_key

    def __call__(self, case: Case, draw: bool = True) -> ReportedCase:
        """Report a case; the picture if asked."""
        meta = case[self.image_key].meta
        saved = Path(meta["saved_to"])
        maps = {
            kind: nib.load(saved.with_name(saved.name.replace("_tensor.nii", f"_{kind}.nii"))) for kind in ("md", "fa")
        }
        md, fa = (np.asarray(image.dataobj, dtype=np.float32) for image in maps.values())
        brain = md != 0
        means = {"MD [1e-3 mm2/s]": 1e3 * md[brain].mean(), "FA": fa[brain].mean()} if brain.any() else {}
        found = ReportedCase(_source(meta), {"tensors": saved.name, **_size(maps["fa"])})
        found.numbers |= {f"mean {name}": float(mean) for name, mean in means.items()}
        if draw and "panel" in meta:
            found.picture, found.shows = Path(meta["panel"]).read_bytes(), "MD, FA and colour FA of each method"
        elif draw:
            _draw(found, _planes(fa, maps["fa"]), 0.8)
            found.shows = f"FA: {found.shows}"
        return found


class ComparisonPanel:
    """A plane of a prediction and of what it is compared with: through the labels, see :func:`shown_plane`.

    Args:
        entries: titles and the entries ``(C, D, H, W)`` that they name. Of images the first channel is shown, of one-hot
            classes, and of regions one within the other, each in a colour.
        legend: name of one of :data:`memnet.workflow.legends.LEGENDS`, whose classes, in their order, are those after the
            background.
        axis: the dimension across which the planes lie: 3 is axial in RAS, 1 the slices or frames of a reconstruction.
        tensors: the entries are diffusion tensors; their fractional anisotropy is shown.
        within: an entry on the same grid whose last channel is above 0 where planes are to be shown; everywhere if ``None``.
        movie: the entries' first dimension is time, and the image's affine is of the two others.

    Images are shown at the brightness of the last of them.
    """

    def __init__(
        self,
        entries: Mapping[str, str],
        legend: str | None = None,
        axis: int = 3,
        tensors: bool = False,
        within: str | None = None,
        movie: bool = False,
    ) -> None:
        self.entries, self.axis, self.tensors, self.within = dict(entries), axis, tensors, within
        self.movie = movie
        classes = LEGENDS[legend].classes if legend else {}
        self.colours = {name: colour for name, (_, colour) in classes.items()}

    def __call__(self, case: Case, draw: bool = True) -> ReportedCase:
        """Report a case of an evaluation, whose numbers its metrics have; the picture if asked."""
        found = ReportedCase(_source(case["image"].meta))
        if draw:
            entries = [case[key] for key in self.entries.values()]
            inside = None if self.within is None else torch.as_tensor(case[self.within])[-1:] > 0
            # what a network or an interpolation gives may know nothing of the grid that all are on
            affines = (_affine(x) for x in (*entries, case["image"]))
            affine = next((affine for affine in affines if not np.allclose(affine, np.eye(4))), None)
            sides = np.linalg.norm((np.eye(4) if affine is None else affine)[:3, :3], axis=0).tolist()
            ends = [("", "")] * 3 if affine is None else _ends(affine)
            if self.movie:
                sides, ends = [1.0, *sides[:2]], [("", ""), *ends[:2]]
            place = shown_plane(entries, self.axis)
            planes = [self._plane(x, inside, place) for x in entries]
            images = [plane for plane in planes if not np.issubdtype(plane.dtype, np.integer)]
            white = 0.8 if self.tensors else float(np.percentile(images[-1], 99.5)) if images else 1.0
            right, up = (axis for axis in range(3) if axis != self.axis - 1)
            shown = {
                title: _Plane(
                    plane if np.issubdtype(plane.dtype, np.integer) else plane / (white or 1),
                    (sides[right], sides[up]),
                    ends[right],
                )
                for title, plane in zip(self.entries, planes, strict=True)
            }
            found.picture = _png(_row(shown, self.colours))
            found.shows = ("FA: " if self.tensors else "") + ", ".join(shown)
        return found

    def _plane(self, volume: Any, inside: torch.Tensor | None, place: int) -> np.ndarray:
        values = torch.as_tensor(volume).detach().float().cpu()
        if inside is not None:
            values = values * inside.cpu()
        middle = values.select(self.axis, place)
        if self.tensors:
            plane = fractional_anisotropy(np.moveaxis(middle[:6].numpy(), 0, -1))
        elif (classes := class_map(middle)[0]) is not None:
            plane = classes.numpy().astype(np.uint8)
        else:
            plane = first_filled(middle).numpy()
        return plane.T


def _affine(volume: Any) -> np.ndarray:
    affine = getattr(volume, "affine", None)
    return np.eye(4) if affine is None else np.asarray(affine)


def _ends(affine: np.ndarray) -> list[tuple[str, str]]:
    """Return for each axis where in the body it begins and ends, as letters."""
    begins, grows = (nib.aff2axcodes(affine, labels) for labels in (("RL", "AP", "SI"), ("LR", "PA", "IS")))
    return list(zip(begins, grows, strict=True))


def _source(meta: Mapping[str, Any]) -> str:
    path, uid = split_uid(meta["filename_or_obj"])
    return f"{path}:{uid}" if uid and path.is_dir() else str(path)  # which series of a study


def _size(image: Any) -> dict[str, str | float]:
    sides = " x ".join(f"{side:.3g}" for side in image.header.get_zooms()[:3])
    return {"size": " x ".join(map(str, image.shape)), "voxel [mm]": sides}


def _draw(found: ReportedCase, planes: Mapping[str, _Plane], white: float) -> None:
    found.picture = _png(
        _row({name: plane._replace(values=plane.values / (white or 1)) for name, plane in planes.items()})
    )
    found.shows = ", ".join(planes)


def _planes(values: np.ndarray, image: Any) -> dict[str, _Plane]:
    """Return named planes of a saved volume or movie."""
    sides, ends = image.header.get_zooms(), _ends(image.affine)
    x, y, z = (int(n) // 2 for n in values.shape[:3])
    if values.ndim == 4 and values.shape[3] > 1:
        n_frames, side = values.shape[3], (sides[0], sides[1])
        # as long as the line, whatever the number of frames
        stretched = np.arange(values.shape[0]) * n_frames // values.shape[0]
        return {
            "first frame": _Plane(values[:, :, z, 0].T, side, ends[0]),
            "middle frame": _Plane(values[:, :, z, n_frames // 2].T, side, ends[0]),
            "a line in time, to the right": _Plane(values[x, :, z][:, stretched], side),
        }
    volume = values[..., 0] if values.ndim == 4 else values
    return {
        "first and second axis": _Plane(volume[:, :, z].T, (sides[0], sides[1]), ends[0]),
        "first and third axis": _Plane(volume[:, y].T, (sides[0], sides[2]), ends[0]),
        "second and third axis": _Plane(volume[x].T, (sides[1], sides[2]), ends[1]),
    }


def _row(planes: Mapping[str, _Plane], classes: Mapping[str, str] | None = None) -> Any:
    """Draw planes side by side and on one scale.

    Floats are grey from 0 to 1, integers the colours of the named classes, with 0 as the background.
    """
    classes = classes or {}
    # here, since drawing is optional and the import slow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    widths = [plane.values.shape[1] * plane.pixel[0] for plane in planes.values()]
    height = max(len(plane.values) * plane.pixel[1] for plane in planes.values())
    scale = min(_WIDTH * len(planes) / sum(widths), _TALLEST / height)
    columns = [max(scale * width, _NARROWEST) for width in widths]
    title, words = 0.3, 0.35 if classes else 0.02  # inches above and below
    figure = Figure(figsize=(sum(columns), scale * height + title + words), facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, len(planes), width_ratios=columns)
    colours = [*classes.values(), *_COLOURS[len(classes) :]]
    for column, (name, (plane, pixel, ends)) in enumerate(planes.items()):
        axes = figure.add_subplot(grid[column])
        axes.set_axis_off()
        look: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
        if np.issubdtype(plane.dtype, np.integer):
            look = {"cmap": ListedColormap([_BACKGROUND, *colours]), "vmin": -0.5, "vmax": len(colours) + 0.5}
        half = widths[column] / 2, len(plane) * pixel[1] / 2
        extent = (-half[0], half[0], -half[1], half[1])
        axes.imshow(plane, origin="lower", extent=extent, interpolation="nearest", **look)
        axes.set(xlim=np.array([-0.5, 0.5]) * columns[column] / scale, ylim=(-height / 2, height / 2))
        axes.set_title(name, color="white", fontsize=10, pad=4)
        mark_sides(axes, *ends, fontsize=9)
    if classes:
        handles = [Patch(color=colour, label=name) for name, colour in classes.items()]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor="white")
    inches = figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, top=1 - title / inches, bottom=words / inches, wspace=0.02)
    return figure


def _png(figure: Any, dpi: int = _DPI) -> bytes:
    content = BytesIO()
    write_png(figure, content, dpi)
    return content.getvalue()

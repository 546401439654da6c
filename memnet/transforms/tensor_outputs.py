"""Writes refined tensors and maps of them, and draws them beside other methods."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from memnet.datasets.diffusion_files import save_whole, write_tensors
from memnet.diffusion.tensors import (
    colour_fractional_anisotropy,
    fine_affine,
    fractional_anisotropy,
    mean_diffusivity,
    rotate_tensors,
    rotation_of,
)
from memnet.transforms.grids import grid_of, same_grid
from memnet.transforms.tensors import UNIT, interpolate
from memnet.whole_files import whole_file
from memnet.workflow.overlay import mark_sides

__all__ = ["SaveTensorsd", "draw_tensors"]

logger = logging.getLogger("memnet")

_BACKGROUND = "#101216"
_MD_SHOWN, _FA_SHOWN = 3e-3, 0.8  # white: free water, mm^2/s; dense white matter
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


class SaveTensorsd(MapTransform):
    """Write refined tensors, in world axes and mm^2/s, with maps of mean diffusivity (MD) and fractional anisotropy (FA).

    ``<name>_tensor.nii.gz`` is as :func:`memnet.datasets.diffusion_files.write_tensors` has it, ``<name>_md.nii.gz`` in mm^2/s,
    ``<name>_fa.nii.gz``, and ``<name>_colour_fa.nii.gz`` in RGB, red along the world's first axis. All lie on the grid as many
    times as fine as the input's, in the input's orientation, and are 0 outside the input's brain.

    Args:
        keys: the refined tensors ``(6, r D, r H, r W)``, um^2/ms, in the axes of the grid.
        image_key: the coarse tensors that they were made from.
        brain_key: the coarse brain.
        reference_key: fine tensors to draw beside, optional in the data.
        output_dir: where files are written.
        panel: draw ``<name>.png``: the input, cubic interpolation, other methods, the result, and the reference.
        method: what the panel calls the result.
        beside: what other methods the panel shows: functions of the coarse tensors ``(1, 6, D, H, W)`` to fine ones, or to
            None where they cannot be had.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        image_key: str = "image",
        brain_key: str = "brain",
        reference_key: str = "reference",
        panel: bool = True,
        method: str = "ESPCN-RN",
        beside: Mapping[str, Callable[[torch.Tensor], torch.Tensor | None]] | None = None,
    ) -> None:
        super().__init__(keys)
        self.output_dir, self.image_key, self.brain_key = Path(output_dir), image_key, brain_key
        self.reference_key, self.panel, self.method = reference_key, panel, method
        self.beside = dict(beside or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write; the entries stay as they are, and the metadata gets ``saved_to``."""
        d = dict(data)
        for key in self.key_iterator(d):
            image, brain = d[self.image_key], d[self.brain_key]
            name = str(d.get("output_name") or Path(image.meta["filename_or_obj"]).name.split(".nii")[0])
            original = np.asarray(image.meta["original_affine"])
            coarse, inside = np.asarray(image.affine, dtype=np.float64), torch.as_tensor(brain).cpu() > 0
            fine = self._in_world(d[key], coarse, inside)
            rate = fine.shape[0] // image.shape[1]
            turn = ornt_transform(io_orientation(coarse), io_orientation(original))
            affine = fine_affine(coarse, rate)
            turned = affine @ inv_ornt_aff(turn, fine.shape[:3])
            self.output_dir.mkdir(parents=True, exist_ok=True)
            target = self.output_dir / f"{name}_tensor.nii.gz"
            tensors = np.stack([apply_orientation(fine[..., c], turn) for c in range(6)], -1)
            colours = np.round(255 * np.clip(colour_fractional_anisotropy(tensors), 0, 1)).astype(np.uint8)
            maps = {
                "md": mean_diffusivity(tensors).astype(np.float32),
                "fa": fractional_anisotropy(tensors).astype(np.float32),
                "colour_fa": np.ascontiguousarray(colours).view(_RGB)[..., 0],
            }
            for kind, values in maps.items():
                save_whole(nib.Nifti1Image(values, turned), self.output_dir / f"{name}_{kind}.nii.gz")
            write_tensors(target, tensors, turned)
            logger.info("%s", image.meta["filename_or_obj"])
            logger.info("  tensor     %s (and md, fa, colour_fa)", target)
            if self.panel:
                picture = self.output_dir / f"{name}.png"
                draw_tensors(picture, self._shown(d, image, coarse, inside, fine, rate), name)
                logger.info("  panel      %s", picture)
                image.meta["panel"] = str(picture)
            image.meta["saved_to"] = str(target)
        return d

    def _in_world(self, values: Any, affine: np.ndarray, inside: torch.Tensor) -> np.ndarray:
        """Turn ``(6, D, H, W)`` in um^2/ms into ``(D, H, W, 6)`` in mm^2/s and world axes, 0 outside the brain."""
        values = torch.as_tensor(values).detach().float().cpu()
        rate = values.shape[1] // inside.shape[1]
        for axis in (1, 2, 3):
            inside = inside.repeat_interleave(rate, axis)
        tensors = np.moveaxis((values * inside * UNIT).numpy(), 0, -1)
        return rotate_tensors(tensors, rotation_of(affine)).astype(np.float32)

    def _shown(
        self,
        d: Mapping[Hashable, Any],
        image: Any,
        affine: np.ndarray,
        inside: torch.Tensor,
        fine: np.ndarray,
        rate: int,
    ) -> dict[str, np.ndarray]:
        plain = torch.as_tensor(image).cpu()
        shown = {"input": self._in_world(plain, affine, inside)}
        shown["cubic"] = self._in_world(interpolate(image.cpu(), rate, 3), affine, inside)
        for name, method in self.beside.items():
            refined = method(plain[None])
            if refined is not None:
                shown[name] = self._in_world(refined[0], affine, inside)
        shown[self.method] = fine
        if self.reference_key in d:
            reference = d[self.reference_key]
            expected = fine.shape[:3], fine_affine(affine, rate)
            if same_grid(grid_of(reference), expected):
                shown["reference"] = self._in_world(torch.as_tensor(reference).cpu()[:6], affine, inside)
            else:
                logger.warning(
                    "%s: not on the grid of the result (%s voxels for %s); not drawn",
                    reference.meta["filename_or_obj"],
                    tuple(reference.shape[1:]),
                    expected[0],
                )
        return shown


def draw_tensors(target: str | Path, methods: Mapping[str, np.ndarray], title: str = "") -> None:
    """Draw an axial plane of MD, FA and colour FA for each method.

    Args:
        target: PNG file to write; complete or absent.
        methods: names and tensors ``(D, H, W, 6)``, mm^2/s, world axes, of one brain turned to RAS at any resolution.
        title: of the figure.
    """
    # here, since drawing is optional and the import slow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = next(iter(methods.values())).shape
    row_height = 2.5 * max(shape[1] / shape[0], 0.4)  # not below what a name beside it takes
    figure = Figure(figsize=(2.6 * len(methods), 0.9 + 3 * row_height), facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    for column, (name, tensors) in enumerate(methods.items()):
        profile = tensors.any(-1).sum((0, 1))
        height = int(np.searchsorted(profile.cumsum(), profile.sum() / 2))
        plane = tensors[:, :, height]
        rows = {
            "MD": mean_diffusivity(plane) / _MD_SHOWN,
            "FA": fractional_anisotropy(plane) / _FA_SHOWN,
            "colour FA": colour_fractional_anisotropy(plane) / _FA_SHOWN,
        }
        for row, (kind, values) in enumerate(rows.items()):
            axes = figure.add_subplot(3, len(methods), 1 + row * len(methods) + column)
            axes.set_axis_off()
            shown = np.clip(np.swapaxes(values, 0, 1), 0, 1)
            axes.imshow(
                shown, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="nearest", extent=(0, 1, 0, 1)
            )
            axes.set_aspect(plane.shape[1] / plane.shape[0])
            if row == 0:
                axes.set_title(name, color="white", fontsize=12)
                mark_sides(axes, "L", "R", fontsize=9)
            if column == 0:
                axes.text(-0.04, 0.5, kind, color="#b8c0cc", rotation=90, va="center", ha="right", fontsize=12)
    figure.suptitle(title, color="#b8c0cc", fontsize=10)
    top = 1 - 0.75 / figure.get_figheight()
    figure.subplots_adjust(left=0.04, right=0.99, top=top, bottom=0.01, wspace=0.03, hspace=0.03)
    with whole_file(target) as partial:
        figure.savefig(partial, dpi=100, facecolor=_BACKGROUND, format="png")

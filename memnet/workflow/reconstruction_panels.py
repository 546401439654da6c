"""Draws reconstructions beside their reference: planes, errors, a movie's course in time, and the movie itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memnet.whole_files import whole_file

__all__ = ["write_pictures"]

_BACKGROUND = "#101216"
_AMPLIFICATION = 5
_FRAME_MS = 60
_WIDTH, _MARGIN, _TITLE = 2.4, 0.04, 0.28  # inches


def write_pictures(
    images: Mapping[str, torch.Tensor], stem: str | Path, movie: bool = False, sides: tuple[float, float] = (1.0, 1.0)
) -> list[Path]:
    """Draw magnitudes, and below them what they miss of the last one, five times as bright.

    Of a volume the middle slice is shown. Of a movie the middle frame, the course in time of the line through the middle of
    what moves (frames to the right), and the movie as an animated GIF.

    Args:
        images: name to magnitudes ``(1, slices or frames, y, z)``, of any scale that they share; the last is the reference.
        stem: files to write, without suffix.
        movie: whether the first dimension is the frames.
        sides: of a voxel along y and z, in any unit.

    Returns:
        The PNG and, of a movie, the GIF.
    """
    magnitudes = {name: image[0].detach().float().cpu().numpy() for name, image in images.items()}
    reference = list(magnitudes.values())[-1]
    middle = len(reference) // 2
    rows = [{name: image[middle].T for name, image in magnitudes.items()}]
    rows.append(
        {name: _AMPLIFICATION * np.abs(image[middle] - reference[middle]).T for name, image in magnitudes.items()}
    )
    if movie:
        line = int(reference.std(0).sum(1).argmax())
        # as wide as the planes, whatever the number of frames
        wide = np.arange(reference.shape[1]) * len(reference) // reference.shape[1]
        rows.append({name: image[wide, line].T for name, image in magnitudes.items()})
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    bright = float(np.percentile(reference, 99.8))
    png = stem.with_name(f"{stem.name}.png")
    with whole_file(png) as partial:
        _canvas(rows, bright, ("", f"error x {_AMPLIFICATION}", "time"), sides).figure.savefig(
            partial, dpi=110, facecolor=_BACKGROUND, format="png"
        )
    if not movie:
        return [png]
    gif = stem.with_name(f"{stem.name}.gif")
    _animate(magnitudes, bright, gif, sides)
    return [png, gif]


def _canvas(
    rows: list[dict[str, np.ndarray]], bright: float, words: tuple[str, ...], sides: tuple[float, float]
) -> Any:
    """Return a drawn canvas: planes in rows, whose first dimension goes up, with their names above."""
    # here, since drawing is optional and the import slow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = next(iter(rows[0].values())).shape
    cell = _WIDTH * (height * sides[1]) / (width * sides[0])
    size = (len(rows[0]) * (_WIDTH + _MARGIN) + _MARGIN, len(rows) * (cell + _MARGIN) + _MARGIN + _TITLE)
    figure = Figure(figsize=size, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    for i, row in enumerate(rows):
        for j, (name, plane) in enumerate(row.items()):
            left, top = _MARGIN + j * (_WIDTH + _MARGIN), _TITLE + i * (cell + _MARGIN)
            axes = figure.add_axes((left / size[0], 1 - (top + cell) / size[1], _WIDTH / size[0], cell / size[1]))
            axes.set_axis_off()
            axes.imshow(plane, cmap="gray", vmin=0, vmax=bright, origin="lower", aspect="auto", interpolation="nearest")
            if i == 0:
                axes.set_title(name, color="white", fontsize=10, pad=4)
            elif j == 0:
                patch = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}
                axes.text(
                    0.03, 0.95, words[i], color="white", fontsize=9, va="top", transform=axes.transAxes, bbox=patch
                )
    canvas.draw()
    return canvas


def _animate(magnitudes: Mapping[str, np.ndarray], bright: float, target: Path, sides: tuple[float, float]) -> None:
    from PIL import Image  # comes with matplotlib

    frames = []
    for t in range(len(next(iter(magnitudes.values())))):
        canvas = _canvas([{name: image[t].T for name, image in magnitudes.items()}], bright, ("",), sides)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128))
    with whole_file(target) as partial:
        frames[0].save(
            partial, format="GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0, disposal=1
        )

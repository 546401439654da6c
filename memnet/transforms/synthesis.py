"""Makes T1 and T2 images of random contrast from anatomical label maps, so that networks learn without real images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

from memnet.transforms.labels import FREESURFER_TISSUE, GM, WM

__all__ = ["STRUCTURES", "RandSynthesizeModalitiesd", "structures", "textured", "touching"]

# What is drawn with one intensity: FreeSurfer's values, typical T1 and T2 intensity (brightest tissue = 1), whether it is
# inside the brain. T1 as seen in healthy adults at 1 mm, T2 as in turbo spin echo.
STRUCTURES: dict[str, tuple[tuple[int, ...], float, float, bool]] = {
    "air": ((0,), 0.00, 0.00, False),
    "cerebral white matter": ((2, 41, 78, 79, 251, 252, 253, 254, 255), 1.00, 0.36, True),
    "cerebral cortex": ((3, 42), 0.64, 0.58, True),
    "cerebellar white matter": ((7, 46), 0.96, 0.38, True),
    "cerebellar cortex": ((8, 47), 0.64, 0.58, True),
    "brainstem": ((16,), 0.92, 0.42, True),
    "ventral diencephalon": ((28, 60), 0.88, 0.42, True),
    "thalamus": ((10, 49), 0.83, 0.46, True),
    "caudate": ((11, 26, 50, 58), 0.69, 0.50, True),
    "putamen": ((12, 51), 0.76, 0.45, True),
    "pallidum": ((13, 52), 0.90, 0.32, True),
    "hippocampus and amygdala": ((17, 18, 53, 54), 0.65, 0.58, True),
    "ventricles": ((4, 5, 14, 15, 43, 44, 72), 0.28, 1.00, True),
    "fluid around the brain": ((24,), 0.28, 0.98, False),
    "choroid plexus": ((31, 63, 136, 137, 163, 164), 0.45, 0.85, True),
    "white matter lesion": ((25, 57, 77), 0.75, 0.65, True),
    "vessel": ((30, 62), 0.60, 0.70, True),
    "optic chiasm": ((85, 506, 530), 0.80, 0.40, False),
    "arteries": ((502,), 0.60, 0.15, False),
    "soft tissue": ((507,), 0.65, 0.35, False),
    "eye": ((508,), 0.20, 0.95, False),
    "mucosa": ((509,), 0.50, 0.70, False),
    "skin and fat": ((511,), 1.10, 0.70, False),
    "spinal cord": ((512,), 0.85, 0.40, False),
    "dura and sinus": ((514,), 0.50, 0.30, False),
    "cortical bone": ((515,), 0.15, 0.08, False),
    "marrow": ((516,), 0.80, 0.50, False),
}
_NAMES = list(STRUCTURES)
_CORTEX = [_NAMES.index("cerebral cortex"), _NAMES.index("cerebellar cortex")]
_WHITE = [_NAMES.index("cerebral white matter"), _NAMES.index("cerebellar white matter")]
_FLUID = _NAMES.index("fluid around the brain")
_SOFT_TISSUE = [i for i, (_, _, _, inside) in enumerate(STRUCTURES.values()) if not inside and i not in (0, _FLUID)]
_SIZE = 1024


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    structure, tissue = torch.full((_SIZE,), -1, dtype=torch.int64), torch.full((_SIZE,), -1, dtype=torch.int64)
    for i, (values, *_) in enumerate(STRUCTURES.values()):
        structure[list(values)] = i
    for value, target in FREESURFER_TISSUE.items():
        tissue[value] = target
    tissue[structure < 0] = -1
    return structure, tissue


_STRUCTURE, _TISSUE = _tables()
# Which tissue a structure looks like in a contrast drawn at random: 0 outside, 1 fluid, 2 grey, 3 white.
_INSIDE = torch.tensor([inside for *_, inside in STRUCTURES.values()])
_LOOK = [int(_TISSUE[values[0]]) for values, *_ in STRUCTURES.values()]


class RandSynthesizeModalitiesd(RandomizableTransform, MapTransform):
    """Draw a T1-like and a T2-like image of a FreeSurfer label map and turn the labels into tissue.

    Voxel ``v`` of structure ``s`` is ``m_s + d_s n(v)`` with normal noise ``n``, the mean ``m_s`` and spread ``d_s`` drawn
    anew for every image, about the typical value of the modality or freely. At the pial surface cortex and fluid share
    voxels: those of the fluid that touch cortex are drawn as a random mixture of both and count as grey matter, which is
    where manual protocols draw the border in images of 1 mm. Likewise cortex that touches enough white matter is drawn as a
    mixture of the two and counts as white matter.

    Args:
        keys: label maps ``(1, D, H, W)`` with FreeSurfer's values (5xx outside the brain).
        image_key: where the image goes.
        mask_key: where the brain goes, the mixed voxels and the ventricles included, ``(1, D, H, W)`` bool.
        prob_missing: probabilities that T1 and that T2 is missing (all zero); together at most 1, never both missing.
        prob_random: probabilities that T1 and that T2 is of any contrast instead of its typical one.
        variation: standard deviation of the means about the typical ones.
        texture: largest spread within a structure.
        pial_mixture: least and largest share of fluid in the mixed voxels.
        white_share: share of white matter in the 3^3 neighbourhood of a voxel of cortex above which it counts as white
            matter; 1 leaves the border where the label map has it. The default is what the experts of the MICCAI 2012
            multi-atlas set draw, for whom white matter begins at darker voxels of T1.
        white_mixture: least and largest share of white matter in those mixed voxels.
        prob_dark_air: probability that air is exactly zero, not noise.

    Raises:
        ValueError: if probabilities are out of range.

    References:
        SynthSeg: segmentation of brain MRI scans of any contrast and resolution without retraining (Billot et al., 2023),
        https://doi.org/10.1016/j.media.2023.102789
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        image_key: str = "image",
        mask_key: str = "brain",
        prob_missing: tuple[float, float] = (0.3, 0.4),
        prob_random: tuple[float, float] = (0.2, 0.3),
        variation: float = 0.05,
        texture: float = 0.09,
        pial_mixture: tuple[float, float] = (0.1, 1.0),
        white_share: float = 0.28,
        white_mixture: tuple[float, float] = (0.0, 0.6),
        prob_dark_air: float = 0.5,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if min(prob_missing) < 0 or sum(prob_missing) > 1:
            raise ValueError(f"prob_missing is {prob_missing}, expected two probabilities with a sum of at most 1")
        if not all(0 <= p <= 1 for p in prob_random):
            raise ValueError(f"prob_random is {prob_random}, expected two probabilities")
        self.image_key, self.mask_key = image_key, mask_key
        self.prob_missing, self.prob_random = prob_missing, prob_random
        self.variation, self.texture, self.pial_mixture = variation, texture, pial_mixture
        self.white_share, self.white_mixture = white_share, white_mixture
        self.prob_dark_air = prob_dark_air

    def randomize(self, data: Any = None) -> None:
        """Draw which modalities there are, and the mean and spread of every structure in each."""
        super().randomize(None)
        draw = self.R.random()
        missing = 0 if draw < self.prob_missing[0] else 1 if draw < sum(self.prob_missing) else None
        self._dark_air = self.R.random() < self.prob_dark_air
        self._contrast: list[tuple[np.ndarray, np.ndarray] | None] = []
        for modality in range(2):
            free = self.R.random() < self.prob_random[modality]
            mean = self._free_means() if free else self._typical_means(modality)
            spread = self.texture * self.R.random() * self.R.uniform(0.4, 1.0, len(mean)) + 0.005
            outer = np.array(_SOFT_TISSUE)
            spread[outer] += self.R.uniform(0, 0.1, len(outer))
            mean[0] = 0.0
            spread[0] = 0.0 if self._dark_air else self.R.uniform(0, 0.03)
            self._contrast.append(None if missing == modality else (mean, spread))
        self._pial = self.R.uniform(*self.pial_mixture)
        self._white = self.R.uniform(*self.white_mixture)
        self._seed = int(self.R.randint(2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add an image ``(2, D, H, W)`` float32, unscaled, and replace the labels by tissue 0 to 3.

        Raises:
            ValueError: if a label map holds values that are no FreeSurfer structure, naming them.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            labels = torch.as_tensor(d[key])[0].long()
            structure = structures(labels, key)
            self.randomize()
            tissue = _TISSUE[labels]
            cortex = torch.zeros(structure.shape, dtype=torch.bool)
            for i in _CORTEX:
                cortex |= structure == i
            rim = touching(cortex) & (structure == _FLUID)
            tissue = torch.where(rim, GM, tissue)
            mixed = torch.zeros(structure.shape, dtype=torch.bool)
            for grey, white in zip(_CORTEX, _WHITE, strict=True):
                share = functional.avg_pool3d((structure == white)[None].float(), 3, 1, 1, count_include_pad=False)[0]
                mixed |= (structure == grey) & (share > self.white_share)
            tissue = torch.where(mixed, WM, tissue)
            generator = torch.Generator().manual_seed(self._seed)
            image = torch.zeros(2, *structure.shape)
            for channel, contrast in enumerate(self._contrast):
                if contrast is not None:
                    image[channel] = self._draw(structure, rim, mixed, contrast, generator)
            d[self.image_key] = image
            d[self.mask_key] = (_INSIDE[structure] | rim)[None]
            d[key] = tissue[None].to(torch.uint8)
        return d

    def _draw(
        self,
        structure: torch.Tensor,
        rim: torch.Tensor,
        mixed: torch.Tensor,
        contrast: tuple[np.ndarray, np.ndarray],
        generator: torch.Generator,
    ) -> torch.Tensor:
        mean, spread = (torch.from_numpy(values).float() for values in contrast)
        image = mean[structure]
        share = (self._pial + 0.25 * torch.randn(int(rim.sum()), generator=generator)).clamp_(0, 1)
        image[rim] = share * mean[_FLUID] + (1 - share) * mean[_CORTEX[0]]
        share = (self._white + 0.15 * torch.randn(int(mixed.sum()), generator=generator)).clamp_(0, 1)
        image[mixed] = share * mean[_WHITE[0]] + (1 - share) * mean[_CORTEX[0]]
        return textured(image, structure, spread, generator)

    def _typical_means(self, modality: int) -> np.ndarray:
        mean = np.array([values[1 + modality] for values in STRUCTURES.values()], dtype=np.float64)
        look = np.array(_LOOK)
        # Sequences differ in how strong the contrast is: move grey and fluid as a whole, then every structure by itself.
        grey, white = mean[_CORTEX[0]], mean[1]
        position = (mean - white) / (grey - white)
        shift = self.R.uniform(-0.12, 0.12)
        new_grey = grey + shift
        between = (position > 0.02) & (position < 1.3) & (look >= 2)
        mean = np.where(between, white + position * (new_grey - white), mean)
        fluid = (look == 1) & (position > 1.3)
        mean = np.where(fluid, mean + self.R.uniform(-0.2, 0.12), mean)
        mean += self.R.normal(0, self.variation, len(mean)) * np.where(look == 0, 5.0, np.where(look == 1, 0.6, 0.5))
        return mean.clip(0.02, 1.6)

    def _free_means(self) -> np.ndarray:
        look = np.array(_LOOK)
        while True:
            tissue = self.R.uniform(0.05, 1.0, 4)
            gaps = np.abs(tissue[1:, None] - tissue[None, 1:])[np.triu_indices(3, 1)]
            if gaps.min() > 0.08:
                break
        mean = tissue[look]
        # Deep nuclei lie between cortex and white matter in most contrasts.
        typical = np.array([values[1] for values in STRUCTURES.values()])
        position = np.clip((1.0 - typical) / 0.36, 0, 1)
        mean = np.where(look >= 2, tissue[3] + position * (tissue[2] - tissue[3]), mean)
        mean = np.where(look == 0, self.R.uniform(0.0, 1.3, len(mean)), mean)
        return (mean + self.R.normal(0, self.variation * 0.6, len(mean))).clip(0.02, 1.6)


def structures(labels: torch.Tensor, name: Hashable = "label") -> torch.Tensor:
    """Return the place in :data:`STRUCTURES` of each label.

    Args:
        labels: FreeSurfer's values, ``(D, H, W)`` of any integer type.
        name: what an error calls the map.

    Returns:
        ``(D, H, W)`` int64.

    Raises:
        ValueError: if values are no FreeSurfer structure, naming them.
    """
    labels = labels.long()
    values = torch.bincount(labels.clamp(0, _SIZE - 1).flatten(), minlength=_SIZE).nonzero().flatten()
    unknown = [int(v) for v in values if _TISSUE[v] < 0] + ([int(labels.min())] if labels.min() < 0 else [])
    if unknown:
        raise ValueError(f"{name}: holds label values that are no FreeSurfer structure: {unknown}")
    return _STRUCTURE[labels]


def textured(
    image: torch.Tensor, structure: torch.Tensor, spread: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Add normal noise of each structure's spread, and blotches outside the brain, in place.

    Args:
        image: means of the structures, ``(D, H, W)``.
        structure: places in :data:`STRUCTURES`, ``(D, H, W)``.
        spread: standard deviation of each structure; that of air decides whether air is noise or exactly 0.
        generator: where the noise is drawn from.

    Returns:
        The image, nowhere below 0.
    """
    # Blotches outside the brain: muscle, fat, sinuses and noise that the labels do not tell apart.
    blotches = torch.randn(1, 1, *(max(2, n // 8) for n in structure.shape), generator=generator)
    blotches = functional.interpolate(blotches, structure.shape, mode="trilinear", align_corners=True)[0, 0]
    outer = torch.zeros(len(spread))
    outer[_SOFT_TISSUE] = 0.15
    image += outer[structure] * blotches
    image += spread[structure] * torch.randn(structure.shape, generator=generator)
    return image.abs_() if float(spread[0]) > 0 else image.clamp_(min=0)


def touching(mask: torch.Tensor) -> torch.Tensor:
    """Dilate a mask ``(D, H, W)`` by the voxels that share a face or an edge with it."""
    x = mask[None, None].float()
    planes = [functional.max_pool3d(x, k, 1, [n // 2 for n in k]) for k in ((3, 3, 1), (3, 1, 3), (1, 3, 3))]
    return torch.stack(planes).amax(0)[0, 0] > 0

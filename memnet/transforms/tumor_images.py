"""Makes T1, T1c, T2 and FLAIR images of anatomical label maps into which a tumour was grown."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

from memnet.transforms.labels import ENHANCING, NECROTIC, OEDEMA
from memnet.transforms.synthesis import STRUCTURES, structures, textured
from memnet.transforms.tumor import smooth_noise

__all__ = ["MODALITIES", "RandScaleBraind", "RandSynthesizeTumord"]

MODALITIES = ("T1", "T1c", "T2", "FLAIR")

# Typical intensities where they differ from T1's (for T1c: what takes up contrast agent) or for FLAIR, in which fluid is
# dark and grey matter brighter than white; white matter is 0.80 there.
_T1C = {
    "choroid plexus": 1.3,
    "vessel": 1.6,
    "arteries": 1.6,
    "mucosa": 1.4,
    "dura and sinus": 1.4,
    "skin and fat": 1.1,
}
_FLAIR = {
    "air": 0.0,
    "cerebral white matter": 0.80,
    "cerebral cortex": 0.98,
    "cerebellar white matter": 0.78,
    "cerebellar cortex": 0.92,
    "brainstem": 0.82,
    "ventral diencephalon": 0.82,
    "thalamus": 0.88,
    "caudate": 0.95,
    "putamen": 0.93,
    "pallidum": 0.78,
    "hippocampus and amygdala": 1.05,
    "ventricles": 0.13,
    "fluid around the brain": 0.20,
    "choroid plexus": 0.70,
    "white matter lesion": 1.35,
    "vessel": 0.40,
    "optic chiasm": 0.85,
    "arteries": 0.25,
    "soft tissue": 0.50,
    "eye": 0.20,
    "mucosa": 0.80,
    "skin and fat": 0.90,
    "spinal cord": 0.80,
    "dura and sinus": 0.50,
    "cortical bone": 0.10,
    "marrow": 0.60,
}
_TYPICAL = np.array(
    [[t1, _T1C.get(name, t1), t2, _FLAIR[name]] for name, (_, t1, t2, _) in STRUCTURES.items()], dtype=np.float64
)
# Least and largest mean of a tumour's parts relative to white matter, for T1, T1c before contrast agent, T2, FLAIR.
_RELATIVE = {
    NECROTIC: ((0.35, 0.85), (0.35, 0.9), (1.5, 2.8), (1.05, 2.0)),
    OEDEMA: ((0.65, 0.95), (0.65, 0.98), (1.4, 2.4), (1.3, 2.2)),
    ENHANCING: ((0.6, 1.1), (1.12, 2.8), (1.2, 2.3), (1.05, 2.0)),
}
_CYST = (0.15, 0.9)  # of FLAIR, where necrosis is as dark as fluid
_BLEEDING = (1.0, 1.5)  # of T1 and T1c, where necrosis holds blood
_NAMES = list(STRUCTURES)
_WHITE, _CORTEX = _NAMES.index("cerebral white matter"), _NAMES.index("cerebral cortex")
_FLUIDS = [_NAMES.index(name) for name in ("ventricles", "fluid around the brain")]
_INSIDE = torch.tensor([inside for *_, inside in STRUCTURES.values()])


class RandSynthesizeTumord(RandomizableTransform, MapTransform):
    """Draw T1, T1c, T2 and FLAIR of a FreeSurfer label map with a tumour; what is missing is all zero.

    Healthy voxels are drawn as in :class:`memnet.transforms.synthesis.RandSynthesizeModalitiesd`, about the typical values
    and a random contrast of grey to white matter. A tumour's part ``k`` has the mean ``q_k w``, ``w`` that of white matter
    and ``q_k`` drawn from wide ranges for each modality, times ``1 + n(v)`` with smooth noise; at its soft border, and
    throughout oedema, it is mixed with the tissue beneath. Vessels enhance in T1c.

    Args:
        keys: label maps ``(1, D, H, W)`` with FreeSurfer's values; replaced by the tumour.
        tumor_key: the tumour ``(1, D, H, W)``, 0 to 3 (see :class:`memnet.transforms.tumor.RandGrowTumord`); removed.
        image_key: where the image goes.
        mask_key: where the brain goes, tumour and ventricles included, ``(1, D, H, W)`` bool.
        modality_sets: pairs of a probability and the modalities that are present then; with the probability that is left
            any set of them is, each modality with probability one half.
        variation: standard deviation of the structures' means about the typical ones.
        texture: largest spread within a structure.
        tumor_texture: largest spread ``n`` within a part of the tumour.

    Raises:
        ValueError: if the probabilities exceed 1 or a modality is unknown.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        tumor_key: str = "tumor",
        image_key: str = "image",
        mask_key: str = "brain",
        modality_sets: Sequence[tuple[float, Sequence[str]]] = ((0.3, MODALITIES), (0.35, ("T1c", "FLAIR"))),
        variation: float = 0.04,
        texture: float = 0.07,
        tumor_texture: float = 0.2,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if sum(p for p, _ in modality_sets) > 1 + 1e-9 or any(p < 0 for p, _ in modality_sets):
            raise ValueError(f"modality_sets is {modality_sets}, expected probabilities with a sum of at most 1")
        for _, names in modality_sets:
            if not names or not set(names) <= set(MODALITIES):
                raise ValueError(f"modality_sets names {list(names)}, expected some of {', '.join(MODALITIES)}")
        self.tumor_key, self.image_key, self.mask_key = tumor_key, image_key, mask_key
        self.modality_sets = tuple((float(p), tuple(names)) for p, names in modality_sets)
        self.variation, self.texture, self.tumor_texture = variation, texture, tumor_texture

    def randomize(self, data: Any = None) -> None:
        """Draw which modalities there are and the means and spreads of structures and tumour in each."""
        super().randomize(None)
        self._present = self._draw_set()
        contrast = self.R.uniform(0.3, 1.15)  # of grey to white matter in T1, with and without contrast agent
        deviation = self.R.normal(0, 1, (len(STRUCTURES), 4))
        deviation[:, 1] = 0.8 * deviation[:, 0] + 0.6 * deviation[:, 1]
        self._means, self._spreads = [], []
        for modality in range(4):
            mean = _TYPICAL[:, modality].copy()
            white, grey = mean[_WHITE], mean[_CORTEX]
            factor = contrast if modality < 2 else self.R.uniform(0.4, 1.3)
            between = (np.abs(mean - white) <= 1.2 * abs(grey - white)) & _INSIDE.numpy()
            mean[between] = white + factor * (mean[between] - white)
            mean *= 1 + self.variation * deviation[:, modality] * np.where(_INSIDE.numpy(), 1, 5)
            mean[_FLUIDS] *= self.R.uniform(0.5, 1.4) if modality != 2 else self.R.uniform(0.8, 1.15)
            mean[0] = 0.0
            spread = self.texture * self.R.random() * self.R.uniform(0.4, 1.0, len(mean)) + 0.005
            self._means.append(mean.clip(0, 2.5))
            self._spreads.append(np.where(np.arange(len(mean)) == 0, 0.0, spread))
        cyst, bleeding = self.R.random() < 0.45, self.R.random() < 0.08
        self._parts: dict[int, np.ndarray] = {}
        for part, ranges in _RELATIVE.items():
            relative = np.array([self.R.uniform(*bounds) for bounds in ranges])
            if part != ENHANCING:  # T1c is T1 where nothing is taken up
                relative[1] = relative[0] + self.R.normal(0, 0.06)
            if part == NECROTIC and cyst:
                relative[3] = self.R.uniform(*_CYST)
            if part == NECROTIC and bleeding:
                relative[:2] = self.R.uniform(*_BLEEDING)
            self._parts[part] = relative
        self._part_texture = self.tumor_texture * self.R.uniform(0.1, 1.0, (4, 4)) * np.array([1, 1, 0.6, 1])
        self._softness = (int(self.R.randint(0, 2)), int(self.R.randint(0, 4)))
        self._opacity = self.R.uniform(0.7, 1.0)
        self._vessels = (self.R.uniform(5, 12), self.R.uniform(0.0, 0.25), self.R.uniform(0.9, 2.6))
        self._seed = int(self.R.randint(2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add an image ``(4, D, H, W)`` float32, unscaled, and replace the labels by the tumour, uint8.

        Raises:
            ValueError: if a label map holds values that are no FreeSurfer structure, naming them.
        """
        d = dict(data)
        tumor = torch.as_tensor(d.pop(self.tumor_key))[0].long()
        for key in self.key_iterator(d):
            structure = structures(torch.as_tensor(d[key])[0], key)
            self.randomize()
            generator = torch.Generator().manual_seed(self._seed)
            image = torch.zeros(4, *structure.shape)
            shares = self._shares(tumor, structure)
            coarse, fine = (smooth_noise(structure.shape, scale, generator) for scale in (7.0, 2.5))
            vessels = self._draw_vessels(structure, tumor, generator)
            for modality, name in enumerate(MODALITIES):
                if name in self._present:
                    image[modality] = self._draw(modality, structure, shares, (coarse, fine), vessels, generator)
            d[self.image_key] = image
            d[self.mask_key] = (_INSIDE[structure] | (tumor > 0))[None]
            d[key] = tumor[None].to(torch.uint8)
        return d

    def _draw_set(self) -> tuple[str, ...]:
        draw = self.R.random()
        coins = self.R.random(4) < 0.5
        coins[self.R.randint(4)] |= not coins.any()
        for probability, names in self.modality_sets:
            draw -= probability
            if draw < 0:
                return names
        return tuple(name for name, coin in zip(MODALITIES, coins, strict=True) if coin)

    def _shares(self, tumor: torch.Tensor, structure: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the share of each part in each voxel, soft at the borders; together at most 1."""
        shares = {}
        fluid = (structure == _FLUIDS[0]) | (structure == _FLUIDS[1])
        for part in _RELATIVE:
            here = (tumor == part)[None].float()
            share = here
            for _ in range(self._softness[part == OEDEMA]):
                share = functional.avg_pool3d(share, 3, 1, 1, count_include_pad=False)
            shares[part] = torch.maximum(share, 0.6 * here)[0]  # thin parts must not fade away
        shares[OEDEMA] = self._opacity * shares[OEDEMA].masked_fill(fluid & (tumor == 0), 0)
        total = sum(shares.values(), torch.zeros(tumor.shape)).clamp(min=1.0)
        return {part: share / total for part, share in shares.items()}

    def _draw_vessels(self, structure: torch.Tensor, tumor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return where tubes lie: where two smooth noises are near 0 at once, in fluid and at times in tissue."""
        scale, width, _ = self._vessels
        first, second = (smooth_noise(structure.shape, scale, generator).abs_() for _ in range(2))
        fluid = structure == _FLUIDS[1]
        wide = torch.where(fluid, width, 0.3 * width)
        return (first < wide) & (second < wide) & (structure > 0) & (tumor == 0) & (structure != _FLUIDS[0])

    def _draw(
        self,
        modality: int,
        structure: torch.Tensor,
        shares: dict[int, torch.Tensor],
        noises: tuple[torch.Tensor, torch.Tensor],
        vessels: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        mean = torch.from_numpy(self._means[modality]).float()
        white = float(mean[_WHITE])
        image = mean[structure]
        if MODALITIES[modality] == "T1c":
            image[vessels] = self._vessels[2] * white
        healthy = 1 - sum(shares.values(), torch.zeros(structure.shape))
        image *= healthy
        for part, share in shares.items():
            a, b = self._part_texture[modality, part] * np.array([0.7, 0.5])
            image += share * (white * float(self._parts[part][modality])) * (1 + a * noises[0] + b * noises[1])
        return textured(image, structure, torch.from_numpy(self._spreads[modality]).float(), generator)


class RandScaleBraind(RandomizableTransform, MapTransform):
    """Scale patches as :class:`memnet.transforms.intensity.ScaleBraind` scales whole volumes, up to what a patch cannot know.

    A volume's median lies between its white and its grey matter; a patch may hold little of the one or be filled by tumour.
    So the middle of the medians of the patch's healthy voxels below and above their median takes its place, with jitter.

    Args:
        keys: images ``(C, D, H, W)``, 0 outside the brain.
        label_key: tumour labels ``(1, D, H, W)``; where they are 0 a voxel is healthy.
        median: what the median becomes.
        jitter: standard deviation of the log of the factor.
        prob_cut: probability that the field of view ends within the patch, at a plane across an axis.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        label_key: str = "label",
        median: float = 1 / 3,
        jitter: float = 0.08,
        prob_cut: float = 0.1,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob_cut)
        self.label_key, self.median, self.jitter = label_key, median, jitter

    def randomize(self, data: int) -> None:
        """Draw the factors of ``data`` channels and where the field of view ends."""
        super().randomize(None)
        self._factors = np.exp(self.R.normal(0, self.jitter, data))
        self._axis, self._end = int(self.R.randint(3)), self.R.uniform(0.05, 0.4)
        self._first = bool(self.R.random() < 0.5)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return images in [0, 1], float32, and labels that end where they do; empty channels stay empty."""
        d = dict(data)
        label = torch.as_tensor(d[self.label_key]).clone()
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).clone()
            self.randomize(image.shape[0])
            if self._do_transform:
                length = label.shape[1 + self._axis]
                n = max(1, round(self._end * length))
                for volume in (image, label):
                    volume.narrow(1 + self._axis, 0 if self._first else length - n, n).zero_()
            for channel, factor in zip(image, self._factors, strict=True):
                healthy = channel[(channel > 0) & (label[0] == 0)]
                values = healthy[::5] if len(healthy) > 1000 else channel[channel > 0]
                if len(values):
                    quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]))
                    channel.mul_(float(self.median * factor / quartiles.mean().clamp(min=1e-6))).clamp_(0, 1)
            d[key] = image
        d[self.label_key] = label
        return d

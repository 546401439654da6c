"""Grows random tumours and white matter lesions into anatomical label maps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

from memnet.transforms.labels import ENHANCING, NECROTIC, OEDEMA
from memnet.transforms.synthesis import STRUCTURES, structures, touching

__all__ = ["RandAddLesionsd", "RandGrowTumord", "smooth_noise"]

# How readily oedema takes a voxel of a structure, in units of the oedema's reach: it follows white matter and hardly
# enters cortex. What is not named lets none in.
_WAY = {
    "cerebral white matter": 0.15,
    "white matter lesion": 0.15,
    "cerebellar white matter": 0.1,
    "brainstem": -0.1,
    "ventral diencephalon": -0.15,
    "thalamus": -0.2,
    "caudate": -0.25,
    "putamen": -0.25,
    "pallidum": -0.2,
    "hippocampus and amygdala": -0.2,
    "cerebral cortex": -0.3,
    "cerebellar cortex": -0.4,
    "choroid plexus": -0.9,
    "vessel": -0.2,
}
# How often a tumour begins in a voxel of a structure, relative to white matter.
_SEAT = {"cerebral white matter": 1.0, "cerebral cortex": 0.5, "thalamus": 0.2, "putamen": 0.2, "brainstem": 0.05}
_NAMES = list(STRUCTURES)
_REACHABLE = torch.tensor([_WAY.get(name, -9.0) for name in _NAMES])
_SEATS = torch.tensor([_SEAT.get(name, 0.0) for name in _NAMES])
# A tumour's core fills what lies within the brain, sulci too; ventricles are pushed away rather than filled.
_SOLID = torch.tensor([inside for *_, inside in STRUCTURES.values()])
_SOLID[_NAMES.index("ventricles")] = False
_SOLID[_NAMES.index("fluid around the brain")] = True
_WHITE = _NAMES.index("cerebral white matter")
_VENTRICLES = _NAMES.index("ventricles")
_LESION = STRUCTURES["white matter lesion"][0][-1]


class RandGrowTumord(RandomizableTransform, MapTransform):
    """Push tissue aside and grow a core with necrosis and an enhancing rim, and oedema around it.

    The core is where ``g(v) = max_i (r_i - |M_i (v - c_i)|) + a r n(v) > 0``: lobes ``i`` of radius ``r_i`` (voxels of 1 mm)
    and smooth noise ``n``. Its rim ``g < w(v)`` enhances, ``w`` being rough and possibly more than the core (solid), nothing
    (low grade) or speckled; the rest is necrosis or tumour that does not enhance. Oedema fills
    ``1 + g/R + b n'(v) + p(v) > 0``, ``R`` its reach, ``p`` the way that the structures about ``v`` give it: white matter
    freely, cortex hardly, fluid not at all. Before that, the tissue at a distance ``t`` of the centre is pushed outwards by
    ``m r exp(-t^2 / (2 (1.5 r)^2))``.

    Args:
        keys: label maps ``(1, D, H, W)`` with FreeSurfer's values, 1 mm; tissue is pushed aside in all alike.
        tumor_key: where the tumour goes, ``(1, D, H, W)`` uint8: 0 none, 1 necrotic or not enhancing, 2 oedema, 3 enhancing.
        prob: probability of a tumour.
        radius: least and largest radius of the core, mm; drawn evenly on a logarithmic scale.
        reach: largest reach of the oedema beyond the core, mm.
        mass_effect: largest push ``m``, relative to the radius.
        prob_multifocal: probability of a second focus somewhere else.
        prob_low_grade: probability that nothing enhances.

    Raises:
        ValueError: if the radii are not positive and in order.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        tumor_key: str = "tumor",
        prob: float = 0.85,
        radius: tuple[float, float] = (7.0, 28.0),
        reach: float = 34.0,
        mass_effect: float = 0.45,
        prob_multifocal: float = 0.15,
        prob_low_grade: float = 0.15,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if not 0 < radius[0] <= radius[1]:
            raise ValueError(f"radius is {radius}, expected a least and a largest radius in mm")
        self.tumor_key = tumor_key
        self.radius, self.reach, self.mass_effect = radius, reach, mass_effect
        self.prob_multifocal, self.prob_low_grade = prob_multifocal, prob_low_grade

    def randomize(self, data: torch.Tensor) -> None:
        """Draw place, size, shape and make-up from the structures ``(D, H, W)`` of the map."""
        super().randomize(None)
        coarse = _SEATS[data[::3, ::3, ::3]].flatten()
        self._do_transform = self._do_transform and float(coarse.sum()) > 0
        radius = float(np.exp(self.R.uniform(*np.log(self.radius))))
        self._lobes: list[tuple[np.ndarray, float, np.ndarray]] = []
        n_foci = 2 if self.R.random() < self.prob_multifocal else 1
        for focus in range(n_foci if self._do_transform else 0):
            centre = self._seat(coarse, data.shape)
            r = radius * (1.0 if focus == 0 else self.R.uniform(0.3, 0.7))
            for lobe in range(self.R.randint(1, 5)):
                place = centre + (self.R.normal(0, 0.5 * r, 3) if lobe else 0)
                stretch = np.diag(np.exp(self.R.normal(0, 0.18, 3)))
                self._lobes.append((place, r * (1.0 if lobe == 0 else self.R.uniform(0.4, 0.85)), stretch))
        self._push = self.R.uniform(0, self.mass_effect)
        self._rough = self.R.uniform(0.15, 0.55)
        self._reach = self.reach * self.R.random() if self.R.random() < 0.9 else 0.0
        self._irregular = self.R.uniform(0.1, 0.45)
        kind = self.R.random()
        self._low_grade = kind < self.prob_low_grade
        # thickness of the enhancing rim, relative to the radius: thin, thick or more than the core
        self._rim = radius * (self.R.uniform(0.05, 0.3) if kind < 0.65 else self.R.uniform(0.3, 1.0))
        self._rim_roughness = self.R.uniform(0.3, 1.2)
        self._speckle = self.R.uniform(0.0, 1.0) if self.R.random() < 0.35 else 0.0
        # a part of the core that does not enhance may surround the rim
        self._outer = radius * self.R.uniform(0.0, 0.4) if self.R.random() < 0.3 else 0.0
        self._radius = radius
        self._seed = int(self.R.randint(2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the tumour and return the labels around it pushed aside, shape and dtype as before.

        Raises:
            ValueError: if a label map holds values that are no FreeSurfer structure.
        """
        d = dict(data)
        for i, key in enumerate(self.key_iterator(d)):
            labels = torch.as_tensor(d[key])
            if i == 0:
                structure = structures(labels[0], key)
                self.randomize(structure)
                if not self._do_transform:
                    d[self.tumor_key] = torch.zeros(labels.shape, dtype=torch.uint8)
                    break
                index = self._pushed(structure.shape)
                d[self.tumor_key] = self._grow(structure.take(index))[None]
            d[key] = labels[0].take(index)[None]
        return d

    def _seat(self, weights: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
        cumulative = weights.double().cumsum(0).numpy()
        chosen = int(np.searchsorted(cumulative, self.R.random() * cumulative[-1], side="right"))
        coarse = [-(-n // 3) for n in shape]
        return np.array(np.unravel_index(min(chosen, len(cumulative) - 1), coarse), dtype=np.float64) * 3

    def _pushed(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the flat index of the voxel that each voxel's tissue comes from."""
        centre, radius, _ = self._lobes[0]
        offsets = [o - float(c) for o, c in zip(_axes(shape), centre, strict=True)]
        distance = (offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2).sqrt_()
        push = self._push * radius * torch.exp(-(distance**2) / (2 * (1.5 * radius) ** 2))
        shrink = (1 - push / distance.clamp(min=1.0)).clamp_(0, 1)
        index = torch.zeros(tuple(shape), dtype=torch.int64)
        for n, c, offset in zip(shape, centre, offsets, strict=True):
            index = index * n + (offset * shrink + float(c)).round_().clamp_(0, n - 1).long()
        return index

    def _grow(self, structure: torch.Tensor) -> torch.Tensor:
        shape = structure.shape
        generator = torch.Generator().manual_seed(self._seed)
        core = torch.full(shape, -1e3)
        for centre, radius, stretch in self._lobes:
            along = [stretch[i, i] * (o - float(c)) for i, (o, c) in enumerate(zip(_axes(shape), centre, strict=True))]
            core = torch.maximum(core, radius - (along[0] ** 2 + along[1] ** 2 + along[2] ** 2).sqrt_())
        coarse = smooth_noise(shape, max(8.0, 0.8 * self._radius), generator)
        medium = smooth_noise(shape, max(4.0, 0.3 * self._radius), generator)
        fine = smooth_noise(shape, 3.0, generator)
        core += self._rough * self._radius * (0.35 * coarse + 0.3 * medium)
        solid = _SOLID[structure]
        tumor = torch.zeros(shape, dtype=torch.uint8)
        if self._reach > 0:
            way = _REACHABLE[structure]
            # the way of a neighbourhood, or else every voxel between cortex and white matter would be an island
            smooth_way = functional.avg_pool3d(way.clamp(min=-1)[None], 5, 1, 2, count_include_pad=False)[0]
            oedema = 1 + core / self._reach + self._irregular * (0.7 * coarse + 0.4 * medium) + smooth_way
            tumor[(oedema > 0) & (way > -1)] = OEDEMA
        core += 0.6 * fine
        inside = (core > 0) & solid
        tumor[inside] = NECROTIC
        if not self._low_grade:
            depth = core - self._outer
            width = self._rim * (1 + self._rim_roughness * (0.5 * medium + 0.3 * fine))
            enhancing = (depth > 0) & (depth < width) & (fine + 0.5 * medium > -2.0 + 2.0 * self._speckle)
            tumor[enhancing & solid] = ENHANCING
        return tumor


class RandAddLesionsd(RandomizableTransform, MapTransform):
    """Turn white matter next to the ventricles, and small spots elsewhere, into lesions of age that are no tumour.

    Args:
        keys: label maps ``(1, D, H, W)`` with FreeSurfer's values.
        prob: probability of lesions.
        extent: largest mean share of the white matter that spots take.
    """

    def __init__(self, keys: KeysCollection = "label", prob: float = 0.4, extent: float = 0.02) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.extent = extent

    def randomize(self, data: Any = None) -> None:
        """Draw how many lesions there are, and how far they reach from the ventricles."""
        super().randomize(None)
        self._share = self.extent * self.R.random() ** 2
        self._caps = int(self.R.randint(0, 3))
        self._size = self.R.uniform(4.0, 9.0)
        self._seed = int(self.R.randint(2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the maps with lesions as FreeSurfer's value 77, shape and dtype as before."""
        d = dict(data)
        self.randomize()
        for key in self.key_iterator(d) if self._do_transform else ():
            labels = torch.as_tensor(d[key])
            structure = structures(labels[0], key)
            generator = torch.Generator().manual_seed(self._seed)
            noise = smooth_noise(structure.shape, self._size, generator)
            spots = noise > torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - self._share - 1e-6))
            near = structure == _VENTRICLES
            for _ in range(self._caps):
                near = touching(near)
            lesion = (spots | (near & (noise > -0.3))) & (structure == _WHITE)
            d[key] = labels.masked_fill(lesion[None], _LESION)
        return d


def smooth_noise(shape: Sequence[int], scale: float, generator: torch.Generator) -> torch.Tensor:
    """Draw smooth noise of mean 0 and standard deviation about 1.

    Args:
        shape: ``(D, H, W)``.
        scale: distance of the control points between which it is interpolated, voxels.
        generator: where it is drawn from.

    Returns:
        ``(D, H, W)`` float32.
    """
    points = [max(2, round(n / scale) + 1) for n in shape]
    control = torch.randn(1, 1, *points, generator=generator)
    # interpolating lowers the standard deviation: by (2/3)^(1/2) for each axis
    return functional.interpolate(control, tuple(shape), mode="trilinear", align_corners=True)[0, 0] * 1.5**1.5


def _axes(shape: Sequence[int]) -> list[torch.Tensor]:
    """Return the voxels' coordinates along each axis, in shapes that broadcast."""
    views = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
    return [torch.arange(n, dtype=torch.float32).view(v) for n, v in zip(shape, views, strict=True)]

"""Cuts a randomly turned, scaled and warped patch out of a label map, computing nothing outside the patch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

__all__ = ["RandDeformLabelsd"]


class RandDeformLabelsd(RandomizableTransform, MapTransform):
    """Sample a patch of labels under a random affine and elastic deformation, nearest neighbour.

    A patch voxel ``v`` (relative to the patch's centre) shows the label at ``c + A v + u(v)``: ``c`` a random voxel of the
    brain, ``A`` rotation, scaling, shear and mirroring, ``u`` smooth. What lies outside the label map is 0.

    Args:
        keys: label maps ``(1, D, H, W)``; the first axis is left-right.
        patch_size: size of the patch in voxels.
        rotation: largest angle about each axis, rad.
        scaling: largest relative change of size along each axis.
        shear: largest shear.
        elastic: largest standard deviation of the displacement ``u`` at its control points, voxels.
        control_points: least and largest number of control points along an axis.
        prob_flip: probability of left-right mirroring.
        prob_anywhere: probability that the centre is any voxel of the map that is not 0, not one of the brain.

    Raises:
        ValueError: if the patch has no three positive sizes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int] = (96, 96, 96),
        rotation: float = 0.3,
        scaling: float = 0.15,
        shear: float = 0.08,
        elastic: float = 3.0,
        control_points: tuple[int, int] = (4, 9),
        prob_flip: float = 0.5,
        prob_anywhere: float = 0.1,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise ValueError(f"patch_size is {patch_size}, expected three positive sizes")
        self.patch_size = tuple(patch_size)
        self.rotation, self.scaling, self.shear = rotation, scaling, shear
        self.elastic, self.control_points = elastic, control_points
        self.prob_flip, self.prob_anywhere = prob_flip, prob_anywhere

    def randomize(self, data: torch.Tensor) -> None:
        """Draw the centre, the affine and the displacements of the control points."""
        super().randomize(None)
        anywhere = self.R.random() < self.prob_anywhere
        # FreeSurfer's brain has values below 100; 24 is the fluid around it. A coarse grid is enough to find a centre.
        coarse = data[::4, ::4, ::4]
        inside = (coarse > 0) if anywhere else (coarse > 0) & (coarse < 100) & (coarse != 24)
        candidates = inside.nonzero()
        if len(candidates) == 0:
            self._centre = (np.array(data.shape) - 1) / 2.0
        else:
            self._centre = candidates[self.R.randint(len(candidates))].numpy() * 4.0 + self.R.uniform(-8, 8, 3)
        angles = self.R.uniform(-self.rotation, self.rotation, 3)
        scale = np.exp(self.R.uniform(-1, 1) * self.scaling * 0.7 + self.R.uniform(-1, 1, 3) * self.scaling * 0.5)
        matrix = np.diag(scale)
        for axis, angle in enumerate(angles):
            a, b = [i for i in range(3) if i != axis]
            turn = np.eye(3)
            turn[a, a] = turn[b, b] = np.cos(angle)
            turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
            matrix = turn @ matrix
        matrix = matrix @ (np.eye(3) + self.R.uniform(-self.shear, self.shear, (3, 3)) * (1 - np.eye(3)))
        if self.R.random() < self.prob_flip:
            matrix[0] *= -1
        self._matrix = matrix
        points = self.R.randint(self.control_points[0], self.control_points[1] + 1)
        # Closer control points get smaller displacements, or else the warp folds.
        strength = self.elastic * self.R.random() * min(1.0, 5.0 / points)
        self._displacement = self.R.normal(0, strength, (1, 3, points, points, points)).astype(np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each label map by a patch ``(1, *patch_size)``, int16."""
        d = dict(data)
        first = True
        for key in self.key_iterator(d):
            labels = torch.as_tensor(d[key])[0]
            labels = labels.as_tensor() if hasattr(labels, "as_tensor") else labels
            if first:
                self.randomize(labels)
                index, outside = self._index(labels.shape)
                first = False
            d[key] = torch.take(labels, index).to(torch.int16).masked_fill_(outside, 0)[None]
        return d

    def _index(self, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the flat index of every patch voxel in the label map, and which voxels lie outside it."""
        warp = functional.interpolate(
            torch.from_numpy(self._displacement), self.patch_size, mode="trilinear", align_corners=True
        )[0]
        axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in self.patch_size]
        matrix = torch.from_numpy(self._matrix).float()
        index = torch.zeros(self.patch_size, dtype=torch.int64)
        outside = torch.zeros(self.patch_size, dtype=torch.bool)
        for i in range(3):
            line = [axes[j] * matrix[i, j] for j in range(3)]
            place = warp[i] + line[0][:, None, None] + line[1][None, :, None]
            place += line[2][None, None, :] + float(self._centre[i])
            nearest = place.round_().to(torch.int32)
            outside |= (nearest < 0) | (nearest >= shape[i])
            index = index * shape[i] + nearest
        return index.masked_fill_(outside, 0), outside

"""Super-resolution of diffusion tensors patch by patch: loss, inference over a whole brain, errors by region."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import nn
from torch.nn import functional

from memnet.diffusion.tensors import SYMMETRIC, fractional_anisotropy, mean_diffusivity
from memnet.metadata import plain_tensor
from memnet.transforms.tensors import EDGE, INTERIOR, interpolate, turn
from memnet.workflow.checkpoints import load_weights
from memnet.workflow.inferers import bfloat16_autocast

__all__ = ["InterpolateTensorsd", "Refiner", "TensorLoss", "ValidPatchInferer", "errors_in"]

Quantity = Literal["tensor", "md", "fa"]
Region = Literal["interior", "edge", "total"]

_IN_1E5 = 100.0  # from um^2/ms to 1e-5 mm^2/s
# signs of the axes; the first two and the first four are groups
_REFLECTIONS = [(1, 1, 1), (-1, -1, -1), (-1, 1, 1), (1, -1, -1), (1, -1, 1), (-1, 1, -1), (1, 1, -1), (-1, -1, 1)]
_REGIONS = {"interior": (INTERIOR,), "edge": (EDGE,), "total": (EDGE, INTERIOR)}


class TensorLoss(nn.Module):
    """Mean squared or absolute error of the tensors' entries over the voxels of the brain.

    Args:
        kind: ``"squared"`` or ``"absolute"``.

    Raises:
        ValueError: the kind is neither.
    """

    def __init__(self, kind: Literal["squared", "absolute"] = "squared") -> None:
        super().__init__()
        if kind not in ("squared", "absolute"):
            raise ValueError(f"the loss is {kind!r}, expected 'squared' or 'absolute'")
        self.kind = kind

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the mean.

        Args:
            pred: ``(B, 6, D, H, W)``.
            label: ``(B, 7, D, H, W)``, the tensors and their regions, 0 outside the brain.
        """
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))  # half precision would round the labels
        brain = (label[:, 6:] > 0).to(pred.dtype)
        difference = pred - label[:, :6]
        error = difference.square() if self.kind == "squared" else difference.abs()
        return (error * brain).sum() / (6 * brain.sum()).clamp(min=1)


class ValidPatchInferer(Inferer):
    """Refine a volume patch by patch as a network of valid convolutions was trained on patches.

    Patches overlap by what a network sees and does not refine, so that what it makes of them lies side by side. Padded
    convolutions within a network meet the border of a patch wherever they are in the volume, as in training. The volume goes
    on beyond its faces with their values.

    A network does not refine a brain's mirror image as it refines the brain. So several reflections of the volume may be refined,
    reflected back, tensors included, and averaged.

    Args:
        patch_size: voxels a side of a patch.
        border: voxels on each side of a patch that are not refined.
        batch_size: patches at once.
        amp: autocast to bfloat16; ``None`` decides by :func:`memnet.workflow.inferers.supports_bfloat16`.
        reflections: how many are averaged, of tensors in NIfTI's order and the grid's axes: 1, the volume alone; 2, also its
            reflection through a point; 4, these and their reflections along the first axis; 8, all.

    Raises:
        ValueError: nothing is left of a patch without its border, or ``reflections`` is none of these; at run time, if other than
            six channels are to be reflected.

    References:
        Seven ways to improve example-based single image super resolution (Timofte, Rothe, Van Gool, 2016),
        https://arxiv.org/abs/1511.02228
    """

    def __init__(
        self,
        patch_size: int = 11,
        border: int = 2,
        batch_size: int = 32,
        amp: bool | None = False,
        reflections: int = 1,
    ) -> None:
        super().__init__()
        if patch_size <= 2 * border:
            raise ValueError(f"patch_size must be larger than twice the border of {border}, got {patch_size}")
        self.patch_size, self.border, self.batch_size, self.amp = patch_size, border, batch_size, amp
        if reflections not in (1, 2, 4, 8):
            raise ValueError(f"reflections must be 1, 2, 4 or 8, got {reflections}")
        self.reflections = reflections

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., Any],
        *args: Any,
        brain: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Refine.

        Args:
            inputs: ``(B, C, D, H, W)``.
            network: the network.
            args: what else it takes.
            brain: ``(B, 1, D, H, W)``, above 0 in the brain; patches without any are not refined.
            kwargs: what else it takes, by name.

        Returns:
            ``(B, C', r D, r H, r W)``, 0 in patches without brain.
        """
        inputs = plain_tensor(inputs)
        brain = torch.ones(len(inputs), 1, *inputs.shape[2:]) if brain is None else plain_tensor(brain).cpu()
        if self.reflections == 1:
            return self._refine(inputs, brain, network, *args, **kwargs)
        if inputs.shape[1] != len(SYMMETRIC):
            raise ValueError(f"only tensors of {len(SYMMETRIC)} channels are reflected, got {inputs.shape[1]}")
        total: Any = 0
        for sign in _REFLECTIONS[: self.reflections]:
            axes = [2 + i for i in range(3) if sign[i] < 0]
            total += _reflect(self._refine(_reflect(inputs, sign), brain.flip(axes), network, *args, **kwargs), sign)
        return total / self.reflections

    def _refine(
        self, inputs: torch.Tensor, brain: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        sizes, stride = inputs.shape[2:], self.patch_size - 2 * self.border
        counts = [-(-n // stride) for n in sizes]
        after = [stride * count - n + self.border for count, n in zip(counts, sizes, strict=True)]
        padded = functional.pad(inputs, [p for end in reversed(after) for p in (self.border, end)], mode="replicate")
        corners = [
            (b, [stride * k for k in place])
            for b in range(len(inputs))
            for place in itertools.product(*(range(count) for count in counts))
            if (brain[b, 0][tuple(slice(stride * k, stride * (k + 1)) for k in place)] > 0).any()
        ]
        result: torch.Tensor | None = None
        rate = 1
        for start in range(0, len(corners), self.batch_size):
            part = corners[start : start + self.batch_size]
            patches = torch.stack(
                [padded[b][(slice(None), *(slice(s, s + self.patch_size) for s in at))] for b, at in part]
            )
            with bfloat16_autocast(inputs.device, self.amp):
                refined = network(patches, *args, **kwargs).to(inputs.dtype)
            if result is None:
                rate = refined.shape[-1] // stride
                result = refined.new_zeros(
                    (len(inputs), refined.shape[1], *(rate * stride * count for count in counts))
                )
            for (b, at), patch in zip(part, refined, strict=True):
                result[b][(slice(None), *(slice(rate * s, rate * (s + stride)) for s in at))] = patch
        assert result is not None
        return result[:, :, : rate * sizes[0], : rate * sizes[1], : rate * sizes[2]]


def _reflect(inputs: torch.Tensor, sign: tuple[int, int, int]) -> torch.Tensor:
    return torch.stack([turn(x, (0, 1, 2), sign) for x in inputs])


class Refiner:
    """Another trained network to draw beside the one in use, loaded when it is first asked.

    Args:
        network: the network.
        weights: its weights; None where it is not wanted.
        inferer: how it is run.
        device: where it is run.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None,
        inferer: ValidPatchInferer,
        device: str | torch.device = "cpu",
    ) -> None:
        self.network, self.weights, self.inferer, self.device = network, weights, inferer, device
        self._loaded = False

    def __call__(self, image: torch.Tensor) -> torch.Tensor | None:
        """Refine ``(B, 6, D, H, W)``; None without weights.

        Raises:
            ValueError: the weights do not fit.
        """
        if self.weights is None:
            return None
        if not self._loaded:
            load_weights(self.network, self.weights)
            self.network.to(self.device).eval()
            self._loaded = True
        with torch.no_grad():
            return self.inferer(image.to(self.device), self.network)


class InterpolateTensorsd(MapTransform):
    """Add what trilinear and cubic interpolation make of the coarse tensors, to compare with.

    Args:
        keys: the coarse tensors ``(6, D, H, W)``, completed beyond the brain.
        rate: how many times as fine.
    """

    def __init__(self, keys: KeysCollection = "image", rate: int = 2) -> None:
        super().__init__(keys)
        self.rate = rate

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add ``trilinear`` and ``cubic``, ``(6, r D, r H, r W)``."""
        d = dict(data)
        for key in self.key_iterator(d):
            d["trilinear"], d["cubic"] = (interpolate(d[key].cpu(), self.rate, order) for order in (1, 3))
        return d


def errors_in(
    region: Region, method: str = "pred", quantity: Quantity = "tensor"
) -> Callable[[Sequence[Mapping[str, Any]]], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Return the ``output_transform`` that gives a metric what was predicted, and what is so, in a region of the brain.

    Args:
        region: ``interior``, ``edge`` or ``total``; see :class:`memnet.transforms.tensors.MarkRegionsd`.
        method: the entry that is compared: ``pred``, ``trilinear``, ``cubic``, or ``from_signals``, the tensors
            fitted to interpolated signals.
        quantity: ``tensor``, its six entries in 1e-5 mm^2/s; ``md``, mean diffusivity in 1e-5 mm^2/s; ``fa``, fractional
            anisotropy, no unit.

    Returns:
        A function of an evaluator's output to a list of ``(entries, voxels)`` for the method and one for the label.

    Raises:
        ValueError: an argument is none of these.
    """
    if region not in _REGIONS or quantity not in ("tensor", "md", "fa"):
        raise ValueError(f"cannot measure {quantity!r} in {region!r}")

    def values(tensors: torch.Tensor) -> torch.Tensor:
        if quantity == "tensor":
            return tensors.float() * _IN_1E5
        of = np.moveaxis(tensors.cpu().numpy(), 0, -1)
        found = mean_diffusivity(of) * _IN_1E5 if quantity == "md" else fractional_anisotropy(of)
        return torch.from_numpy(np.asarray(found, dtype=np.float32))[None]

    def transform(output: Sequence[Mapping[str, Any]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        predicted, truth = [], []
        for case in output:
            label = torch.as_tensor(case["label"]).cpu()
            chosen = torch.isin(label[6], torch.tensor(_REGIONS[region], dtype=label.dtype))
            predicted.append(values(torch.as_tensor(case[method]).cpu()[:6, chosen]))
            truth.append(values(label[:6, chosen]))
        return predicted, truth

    return transform

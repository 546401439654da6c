"""What the segmentation networks share: any input size, the regularising branch, the memory strategy."""

from typing import Literal

import torch
from monai.networks.layers.factories import Conv
from torch import nn
from torch.nn import functional

from memnet.budget import fit_to_budget
from memnet.chain import Chain, Memory
from memnet.nets.precision import sound_autocast
from memnet.nets.vae import VariationalBranch
from memnet.normalization import NormLeakyReLU

__all__ = ["SegmentationNetwork", "level_widths", "norm_act_conv"]


def norm_act_conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return instance norm, leaky ReLU and a 3^d convolution, in this order: the increment of a residual stream."""
    return nn.Sequential(
        NormLeakyReLU(in_channels, spatial_dims),
        Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3, padding=1, bias=False),
    )


def level_widths(channels: int, n_levels: int) -> list[int]:
    """Return the channels of each level of a U-Net, doubling on the way down.

    Raises:
        ValueError: ``channels`` or ``n_levels`` is less than 1.
    """
    for name, value in {"channels": channels, "n_levels": n_levels}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return [channels * 2**level for level in range(n_levels)]


class SegmentationNetwork(nn.Module):
    """Base of the U-Nets: pads the input inside, crops the output, adds the variational branch in training.

    A subclass defines ``features``: padded input ``(B, in_channels, ...)`` to ``[logits, *deepest features]``.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        n_levels: resolutions of the U; the input is padded to a multiple of ``2^(n_levels - 1)``.
        vae: add the variational branch in training.
        deepest_channels: channels of the deepest features, which the branch takes.

    Attributes:
        memory_budget: bytes for the network's forward and backward pass under ``memory="auto"``, such as ``"12GiB"``.

    Raises:
        ValueError: an argument is out of range.
    """

    __jit_unused_properties__ = ["memory"]

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, n_levels: int, vae: bool, deepest_channels: int
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "out_channels": out_channels, "n_levels": n_levels}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.memory_budget: int | str | None = None
        # Twice the resampling factor leaves two voxels at the deepest level, the least that instance norm can normalise.
        self.multiple = 2 ** (n_levels - 1)
        self.vae = VariationalBranch(spatial_dims, deepest_channels, in_channels, n_levels - 1) if vae else None

    @property
    def memory(self) -> Memory | Literal["auto"]:
        """The memory strategy of the network's chains; see :class:`memnet.Chain`."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory | Literal["auto"]) -> None:
        for name, child in self.named_children():
            if name != "vae":  # the branch looks after itself
                for chain in child.modules():
                    if isinstance(chain, Chain):
                        chain.memory = memory
        self._memory = memory

    def forward(self, x: torch.Tensor):
        """Segment.

        Args:
            x: image ``(B, in_channels, D, H, W)`` (or 2D, 1D) of any size.

        Returns:
            Logits ``(B, out_channels, D, H, W)``. In training with the variational branch a tuple of the logits and the
            branch's losses ``(B, 2)``: mean squared reconstruction error and Kullback-Leibler divergence.

        Raises:
            ValueError: the number of channels or dimensions is not the network's.
        """
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}) and {self.spatial_dims} spatial sizes, got {x.shape}"
            )
        if not torch.jit.is_scripting():
            fit_to_budget(self, self.memory_budget, [x])
        padding: list[int] = []
        for i in range(self.spatial_dims):
            size = x.shape[x.dim() - 1 - i]
            padded = max(2 * self.multiple, -(-size // self.multiple) * self.multiple)
            padding += [(padded - size) // 2, padded - size - (padded - size) // 2]
        image = functional.pad(x, padding, mode="replicate") if max(padding) > 0 else x
        if torch.jit.is_scripting():
            return self._cropped(self.features(image)[0], x, padding)
        else:  # TorchScript compiles whatever stands outside
            with sound_autocast(image, image.shape[2] // self.multiple):
                outputs = self.features(image)
                logits = self._cropped(outputs[0], x, padding)
                if self.vae is not None and self.training:
                    return logits, self.vae(outputs[1:], image)
            return logits

    def _cropped(self, logits: torch.Tensor, x: torch.Tensor, padding: list[int]) -> torch.Tensor:
        for i in range(self.spatial_dims):
            dim = x.dim() - 1 - i
            if logits.shape[dim] != x.shape[dim]:
                logits = logits.narrow(dim, padding[2 * i], x.shape[dim])
        return logits

    @torch.jit.unused
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.vae is None:
            # Weights trained with the branch serve a network without it: it exists in training alone.
            unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(f"{prefix}vae.")]

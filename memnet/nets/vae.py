"""The variational branch that regularises a segmentation network by reconstructing its input."""

from collections.abc import Callable, Sequence

import torch
from monai.networks.layers.factories import Conv
from torch import nn
from torch.nn import functional

from memnet.chain import Chain

__all__ = ["VariationalBranch"]

_LATENT = 128
_GRID = 4  # the deepest features are averaged to at most this many cells a side, so that any input size works
_BOTTLENECK = 16


class VariationalBranch(nn.Module):
    """Variational autoencoder branch: deepest features to a 128-dimensional Gaussian, and back to the input image.

    Features are reduced to 16 channels and averaged to 4 cells a side, which makes the branch independent of the input's
    size; a linear layer gives 128 means and 128 log-variances; a sample is decoded by upsampling with few channels
    and recomputed in the backward pass, so that the branch does not set a network's memory peak.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the deepest features.
        out_channels: channels of the image to reconstruct.
        n_upsamplings: factors of 2 between the deepest features and the image.

    References:
        3D MRI brain tumor segmentation using autoencoder regularization (Myronenko, 2018), https://arxiv.org/abs/1810.11654
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, n_upsamplings: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.grid = (_GRID,) * spatial_dims
        n_cells = _GRID**spatial_dims
        self.reduce = nn.Sequential(conv(in_channels, _BOTTLENECK, 1), nn.LeakyReLU())
        self.encode = nn.Linear(_BOTTLENECK * n_cells, 2 * _LATENT)
        self.decode = nn.Sequential(nn.Linear(_LATENT, _BOTTLENECK * n_cells), nn.LeakyReLU())
        widths = [max(8, 2**i * 4) for i in range(n_upsamplings, -1, -1)]
        self.expand = conv(_BOTTLENECK, widths[0], 1)
        stages = [_Upsampling(spatial_dims, a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.upsample = Chain(stages, memory="checkpoint", segment=1) if stages else None
        self.reconstruct = conv(widths[-1], out_channels, 1)

    @torch.jit.unused
    def forward(self, features: Sequence[torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        """Compute the branch's losses.

        Args:
            features: the deepest features, ``(B, c, d, h, w)`` each; concatenated along the channels.
            image: what to reconstruct, ``(B, out_channels, D, H, W)``.

        Returns:
            ``(B, 2)``: mean squared error of the reconstruction, and the mean over the latent dimensions of
            ``mu^2 + sigma^2 - log sigma^2 - 1``.
        """
        joined = torch.cat(list(features), 1)
        cells = self.reduce(joined)
        pool: tuple[Callable[..., torch.Tensor], ...] = (
            functional.adaptive_avg_pool1d,
            functional.adaptive_avg_pool2d,
            functional.adaptive_avg_pool3d,
        )
        cells = pool[len(self.grid) - 1](cells, self.grid)
        mean, log_variance = self.encode(cells.flatten(1)).float().chunk(2, 1)
        # Beyond these bounds exp() overflows half precision long before the divergence could pull the value back.
        log_variance = log_variance.clamp(-20.0, 20.0)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = self.decode(sample).reshape(-1, _BOTTLENECK, *self.grid)
        decoded = self.expand(_resize(decoded, list(joined.shape[2:])))
        if self.upsample is not None:
            decoded = self.upsample(decoded)
        error = (self.reconstruct(decoded).float() - image.float()).square().flatten(1).mean(1)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).mean(1)
        return torch.stack([error, divergence], 1)


class _Upsampling(nn.Module):
    """Upsampling by 2, then a convolution, instance norm and leaky ReLU."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3, padding=1)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _resize(self.conv(x), [2 * size for size in x.shape[2:]])
        return self.act(functional.instance_norm(x))

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x]`` to ``[y]``."""
        return [self.forward(state[0])]


def _resize(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    mode = "linear" if x.dim() == 3 else "bilinear" if x.dim() == 4 else "trilinear"
    return functional.interpolate(x, size=size, mode=mode, align_corners=False)

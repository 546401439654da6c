"""Losses of the papers."""

import torch
from monai.losses import DiceCELoss
from torch import nn

__all__ = ["InvResLoss"]


class InvResLoss(nn.Module):
    r"""Segmentation loss with variational regularisation.

    .. math:: L = L_{CE} + L_{Dice} + \lambda_{L2} L_{L2} + \lambda_{KL} L_{KL}

    Args:
        lambda_l2: weight of the reconstruction error.
        lambda_kl: weight of the Kullback-Leibler divergence.
        include_background: count the background in the Dice term; the papers' regions leave it out.

    References:
        Invertible residual network with regularization for effective volumetric segmentation (Yamazaki et al., 2021)
    """

    def __init__(self, lambda_l2: float = 0.1, lambda_kl: float = 0.1, include_background: bool = False) -> None:
        super().__init__()
        self.lambda_l2 = lambda_l2
        self.lambda_kl = lambda_kl
        self.segmentation = DiceCELoss(to_onehot_y=True, softmax=True, include_background=include_background)

    def forward(
        self, prediction: torch.Tensor | tuple[torch.Tensor, torch.Tensor], target: torch.Tensor
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            prediction: logits ``(B, C, D, H, W)``, or these and the ``(B, 2)`` losses of the variational branch.
            target: labels ``(B, 1, D, H, W)``.

        Returns:
            A scalar.
        """
        if isinstance(prediction, torch.Tensor):
            return self.segmentation(prediction.float(), target)
        logits, regularisation = prediction
        l2, kl = regularisation.float().mean(0)
        return self.segmentation(logits.float(), target) + self.lambda_l2 * l2 + self.lambda_kl * kl

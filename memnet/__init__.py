"""Deep 3D networks for medical images, trained in a fraction of the memory.

A network says what is computed, a memory strategy says what backpropagation keeps: see :class:`memnet.Chain`. Importing
this package also makes its networks reachable as ``monai.networks.nets.<Name>``.
"""

import monai.networks.nets

from memnet import nets
from memnet.chain import Chain, Memory, set_memory
from memnet.couplings import AdditiveCoupling, ChannelMerge, ChannelSplit
from memnet.invertible import DriftError, Invertible, Recorded
from memnet.losses import InvResLoss
from memnet.mri.operators import SenseOperator
from memnet.mri.solvers import conjugate_gradient
from memnet.nets import ESPCN, ESPCNRevNet, FullyInvResUNet, MoDL, PartiallyInvResUNet, UNet3D
from memnet.nets.modl_steps import DataConsistency, Regularization, ResidualCNN
from memnet.resampling import InvertibleDownsample, InvertibleUpsample, OrthogonalMixing, Tap
from memnet.residual import InvertibleResidual
from memnet.tiles import run_in_tiles

__version__ = "0.1.0"

__all__ = [
    "ESPCN",
    "ESPCNRevNet",
    "AdditiveCoupling",
    "Chain",
    "ChannelMerge",
    "ChannelSplit",
    "DataConsistency",
    "DriftError",
    "FullyInvResUNet",
    "InvResLoss",
    "Invertible",
    "InvertibleDownsample",
    "InvertibleResidual",
    "InvertibleUpsample",
    "Memory",
    "MoDL",
    "OrthogonalMixing",
    "PartiallyInvResUNet",
    "Recorded",
    "Regularization",
    "ResidualCNN",
    "SenseOperator",
    "Tap",
    "UNet3D",
    "conjugate_gradient",
    "run_in_tiles",
    "set_memory",
]

for _name in nets.__all__:
    setattr(monai.networks.nets, _name, getattr(nets, _name))

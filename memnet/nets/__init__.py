"""Networks built on the chain."""

from memnet.nets.espcn import ESPCN, ESPCNRevNet
from memnet.nets.invres import FullyInvResUNet, PartiallyInvResUNet
from memnet.nets.modl import MoDL
from memnet.nets.unet3d import UNet3D

__all__ = ["ESPCN", "ESPCNRevNet", "FullyInvResUNet", "MoDL", "PartiallyInvResUNet", "UNet3D"]

"""The Generic Perceptual Loss (Liu et al., CVPR 2021), accelerated end to end."""

from gpl_fast import functional, reference
from gpl_fast.backend import BackendUnavailable
from gpl_fast.loss import GenericPerceptualLoss
from gpl_fast.lossnet import LossNet
from gpl_fast.perceptual import PerceptualLoss
from gpl_fast.segmentation import SegmentationLoss
from gpl_fast.targets import TargetFeatures, TopK

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "GenericPerceptualLoss",
    "LossNet",
    "PerceptualLoss",
    "SegmentationLoss",
    "TargetFeatures",
    "TopK",
    "functional",
    "reference",
]

"""The frozen network: its structure, random weights, chains and modules from elsewhere, files."""

from gpl_fast.net.lossnet import LossNet

__all__ = ["LossNet"]

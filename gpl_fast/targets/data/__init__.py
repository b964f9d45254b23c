"""Targets as data: what a dataset returns and a file holds."""

from gpl_fast.targets.data.batch import Batch
from gpl_fast.targets.data.features import TargetFeatures
from gpl_fast.targets.data.topk import TopK

__all__ = ["Batch", "TargetFeatures", "TopK"]

"""What a prediction is compared with: dense maps, labels, top-k maps, stored features.

`data` holds targets as data, `resolve` finds the kind of whatever is given; each kind is a class
(`dense`, `labels`, `topk`, `features`, behind `target.Target`) that validates, makes the map and
hands out tensors; `masks` say which pixels count, and `values` how values are looked at.
"""

from torch import Tensor

from gpl_fast.targets.data import TargetFeatures, TopK
from gpl_fast.targets.dense import DenseTarget, first_look
from gpl_fast.targets.elements import (
    count_elements,
    resolve_element_teacher,
    resolve_elements,
)
from gpl_fast.targets.features import EncodedTarget, FeatureTarget, feature_settings
from gpl_fast.targets.labels import LabelTarget
from gpl_fast.targets.masks import normalise_mask
from gpl_fast.targets.multi_hot import IGNORED
from gpl_fast.targets.resolve import (
    count_labels,
    resolve_labels,
    resolve_style,
    resolve_target,
    resolve_teacher,
    weights_of_pixels,
)
from gpl_fast.targets.target import Target
from gpl_fast.targets.topk import TopKTarget

# A map in any form, which `encode` takes, and what the losses take as a target.
TargetMap = Tensor | TopK
TargetLike = TargetMap | TargetFeatures

__all__ = [
    "IGNORED",
    "DenseTarget",
    "EncodedTarget",
    "FeatureTarget",
    "LabelTarget",
    "Target",
    "TargetFeatures",
    "TargetLike",
    "TargetMap",
    "TopK",
    "TopKTarget",
    "count_elements",
    "count_labels",
    "feature_settings",
    "first_look",
    "normalise_mask",
    "resolve_element_teacher",
    "resolve_elements",
    "resolve_labels",
    "resolve_style",
    "resolve_target",
    "resolve_teacher",
    "weights_of_pixels",
]

"""What a prediction is compared with: dense maps, labels, top-k maps, stored features, masks.

`topk` and `features` are targets as data (`batch` is what they share), `resolve` validates whatever
is given, `values` holds the operators that look at what is in it.
"""

from gpl_fast.targets.features import TargetFeatures
from gpl_fast.targets.resolve import (
    Target,
    first_look,
    label_plane,
    normalise_mask,
    resolve_target,
)
from gpl_fast.targets.topk import TopK
from gpl_fast.targets.values import check_labels, check_same_mask

__all__ = [
    "Target",
    "TargetFeatures",
    "TopK",
    "check_labels",
    "check_same_mask",
    "first_look",
    "label_plane",
    "normalise_mask",
    "resolve_target",
]

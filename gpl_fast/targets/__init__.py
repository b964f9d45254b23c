"""What a prediction is compared with: dense maps, labels, top-k maps, stored features, masks.

`topk` and `features` are targets as data, `resolve` validates whatever is given, `values` holds
the operators that look at what is in it.
"""

from gpl_fast.targets.features import TargetFeatures
from gpl_fast.targets.resolve import Target, label_plane, normalise_mask, resolve_target
from gpl_fast.targets.topk import TopK
from gpl_fast.targets.values import check_labels

__all__ = [
    "Target",
    "TargetFeatures",
    "TopK",
    "check_labels",
    "label_plane",
    "normalise_mask",
    "resolve_target",
]

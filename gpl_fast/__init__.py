"""The Generic Perceptual Loss (Liu et al., CVPR 2021), accelerated end to end."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpl_fast import functional, reference
    from gpl_fast.backend import BackendUnavailable
    from gpl_fast.loss import GenericPerceptualLoss
    from gpl_fast.lpips import LPIPS
    from gpl_fast.net import LossNet
    from gpl_fast.perceptual import PerceptualLoss
    from gpl_fast.segmentation import SegmentationLoss
    from gpl_fast.targets import TargetFeatures, TopK

__version__ = "0.2.0"

__all__ = [
    "LPIPS",
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

_HOMES = {
    "LPIPS": "lpips",
    "BackendUnavailable": "backend",
    "GenericPerceptualLoss": "loss",
    "LossNet": "net",
    "PerceptualLoss": "perceptual",
    "SegmentationLoss": "segmentation",
    "TargetFeatures": "targets",
    "TopK": "targets",
}


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use: torch takes seconds, and the command line
    answers ``--version`` and Ctrl-C without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOMES:
        return import_module(f"{__name__}.{name}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

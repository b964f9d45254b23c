"""Losses of other packages beside this torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

# lpips, piq, torchmetrics and MONAI import torchvision; none of their losses calls these.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # its end would take the schemas away


def declare_operators() -> None:
    """Makes ``import torchvision`` work where its compiled operators do not load beside this torch,
    as PyPI's do beside a CPU build: it describes two of them to torch whether they are there or
    not. To be called before that import."""
    spec = find_spec("torchvision")
    if _kept or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        _kept.append(torch.library.Library("torchvision", "DEF"))
        for schema in _SCHEMAS:
            _kept[0].define(schema)

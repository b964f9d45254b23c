"""The binary cross-entropy's kernels for every GPU, and those that read labels of elements."""

from __future__ import annotations

import pairwise
import pytest
import torch
from ahead_of_time import CAPABILITIES, check, compiling_for, meta
from test_kernels import BF16, BYTE, FLOAT, HALF, H, N, W, logits, name

from gpl_fast import kernels
from gpl_fast.net.weights import padded_channels

FACTORS = {
    "capability": CAPABILITIES,
    "stage": ("fwd", "bwd", "pack", "pack beside a teacher", "look"),
    "layout": ("nchw", "channels_last"),
    "dtype": (FLOAT, BF16, HALF),
    "channels": (1, 19, 150, 1203),
    "weighted": (False, True),
}


def launch(stage: str, layout: str, dtype: torch.dtype, channels: int, weighted: bool) -> None:
    x = logits(layout, dtype, channels)
    labels = meta(N, channels, H, W, dtype=BYTE)
    rows = {"labels": labels, "row0": 0, "rows": H, "label_smoothing": 0.1 * weighted}
    if weighted:
        weight = meta(channels, dtype=FLOAT)
        rows |= {
            "class_weight": weight,
            "pos_weight": weight,
            "ce_mask": meta(N, H, W, dtype=FLOAT),
        }
    branch = meta(N, dtype=torch.bool)
    words = {"activation": 2, "target_activation": 0, "temperature": 2.0 if weighted else 1.0}
    if stage == "fwd":
        kernels.binary_ce_fwd(x, **rows, ce_rows=meta(N, H, 2, dtype=torch.float64))
    elif stage == "bwd":
        scale = meta(N, dtype=FLOAT)
        kernels.binary_ce_bwd(x, **rows, dx=x, clear=weighted, ce_scale=scale)
    elif stage == "look":
        kernels.carry_target_fwd(
            x, **words, step=(32, 8), near=1 / 32, from_target=branch, dense=labels,
            elements=labels if weighted else None,
        )  # fmt: skip
    else:
        y = meta(N, H, W, padded_channels(channels), dtype=BF16)
        words["target_activation"] = 2 if "teacher" in stage else 0
        kernels.softmax_pack_fwd(
            x, **words, row0=0, rows=H, core0=0, core_rows=H, from_target=branch, y=y, delta=y,
            target=x if "teacher" in stage else labels,
            elements=labels if weighted or "teacher" in stage else None,
        )  # fmt: skip


@pytest.mark.parametrize(
    "case", pairwise.covering(FACTORS, lambda case: False, lambda case: 0.0), ids=name
)
def test_kernels(case):
    options = dict(case)
    capability = options.pop("capability")
    with compiling_for(capability) as compiled:
        launch(**options)
    assert compiled
    for each in compiled:
        check(each, tensor_core=None, pipelined=False)


def test_any_image_of_a_batch_takes_the_same_kernel():
    x, labels = (meta(1, 5, 8, 64, dtype=dtype) for dtype in (FLOAT, BYTE))
    with compiling_for(90) as compiled:
        for first in (0, 3):
            scale = meta(1 + first, dtype=FLOAT)[first:]
            kernels.binary_ce_bwd(
                x, labels=labels, row0=0, rows=8, dx=x, clear=True, ce_scale=scale
            )
    assert len({each.binary for each in compiled}) == 1

"""Losses of labels of single elements, whose backward is by the CUDA operators: data gradients by
ATen, and each step by one kernel."""

from __future__ import annotations

import pytest
import torch
from elements import CHANNELS, DTYPES, against_float64

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("kind", ["labels", "dense", "resized", "topk", "features"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("mode", CHANNELS)
def test_value_and_gradient(emulated, mode, backend, dtype, kind, decide, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for seed, kernels in enumerate((False, dtype != "float32")):
        decide(
            kernels=kernels, rows=4 * seed or None, backward="emulated",
            stages={"emulated": emulated},
        )  # fmt: skip
        against_float64(mode, kind, DTYPES[dtype], seed, size=(2, 11, 14))

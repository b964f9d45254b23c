"""Options whose backward is by the CUDA operators: what the forward leaves is all that they change,
and the walk has to read it. tests/matrix.py reads the names."""

from __future__ import annotations

import criteria
import pieces
import pytest
import torch

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = ("float32", "bfloat16", "float16")
TF32 = 2e-3  # the kernel's; ATen's on the CPU is float32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def by_cuda(emulated, decide, monkeypatch):
    """Every layer by `conv_block_bwd`, in float32 in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    decide(kernels=True, backward="emulated", stages={"emulated": emulated})


@pytest.mark.parametrize("kind", pieces.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["several-ignored-normalizer-cuda"])
def test_pieces_are_the_whole(option, dtype, kind):
    pieces.assert_the_whole("fast", dtype, kind, draws=9, slack=TF32 if dtype == "float32" else 0.0)


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [f"{word}-cuda" for word in criteria.OPTIONS])
def test_how_features_are_compared(option, dtype, kind):
    words, computed = criteria.OPTIONS[option.partition("-")[0]], criteria.DTYPES[dtype]
    shape, slack = (2, criteria.C, 9, 14), TF32 if dtype == "float32" else 0.0
    draws = [
        criteria.errors(words, kind, computed, 2 * torch.randn(shape), seed) for seed in range(9)
    ]
    less = [tuple(max(e - slack, 0.0) for e in got) for got, _ in draws]
    criteria.agree_in_median(
        [(got, plain) for got, (_, plain) in zip(less, draws, strict=True)], computed
    )

"""Options of a segmentation, backward by the CUDA operators; tests/matrix.py reads the names."""

from __future__ import annotations

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

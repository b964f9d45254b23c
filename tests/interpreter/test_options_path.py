"""Options of a segmentation by Triton's kernels, interpreted; tests/matrix.py reads the names."""

from __future__ import annotations

import pieces
import pytest
import torch
from test_path import WIDE, kernel, wide_tile

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def triton_path(decide, monkeypatch, one_thread):
    """As tests/interpreter/test_path.py's."""
    decide(forward="triton", backward="triton", arch=80, tiles=wide_tile)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for (name, attribute), wide in WIDE.items():
        monkeypatch.setattr(kernel(name), attribute, wide)


@pytest.mark.parametrize("kind", pieces.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["several-ignored-normalizer-triton"])
def test_pieces_are_the_whole(option, dtype, kind):
    pieces.assert_the_whole("fast", dtype, kind, draws=1)

"""Seeds that the forward made, walked back by CUDA's kernels on the CPU: nothing in them has to
know what was compared."""

from __future__ import annotations

import pytest
import torch
from criteria import DTYPES, KINDS, OPTIONS, C, agree_in_median, errors_by_image

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["cuda"])
@pytest.mark.parametrize("option", OPTIONS)
def test_against_float64(option, by, dtype, kind, emulated, decide):
    decide(backward="emulated", stages={"emulated": emulated})
    pred = 2 * torch.randn(7, C, 8, 8)
    draws = errors_by_image(OPTIONS[option], kind, DTYPES[dtype], pred, 1)
    agree_in_median(draws, DTYPES[dtype])

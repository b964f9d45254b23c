"""Options of a segmentation on the reference and on the CPU, in every dtype, against every kind of
target; tests/matrix.py reads the names."""

from __future__ import annotations

import elements
import pieces
import pytest
import torch
from cases import HALF_BOUND, error

from gpl_fast import SegmentationLoss, TopK

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = [("reference", dtype) for dtype in pieces.DTYPES]
CPU = [("fast", dtype) for dtype in pieces.DTYPES if dtype != "float64"]


def named(cells):
    return [pytest.param(b, d, id=f"{b.replace('fast', 'cpu')}-{d}") for b, d in cells]


@pytest.mark.parametrize("kind", pieces.KINDS)
@pytest.mark.parametrize(("backend", "dtype"), named(REFERENCE + CPU))
@pytest.mark.parametrize("option", ["several-ignored-normalizer"])
def test_pieces_are_the_whole(option, backend, dtype, kind):
    pieces.assert_the_whole(backend, dtype, kind, draws=24 if backend == "fast" else 3)


@pytest.mark.parametrize("kind", elements.TARGETS)
@pytest.mark.parametrize(("backend", "dtype"), named(REFERENCE[:3]))
@pytest.mark.parametrize("option", elements.CHANNELS)
def test_labels_of_elements_in_the_dtypes_of_training(option, backend, dtype, kind):
    computed = elements.DTYPES[dtype]
    d = elements.drawn(option, kind, torch.float32, 0)
    results = []
    for by in (torch.float64, computed):
        loss = SegmentationLoss(
            elements.CHANNELS[option], backend=backend, compute_dtype=by, **d.options
        )
        x, teacher = d.logits.detach(), d.teacher
        if by == torch.float64:
            x = x.double()
            if isinstance(teacher, TopK):
                teacher = TopK(teacher.values.double(), teacher.indices, teacher.rest)
            elif isinstance(teacher, torch.Tensor):
                teacher = teacher.double()
        value = loss(x.requires_grad_(), d.labels, teacher, d.mask)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), x)))
    bounds = HALF_BOUND.get(computed, (1e-5, 1e-3))
    for (exact, got), bound in zip(zip(*results, strict=True), bounds, strict=True):
        assert error(got, exact) <= bound

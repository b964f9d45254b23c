"""Every option has a test by everyone who computes it, in every dtype, against every kind of
target: `python tests/matrix.py` prints the table."""

from __future__ import annotations

import matrix
import pytest
import torch

from gpl_fast import (
    LPIPS,
    BackendUnavailable,
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
)

C = 3
X = torch.rand(1, C, 16, 16, dtype=torch.float64)
LABELS = torch.randint(C, (1, 16, 16))


@pytest.mark.slow
def test_no_cell_is_empty():
    found = matrix.filled(matrix.collected())
    assert [" ".join(cell) for cell in matrix.cells() if not found.get(cell)] == []


def test_names_say_which_cells_they_fill():
    found = matrix.filled(
        [
            "tests/cpu/test_x.py::test_y[l1-channels-cpu-bfloat16-labels]",
            "tests/interpreter/test_x.py::test_y[several-ignored-normalizer-triton-float32-teacher]",
            "tests/cpu/test_x.py::test_y[weights-triton-float32-dense]",  # nobody interprets there
            "tests/cpu/test_x.py::test_y[several-cpu-float32-dense]",
            "tests/cpu/test_x.py::test_y[lpips-cpu-float32]",
            "tests/cpu/test_x.py::test_normalizer",
        ]
    )
    assert dict(found) == {
        matrix.Cell("l1", "cpu", "bfloat16", "labels"): 1,
        matrix.Cell("channels", "cpu", "bfloat16", "labels"): 1,
        matrix.Cell("several-ignored", "triton", "float32", "dense"): 1,
        matrix.Cell("normalizer", "triton", "float32", "dense"): 1,
    }
    assert len(matrix.cells()) == 9 * 13 * 4
    row = matrix.table(found).splitlines()[3]
    assert row.split() == ["l1", "labels", *(5 * ["0"]), "1", *(7 * ["0"])]


def calls():
    """A call with each option, whose backend is "fast"."""
    fast, net = {"backend": "fast"}, LossNet.vgg(C, (1, 1), (4, 4))
    generic = {"net": net, **fast}
    mask = torch.rand(1, 16, 16)
    hot = torch.randint(2, (1, C, 16, 16))

    def total(**words):
        return SegmentationLoss(C, net=net, **fast, **words)

    return {
        "l1": lambda: GenericPerceptualLoss(C, criterion="l1", **generic)(X, X),
        "channels": lambda: PerceptualLoss(net, {"pool1": [1.0] * 4}, **fast)(X, X),
        "normalized": lambda: GenericPerceptualLoss(C, normalize_features=True, **generic)(X, X),
        "weights": lambda: GenericPerceptualLoss(C, **generic)(X, X, mask=mask),
        "binary": lambda: SegmentationLoss(1, mode="binary", net="1,1", **fast)(
            X[:, :1], hot[:, 0]
        ),
        "multilabel": lambda: total(mode="multilabel")(X, hot),
        "several-ignored": lambda: total(ignore_index=(7, 255))(X, LABELS),
        "normalizer": lambda: total()(X, LABELS, normalizer=3),
        "lpips": lambda: LPIPS(net, {"pool1": [1.0] * 4}, **fast)(X, X),
    }


@pytest.mark.parametrize("option", matrix.OPTIONS)
def test_cells_that_cannot_be_say_why(option):
    assert {dtype for _, dtype in matrix.CANNOT} == {"float64"}
    (why,) = set(matrix.CANNOT.values())
    with pytest.raises(BackendUnavailable, match=why):
        calls()[option]()

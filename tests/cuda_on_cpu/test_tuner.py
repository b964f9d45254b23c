"""The tuner of the backward, which waits for a GPU, once on the CPU's emulation of one."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpl_fast import ops
from gpl_fast.fast import measured

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tune(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tune

    monkeypatch.setattr(tune, "WIDTHS", (64, 70))
    return tune


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_two_ways_of_the_data_gradient(emulated, tune, dtype, monkeypatch):
    def count(run):
        ran.append(run())
        return float(len(ran))

    ran = []
    monkeypatch.setattr(tune, "operators", emulated)
    rows = tune.measure_data_gradients([19, 1], dtype, "cpu", count, largest=16)
    layers = [(row["first"], row["in_channels"], row["out_channels"]) for row in rows]
    assert layers == [(True, 19, 64), (True, 1, 64), (False, 64, 70)]
    assert [(row["kernel_ms"], row["aten_ms"]) for row in rows] == [(1, 2), (3, 4), (5, 6)]
    for row in rows:
        assert set(row) == set(measured.Row.__annotations__)


def test_a_wrong_kernel_gets_no_row(emulated, tune, monkeypatch, capsys):
    def zeros(*_, dx, **__):
        dx.zero_()

    wrong = SimpleNamespace(
        conv_block_bwd=zeros, conv_block_logits_bwd=zeros,
        relu_pool_bwd=emulated.relu_pool_bwd, softmax_bwd=emulated.softmax_bwd,
    )  # fmt: skip
    monkeypatch.setattr(tune, "operators", wrong)
    assert not tune.measure_data_gradients([3], torch.bfloat16, "cpu", lambda run: 1.0, largest=16)
    assert "do not agree" in capsys.readouterr().err


def test_the_two_softmax_bwd(emulated, tune, monkeypatch, capsys):
    """Triton's, where it cannot be interpreted, is stood for by CUDA's."""

    def count(run):
        run()
        return float(next(number))

    number = itertools.count(1)
    monkeypatch.setattr(tune, "operators", emulated)
    monkeypatch.setattr(tune, "kernels", emulated)
    (row,) = tune.measure_softmax_bwd([19], torch.bfloat16, "cpu", count, size=8)
    assert set(row) == set(measured.SoftmaxRow.__annotations__)
    assert (row["classes"], row["cuda_ms"], row["triton_ms"]) == (19, 1, 2)
    nothing = SimpleNamespace(softmax_bwd=lambda *_, **__: None)
    monkeypatch.setattr(tune, "kernels", nothing)
    assert not tune.measure_softmax_bwd([19], torch.bfloat16, "cpu", count, size=8)
    assert "do not agree" in capsys.readouterr().err

"""Who does the backward on a GPU: the compiled operators or Triton's kernels, and in it the data
gradient: measured rows decide."""

from __future__ import annotations

import json

import pytest
import torch

from gpl_fast import LossNet, chain, ops
from gpl_fast.chain import data_gradient, stages

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


def row(in_channels, kernel_ms, aten_ms=1.0, **changed):
    return {
        "arch": 90, "dtype": "bfloat16", "first": False, "in_channels": in_channels,
        "out_channels": 128, "kernel_size": 3, "stride": 1, "kernel_ms": kernel_ms,
        "aten_ms": aten_ms, "measured": "here",
    } | changed  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    """As if a GPU of sm_90 were there, and the library held CUDA operators for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "cuda_obstacle", lambda d: None if d.type == "cuda" else "a CPU")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A file of the user's own, which goes before what is shipped."""
    found = [row(64, 0.5), row(96, 2.0), row(19, 0.5, first=True, out_channels=64)]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    monkeypatch.setenv("GPL_FAST_DATA_GRADIENT", str(tmp_path / "rows.json"))
    data_gradient.rows.cache_clear()
    yield found
    data_gradient.rows.cache_clear()


def test_shipped_rows_carry_their_measurement():
    data_gradient.rows.cache_clear()
    for found in data_gradient.rows():
        assert set(found) == set(data_gradient.Row.__annotations__)
        assert found["kernel_ms"] > 0
        assert found["aten_ms"] > 0
        assert found["measured"]


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        ((BF16, False, 64, 128, 3, 1), True),
        ((BF16, False, 70, 128, 3, 1), True),  # 64 is nearer than 96
        ((BF16, False, 90, 128, 3, 1), False),  # measured: ATen's is faster
        ((BF16, False, 40, 128, 3, 1), False),  # nothing near was measured
        ((BF16, False, 64, 256, 3, 1), False),
        ((BF16, False, 64, 128, 5, 1), False),
        ((BF16, False, 64, 128, 3, 2), False),
        ((torch.float16, False, 64, 128, 3, 1), False),
        ((BF16, True, 21, 64, 3, 1), True),
    ],
)
def test_the_faster_of_two_measurements(hopper, measured, layer, kernel):
    assert data_gradient.by_kernel(CUDA, *layer) is kernel


def test_no_measurement_of_another_gpu_counts(hopper, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not data_gradient.by_kernel(CUDA, BF16, False, 64, 128, 3, 1)


def test_the_backwards_stages(hopper, monkeypatch):
    assert stages.backward_stages_on(torch.device("cpu")) is ops
    assert stages.backward_stages_on(CUDA) is ops
    monkeypatch.setattr(ops, "cuda_obstacle", lambda device: "it was built without nvcc")
    kernels = pytest.importorskip("gpl_fast.kernels")
    assert stages.backward_stages_on(CUDA) is kernels
    assert stages.stages_on(CUDA) is kernels
    assert not data_gradient.by_kernel(CUDA, BF16, False, 64, 128, 3, 1)


def test_weights_for_the_kernel_are_flipped_and_padded(monkeypatch):
    cpu, net = torch.device("cpu"), LossNet.vgg(5, (1, 1), widths=(6, 70))
    monkeypatch.setattr(data_gradient, "by_kernel", lambda *layer: layer[2:] == (True, 5, 6, 3, 1))
    names = chain.pack_names(net, cpu, torch.float32, False)
    packs = dict(zip(names, chain.pack_weights(net, cpu, torch.float32, False), strict=True))
    assert names == ("w.conv1_1", "bwd.conv1_1", "w.conv2_1")
    packed, w = packs["bwd.conv1_1"].view(3, 3, 64, 8), net.weights["conv1_1"]
    assert packs["bwd.conv1_1"].is_contiguous()
    for i in range(3):
        for j in range(3):
            assert torch.equal(packed[i, j, :6, :5], w[:, :, 2 - i, 2 - j])
    assert not packed[:, :, 6:].any()
    assert not packed[..., 5:].any()

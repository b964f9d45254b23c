"""Who does the backward on a GPU: the compiled operators or Triton's kernels, and in it the data
gradient: measured rows decide."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import call_of

from gpl_fast import LossNet, ops
from gpl_fast.fast import measured, policy
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.who import who_runs
from gpl_fast.net.steps import Step
from gpl_fast.net.weights import Layout

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


def row(in_channels, kernel_ms, aten_ms=1.0, **changed):
    return {
        "arch": 90, "dtype": "bfloat16", "first": False, "in_channels": in_channels,
        "out_channels": 128, "kernel_size": 3, "stride": 1, "kernel_ms": kernel_ms,
        "aten_ms": aten_ms, "measured": "here",
    } | changed  # fmt: skip


@pytest.fixture
def user_rows(monkeypatch, tmp_path):
    """A file of the user's own, which goes before what is shipped."""
    found = [row(64, 0.5), row(96, 2.0), row(19, 0.5, first=True, out_channels=64)]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    monkeypatch.setenv("GPL_FAST_DATA_GRADIENT", str(tmp_path / "rows.json"))
    measured.rows.cache_clear()
    yield found
    measured.rows.cache_clear()


def test_shipped_rows_carry_their_measurement():
    measured.rows.cache_clear()
    for found in measured.rows():
        assert set(found) == set(measured.Row.__annotations__)
        assert found["kernel_ms"] > 0
        assert found["aten_ms"] > 0
        assert found["measured"]


def by_kernel(by, dtype, first, *layer):
    """Whether one kernel makes the data gradient of a layer (C_in, C_out, K, stride)."""
    call = call_of(LossNet.vgg(3, (1,), (4,)), dtype=dtype)
    return policy.named(by).by_kernel(call, 0 if first else 1, Step("conv", *layer))


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
def test_the_faster_of_two_measurements(user_rows, layer, kernel):
    assert by_kernel("sm_90", *layer) is kernel


def test_no_measurement_of_another_gpu_counts(user_rows):
    layer = BF16, False, 64, 128, 3, 1
    assert not by_kernel("sm_80", *layer)
    assert not by_kernel("avx512", *layer)


def test_the_first_layer_behind_an_adapter_ends_in_no_logits(user_rows):
    net = LossNet.vgg(21, (1,), (64,))
    plain, behind = (call_of(n, dtype=BF16) for n in (net, net.with_input_adapter(21)))
    sm_90 = policy.named("sm_90")
    assert sm_90.by_kernel(plain, 0, net.chain.steps[0])
    assert not sm_90.by_kernel(behind, 0, net.chain.steps[0])
    assert sm_90.layout(plain, CUDA).backward == ("conv1_1",)
    assert sm_90.layout(behind, CUDA).backward == ()


def test_the_stages_of_a_gpu(user_rows, monkeypatch):
    """By what the library holds: measured rows do not count where its operators cannot run."""
    properties = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(ops, "cuda_obstacle", lambda device: None)
    found = policy.ask(CUDA)
    assert (found.device, found.arch, found.memory_mb) == ("cuda", 90, 24 * 1024)
    assert (found.forward, found.backward) == ("triton", "compiled")
    monkeypatch.setattr(ops, "cuda_obstacle", lambda device: "it was built without nvcc")
    found = policy.ask(CUDA)
    assert (found.forward, found.backward) == ("triton", "triton")
    net = LossNet.vgg(21, (1,), (64,))
    assert not found.by_kernel(call_of(net, dtype=BF16), 0, net.chain.steps[0])
    found = policy.ask(torch.device("cpu"))
    assert (found.device, found.forward, found.backward) == ("cpu", "compiled", "compiled")


def test_who_has_the_stages_of_an_implementation():
    assert policy.implementation("cpu", "forward") is ops
    assert policy.implementation("sm_90", "backward").relu_bwd is ops.relu_bwd
    kernels = pytest.importorskip("gpl_fast.kernels")
    assert policy.implementation("sm_90", "forward") is kernels


@pytest.fixture
def softmax_rows(monkeypatch, tmp_path):
    about = {"arch": 90, "cuda_ms": 2.0, "measured": "here"}
    found = [about | {"classes": 150, "triton_ms": 1.0}, about | {"classes": 200, "triton_ms": 3.0}]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    monkeypatch.setenv("GPL_FAST_SOFTMAX_BWD", str(tmp_path / "rows.json"))
    measured.softmax_rows.cache_clear()
    yield
    measured.softmax_rows.cache_clear()


def test_the_faster_softmax_bwd_is_called_and_said(softmax_rows, monkeypatch):
    """CUDA's where nothing near was measured."""
    kernels, called = pytest.importorskip("gpl_fast.kernels"), []
    monkeypatch.setattr(ops, "softmax_bwd", lambda x, **how: called.append("csrc/cuda"))
    monkeypatch.setattr(kernels, "softmax_bwd", lambda x, **how: called.append("Triton"))
    policy.implementation.cache_clear()
    for by, classes, who in [("sm_90", 150, "Triton"), ("sm_90", 110, "Triton"),
                             ("sm_90", 180, "csrc/cuda"), ("sm_90", 19, "csrc/cuda"),
                             ("sm_80", 150, "csrc/cuda")]:  # fmt: skip
        stages = policy.implementation(by, "backward")
        stages.softmax_bwd(torch.empty(1, classes, 2, 2), row0=0)
        plan = Plan(call_of(LossNet.vgg(classes, (1,), (8,)), policy=by), 1, 8, 8)
        assert called.pop() == who, (by, classes)
        assert who_runs(plan)[0].backward == f"softmax_bwd ({who})"
    triton = replace(policy.named("sm_90"), backward="triton")
    assert triton.softmax_bwd(19) == "triton"
    assert policy.named("avx2").softmax_bwd(150) == "compiled"
    policy.implementation.cache_clear()


def test_weights_for_the_kernel_are_flipped_and_padded():
    net = LossNet.vgg(5, (1, 1), widths=(6, 70))
    layout = Layout(torch.device("cpu"), torch.float32, False, False, ("conv1_1",))
    packs = net.packs(layout)
    assert list(packs) == ["w.conv1_1", "bwd.conv1_1", "w.conv2_1"]
    packed, w = packs["bwd.conv1_1"].view(3, 3, 64, 8), net.weights["conv1_1"]
    assert packs["bwd.conv1_1"].is_contiguous()
    for i in range(3):
        for j in range(3):
            assert torch.equal(packed[i, j, :6, :5], w[:, :, 2 - i, 2 - j])
    assert not packed[:, :, 6:].any()
    assert not packed[..., 5:].any()

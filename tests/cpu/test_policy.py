"""Who computes each step: what follows from a machine's name for a call and its shape, as
docs/cpu.md and docs/gpu.md have it; and that it is what runs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cases import NARROW, call_of, make_target, value_and_grad
from inside import Inside
from policies import decided, in_force
from saved import left_by
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, ops
from gpl_fast.fast import measured, policy
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import Policy
from gpl_fast.fast.who import who_runs
from gpl_fast.net.weights import padded_channels

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16

# ------------------------------------------------------------------------------- by name, in words

ATEN, TWO, FOUR = "convolution (ATen, float32)", *(
    f"winograd {m} x {m} (csrc/cpu, float32)" for m in (2, 4)
)  # fmt: skip
PAIRS = "winograd {0} x {0} (csrc/cpu, bfloat16)".format
DIRECT, ATEN_BF16 = "direct_conv (csrc/cpu, bfloat16)", "convolution (ATen, bfloat16)"
POOL, POOL_BWD = "relu_pool_diff_fwd (csrc/cpu)", "relu_pool_bwd (csrc/cpu)"
CPU_LOGITS = ("softmax_pack_fwd (csrc/cpu)", "softmax_bwd (csrc/cpu)")


def both(prediction, difference):
    return f"{prediction} of y', {difference} of δ"


def on_cpu(*steps):
    """Lines of max-pooled steps: convolutions there, and back."""
    return [CPU_LOGITS, *((f"{there}, {POOL}", f"{POOL_BWD}, {back}") for there, back in steps)]


# 1 x 128 x 128 of 150 classes: 4096, 1024, 256, 64, 16 tiles of 2 x 2.
IN_FLOAT32 = [
    (both(TWO, FOUR), FOUR), (both(TWO, FOUR), FOUR), (TWO, TWO), (ATEN, ATEN), (ATEN, ATEN),
]  # fmt: skip
MIXED = [
    (both(PAIRS(2), FOUR), PAIRS(4)), (both(DIRECT, FOUR), PAIRS(4)), (DIRECT, PAIRS(2)),
    (DIRECT, DIRECT), (DIRECT, DIRECT),
]  # fmt: skip
DEFAULT = {
    ("avx2", FLOAT): IN_FLOAT32, ("avx512", FLOAT): IN_FLOAT32, ("avx2", BF16): IN_FLOAT32,
    ("avx512", BF16): IN_FLOAT32, ("avx512_bf16", FLOAT): IN_FLOAT32, ("amx", FLOAT): IN_FLOAT32,
    ("avx512_bf16", HALF): IN_FLOAT32, ("amx", HALF): IN_FLOAT32,
    ("avx512_bf16", BF16): MIXED, ("amx", BF16): [(DIRECT, DIRECT)] * 5,
}  # fmt: skip


def said(call, size=(1, 128, 128), **options):
    """All but the sum at the taps, of which `test_who` has words."""
    runs = who_runs(Plan(call, *size, **options))
    return [(re.sub(r", diff_reduce_fwd \(.*?\)", "", r.forward), r.backward) for r in runs]


@pytest.mark.parametrize(("cpu", "dtype"), DEFAULT, ids=str)
def test_the_default_net_on_a_cpu(cpu, dtype):
    net = GenericPerceptualLoss(150).net
    assert said(call_of(net, dtype=dtype, policy=cpu)) == on_cpu(*DEFAULT[cpu, dtype])


def test_labels_on_an_avx2_cpu():
    """The first convolution is of u alone: the prediction's way."""
    net = GenericPerceptualLoss(150).net
    want = on_cpu((f"{TWO}, label_conv_fwd (csrc/cpu)", FOUR), *IN_FLOAT32[1:])
    assert said(call_of(net, kind="labels", policy="avx2")) == want
    assert said(call_of(net, kind="topk", policy="avx2"))[1][0].startswith(f"{TWO}, topk_conv_fwd")


def test_what_is_not_3_x_3_or_has_stride_2_is_atens_or_by_the_definition():
    wide = GenericPerceptualLoss(19, "1,1", kernel_size=5).net
    assert said(call_of(wide, policy="avx512")) == on_cpu((ATEN, ATEN), (ATEN, ATEN))
    assert said(call_of(wide, dtype=BF16, policy="amx")) == on_cpu(*[(DIRECT, DIRECT)] * 2)
    strided = GenericPerceptualLoss(19, "1", pool="stride").net
    for dtype, by in ((FLOAT, ATEN), (BF16, ATEN_BF16)):
        *_, (there, back) = said(call_of(strided, dtype=dtype, policy="amx"))
        assert (there, back) == (f"{by}, relu_diff_fwd (csrc/cpu)", f"relu_bwd (csrc/cpu), {by}")


EXACT_LOGITS = ("softmax_pack_fwd (Triton)", "softmax_bwd (csrc/cuda)")
GPU_LOGITS = ("carry_target_fwd (Triton), softmax_pack_fwd (Triton)", EXACT_LOGITS[1])
BLOCK = ("conv_block_fwd (Triton, {})", "relu_pool_bwd (csrc/cuda), convolution (ATen, {})")


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_ade20k_on_a_gpu(gpu, kind):
    net = GenericPerceptualLoss(150).net
    for dtype in (BF16, HALF):
        name = str(dtype).removeprefix("torch.")
        block = tuple(half.format(name) for half in BLOCK)
        call = call_of(net, kind=kind, dtype=dtype, policy=gpu)
        assert said(call, (16, 512, 512)) == [GPU_LOGITS, *[block] * 5]
    call = call_of(net, kind=kind, policy=gpu)
    tf32 = (BLOCK[0].format("TF32"), BLOCK[1].format("float32"))
    assert said(call, (16, 512, 512), tf32=True) == [EXACT_LOGITS, *[tf32] * 5]
    pool = "relu_pool_diff_fwd (Triton)"
    exact = [f"{ATEN}, {pool}"] * 5
    if kind == "labels":
        exact[0] = f"{ATEN}, label_conv_fwd (Triton), {pool}"
    found = said(call, (16, 512, 512), tf32=False)
    assert found == [EXACT_LOGITS, *((there, BLOCK[1].format("float32")) for there in exact)]


@pytest.fixture
def one_row(monkeypatch, tmp_path):
    """Measured on an sm_90: the first and the third layer's data gradients are faster by one."""
    about = {"arch": 90, "dtype": "bfloat16", "kernel_size": 3, "stride": 1, "kernel_ms": 1.0}
    about |= {"aten_ms": 2.0, "measured": "here"}
    rows = [about | {"first": True, "in_channels": 150, "out_channels": 64},
            about | {"first": False, "in_channels": 128, "out_channels": 256}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setenv("GPL_FAST_DATA_GRADIENT", str(tmp_path / "rows.json"))
    measured.rows.cache_clear()
    yield
    measured.rows.cache_clear()


def test_a_measured_gpu_makes_its_data_gradients_by_one_kernel(one_row):
    net = GenericPerceptualLoss(150).net
    call = call_of(net, dtype=BF16, policy="sm_90")
    _, first, second, third, *_ = found = said(call, (16, 512, 512))
    assert found[0] == (GPU_LOGITS[0], "")
    assert first[1] == "conv_block_logits_bwd (csrc/cuda)"
    assert second[1] == BLOCK[1].format("bfloat16")
    assert third[1] == "conv_block_bwd (csrc/cuda)"
    assert policy.named("sm_90").layout(call, torch.device("cpu")).backward == (
        "conv1_1", "conv3_1",
    )  # fmt: skip
    behind = call_of(net.with_input_adapter(150), dtype=BF16, policy="sm_90")
    front, first, *_ = said(behind, (16, 512, 512))
    assert front == (f"{GPU_LOGITS[0]}, adapter, mean, std (ATen)",
                     "adapter, std (ATen), softmax_bwd (csrc/cuda)")  # fmt: skip
    assert first[1] == BLOCK[1].format("bfloat16")  # its input is not the logits' activation
    assert said(call_of(net, dtype=BF16, policy="sm_80"), (16, 512, 512))[1][1] == (
        BLOCK[1].format("bfloat16")
    )


def test_a_tap_inside_a_block_is_looked_at_stage_by_stage():
    net = LossNet.vgg(19, (1, 2), (64, 128))
    call = call_of(net, {"relu1_1": 1.0, "pool2": 1.0}, dtype=BF16, policy="sm_90")
    stages = f"{ATEN_BF16}, relu_diff_fwd (Triton), relu_pool_diff_fwd (Triton)"
    assert [there for there, _ in said(call)[1:]] == [stages, *[BLOCK[0].format("bfloat16")] * 2]
    plain = call_of(net, {"pool2": 1.0}, kind="features", policy="avx2")
    assert said(plain)[1][0] == f"{TWO}, relu_pool_fwd (csrc/cpu)"
    encoded = call_of(net, {"pool2": 1.0}, encode=True, policy="avx2")
    assert all(back == "" for _, back in said(encoded))


@pytest.mark.parametrize(("mb", "most"), [(64, 128 * 256), (256, 256 * 512), (2048, 512 * 512)])
def test_large_tiles_have_weights_that_fit(mb, most):
    """Winograd's weights for tiles of 4 x 4 results take an eighth of the workspace at most."""
    net = GenericPerceptualLoss(150, "vgg19").net
    call = call_of(net, workspace_mb=mb, policy="avx2")
    planned = Plan(call, 16, 512, 512)
    for step, how in zip(planned.steps, planned.how, strict=True):
        weight = padded_channels(step.in_channels) * step.out_channels
        for way in (how.difference, how.gradient):
            assert way.tile == (4 if weight <= most else 2), step.conv
        assert how.prediction.tile == 2
    one = Plan(call, 1, 40, 40)  # 100 tiles of 4 x 4
    assert [one.how[i].difference.tile for i in one.segments[0]] == [2, 2]


def test_few_channels_do_not_average_the_rounding_of_points():
    call = call_of(GenericPerceptualLoss(19).net, dtype=BF16, policy="avx512_bf16")
    assert said(call) == on_cpu((both(TWO, FOUR), PAIRS(4)), *MIXED[1:])


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_step_is_read_by_descriptors_from_sm_90_on(gpu):
    net = GenericPerceptualLoss(150).net
    for kind in ("labels", "topk", "dense"):
        plan = Plan(call_of(net, kind=kind, dtype=BF16, policy=gpu), 1, 64, 64)
        assert {how.tile.descriptors for how in plan.how} == {gpu != "sm_80"}


@pytest.mark.parametrize("name", ["avx", "sm_", "gpu", "", "sm_90a"])
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match=r"architecture: got '.*', expected one of avx2, avx512"):
        policy.named(name)


# ------------------------------------------------------------------------------- what is said runs


class Called(TorchDispatchMode):
    """What an operator calls, in `who_runs`' words."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name == "winograd":
            self.names.add(f"winograd {args[2]} x {args[2]}")
        elif name in ("convolution", "_convolution", "conv2d"):
            self.names.add("convolution")
        elif name == "direct_conv" or name.endswith(("_fwd", "_bwd")):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


NAMES = re.compile(r"winograd \d x \d|direct_conv|convolution|\w+_(?:fwd|bwd)\b")
SAID = {
    "dense": (lambda **o: GenericPerceptualLoss(5, "2,1,1", widths=NARROW, **o), "dense"),
    "labels": (lambda **o: GenericPerceptualLoss(70, "1,1", widths=NARROW, **o), "labels"),
    "topk, stride": (
        lambda **o: GenericPerceptualLoss(5, "1,1", widths=NARROW, pool="stride", **o), "topk"),
    "features": (lambda **o: GenericPerceptualLoss(5, "1,2", widths=NARROW, **o), "features"),
    "average": (lambda **o: GenericPerceptualLoss(5, "2", widths=NARROW, pool="avg", **o), "dense"),
    "total": (lambda **o: SegmentationLoss(5, net="1,1", widths=NARROW, **o), "labels"),
    "taps inside": (
        lambda **o: PerceptualLoss(
            LossNet.vgg(5, (2, 1), NARROW), {"conv1_1": 1.0, "pool2": 1.0}, {"relu1_2": 1.0}, **o),
        "dense"),
    "5 x 5": (lambda **o: GenericPerceptualLoss(5, "1", kernel_size=5, **o), "dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("cpu", policy.CPUS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_what_is_said_runs(name, cpu, dtype):
    make, kind = SAID[name]
    loss = make(backend="fast", compute_dtype=dtype)
    channels = loss.net.in_channels
    target = make_target(kind, (1, channels, 64, 48), loss)
    x = torch.randn(1, channels, 64, 48, requires_grad=True)
    with policy.injected(policy.named(cpu)), Inside(Called) as inside:
        value = loss(x, target)
        plan, _ = left_by(value)
        value.backward()
    there, back = (mode.names for mode in inside.modes)
    runs = who_runs(plan)
    assert there == set(NAMES.findall(" ".join(r.forward for r in runs)))
    assert back == set(NAMES.findall(" ".join(r.backward for r in runs)))


# ----------------------------------------------------------------------------------------- injected


class Stages:
    """The CPU's, which note what was asked of them."""

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        self.called.append(name)
        return getattr(ops, name)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_injected_policy_is_in_force_forward_and_backward(compiled):
    loss = GenericPerceptualLoss(5, "1,1", widths=NARROW, backend="fast", compute_dtype=BF16)
    pred, target = torch.randn(2, 2, 5, 40, 36)
    run = loss
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    usual = value_and_grad(loss, pred, target)
    mine, stages = Policy(bfloat16="matrix", strip_mb=2**-20, strip_rows=4), Stages()
    with policy.injected(mine, compiled=stages) as name:
        assert in_force() is policy.named(name) is mine
        x = pred.clone().requires_grad_()
        value = run(x, target)
        if not compiled:
            plan, _ = left_by(value)
            assert plan.policy is mine
            assert plan.rows[0] == 4
            assert {how.prediction.tile for how in plan.how} == {1}
        strips = stages.called.count("softmax_pack_fwd")
        assert strips == 2 * 10
        assert not any(name.endswith("_bwd") for name in stages.called)
        (grad,) = torch.autograd.grad(value, x)
        assert stages.called.count("softmax_bwd") == strips
        assert set(stages.called) >= {"relu_pool_diff_fwd", "relu_pool_bwd"}
        with policy.injected(Policy()) as inner:  # goes before, and then it is the outer one's turn
            assert policy.current(pred.device) == inner
        assert policy.current(pred.device) == name
    assert policy.current(pred.device) == "cpu"
    stages.called.clear()
    torch._dynamo.reset()  # a graph keeps who decided when it was traced
    again = value_and_grad(run, pred, target)
    assert stages.called == []
    for a, b, strip in zip(again, usual, (value.detach(), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
        torch.testing.assert_close(strip, b, rtol=0.1, atol=0.1 * b.abs().max().item())


def test_a_policy_that_is_derived_from_one_keeps_its_stages():
    stages = Stages()
    with decided(stages={"compiled": stages}), decided(rows=2), decided(arithmetic="own"):
        loss = GenericPerceptualLoss(5, "1", widths=NARROW, backend="fast")
        value_and_grad(loss, *torch.randn(2, 1, 5, 16, 16))
        assert in_force().strip_rows == 2
    assert stages.called.count("softmax_pack_fwd") == 8

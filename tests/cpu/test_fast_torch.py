"""The fast path inside PyTorch: torch.compile, autocast, checkpointing, graphs kept and offloaded,
memory formats, and which backend runs. Every result is compared with the same eager call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import NARROW, error, make_target, value_and_grad
from saved import fast_node, left_by
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpl_fast import (
    BackendUnavailable,
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
)
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16
SHAPE = (2, 5, 19, 22)
KINDS = ("dense", "labels", "topk", "features")


def gpl(backend="fast", **options):
    return GenericPerceptualLoss(5, "2,1", widths=NARROW, backend=backend, **options)


def total(backend="fast", **options):
    return SegmentationLoss(5, net="1,1", widths=NARROW, backend=backend, **options)


def family(backend="fast"):
    net = LossNet.vgg(5, (2, 1), NARROW)
    return PerceptualLoss(net, {"pool2": 1.0}, {"relu1_2": 2.0}, 0.5, backend=backend)


def inputs(kind, loss=None):
    return torch.randn(SHAPE), make_target(kind, SHAPE, loss)


def calls():
    """Every loss and kind of target: name -> (loss, prediction, arguments)."""
    torch.manual_seed(0)
    labels, mask = torch.randint(5, (2, 19, 22)), torch.rand(2, 19, 22) < 0.8
    labels[:, 2:5, 3:9] = 255
    out = {kind: (gpl(), *inputs(kind, gpl())) for kind in KINDS}
    by_channel = gpl(criterion="l1", level_weights=[0.5, [1, 2, 0, 4, 5, 6, 7, 8]])
    over_norms = gpl(normalize_features=True, level_weights=[torch.rand(5), 1.0])
    out["l1, channels"] = (by_channel, *inputs("labels"))
    out["normalized"] = (over_norms, *inputs("dense"))
    out["normalized, features"] = (over_norms, *inputs("features", over_norms))
    out["mask"] = (gpl(), *inputs("dense"), mask)
    out["ignore"] = (gpl(ignore_index=255), torch.randn(SHAPE), labels)
    out["resized"] = (gpl(), torch.randn(SHAPE), torch.randn(2, 5, 9, 30))
    out["total"] = (total(class_weight=[1, 2, 3, 4, 5]), torch.randn(SHAPE), labels)
    out["smaller"] = (total(), torch.randn(2, 5, 9, 11), labels, None, mask)
    for kind in KINDS:
        out[f"total, {kind}"] = (total(), torch.randn(SHAPE), labels, inputs(kind, total())[1])
    out["family"] = (family(), *inputs("dense"))
    out["family, style"] = (family(), *inputs("dense"), torch.randn(1, 5, 12, 30))
    return {name: (loss, x, args) for name, (loss, x, *args) in out.items()}


CALLS = calls()
SOME = ("dense", "l1, channels", "normalized", "ignore", "topk", "features", "total", "family")


def same(a, b):
    return all(map(torch.equal, a, b))


# -------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph_with_the_same_result(name, dynamo):
    loss, x, args = CALLS[name]
    fast_node(loss(x.clone().requires_grad_(), *args))  # it is the fast path
    want = value_and_grad(loss, x, *args)
    got = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), x, *args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) < 1e-5


def test_a_graph_holds_the_two_operators_and_no_convolution(dynamo):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def record(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    loss, x, args = CALLS["total"]
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    value_and_grad(torch.compile(loss, fullgraph=True, backend=backend), x, *args)
    forward, backward = graphs
    assert "gpl_fast.perceptual_fwd.default" in forward
    assert "gpl_fast.perceptual_bwd.default" in backward
    assert not any("conv" in target for target in forward | backward)


def test_compiles_for_changing_sizes(dynamo):
    loss = gpl()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for h, w in ((19, 22), (23, 17), (31, 28)):
        x, y = torch.randn(2, 2, 5, h, w)
        for a, b in zip(value_and_grad(compiled, x, y), value_and_grad(loss, x, y), strict=True):
            assert error(a, b) < 1e-5


def test_compiles_under_autocast(dynamo):
    loss, x, args = CALLS["dense"]

    def step(x, *args):
        with torch.autocast("cpu", BF16):
            return loss(x, *args)

    want = value_and_grad(step, x, *args)
    got = value_and_grad(torch.compile(step, fullgraph=True, backend="aot_eager"), x, *args)
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1], want[1]) < 1e-5


# -------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", ["dense", "ignore", "topk", "total", "family"])
def test_autocast_sets_the_compute_dtype_alone(name):
    loss, x, args = CALLS[name]
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16):
        value = loss(leaf, *args)
    planned, _ = left_by(value)
    assert planned.dtype == BF16
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, leaf)  # outside of autocast, as in training
    assert grad.dtype == torch.float32
    inner = getattr(loss, "gpl", loss)
    before = inner.options
    inner.options = replace(before, compute_dtype=BF16)
    try:
        assert same((value.detach(), grad), value_and_grad(loss, x, *args))
    finally:
        inner.options = before


def test_autocast_leaves_stored_features_in_float32():
    loss, x, args = CALLS["features"]
    with torch.autocast("cpu", BF16):
        got = value_and_grad(loss, x, *args)
    assert same(got, value_and_grad(loss, x, *args))


# ---------------------------------------------------------------------------------- autograd's ways


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_activation_checkpointing(name, reentrant):
    loss, x, args = CALLS[name]
    leaf = x.clone().requires_grad_()
    value = checkpoint(loss, leaf, *args, use_reentrant=reentrant)
    value.backward()
    assert same((value.detach(), leaf.grad), value_and_grad(loss, x, *args))


@pytest.mark.parametrize("name", SOME)
def test_gradients_accumulate(name):
    loss, x, args = CALLS[name]
    _, grad = value_and_grad(loss, x, *args)
    leaf = x.clone().requires_grad_()
    loss(leaf, *args).backward()
    first = leaf.grad
    (3 * loss(leaf, *args)).backward()
    assert leaf.grad is first
    assert error(leaf.grad, 4 * grad) < 1e-6


@pytest.mark.parametrize("name", SOME)
def test_two_backwards_of_a_retained_graph(name):
    loss, x, args = CALLS[name]
    leaf = x.clone().requires_grad_()
    value = loss(leaf, *args)
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, leaf)
    assert same((first, second), (kept, kept))
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaf)


@pytest.mark.parametrize("name", SOME)
def test_saved_tensors_may_be_offloaded_and_replaced(name):
    loss, x, args = CALLS[name]
    want = value_and_grad(loss, x, *args)
    for hooks in (save_on_cpu(), saved_tensors_hooks(torch.clone, torch.clone)):
        with hooks:
            leaf = x.clone().requires_grad_()
            value = loss(leaf, *args)
        (grad,) = torch.autograd.grad(value, leaf)
        assert same((value.detach(), grad), want)


@pytest.mark.parametrize("name", SOME)
def test_writing_to_the_prediction_before_backward_is_noticed(name):
    loss, x, args = CALLS[name]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    value = loss(logits, *args)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        value.backward()


@pytest.mark.parametrize("name", SOME)
def test_no_grad_saves_nothing_and_gives_the_same_value(name):
    loss, x, args = CALLS[name]
    value, _ = value_and_grad(loss, x, *args)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alone = loss(x.detach(), *args)
        with torch.no_grad():
            without = loss(x.clone().requires_grad_(), *args)
    with torch.inference_mode():
        inferred = loss(x, *args)
    assert kept == []
    for v in (alone, without, inferred):
        assert not v.requires_grad
        assert torch.equal(v, value)


@pytest.mark.parametrize("name", SOME)
def test_double_backward_is_refused_with_a_way_out(name):
    loss, x, args = CALLS[name]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, *args), leaf, create_graph=True)
    assert torch.equal(grad.detach(), value_and_grad(loss, x, *args)[1])
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_callers_is_written_to(name):
    loss, x, args = CALLS[name]
    tensors = [t for t in (x, *args) if isinstance(t, torch.Tensor)]
    for t in args:
        if not isinstance(t, torch.Tensor | None):
            tensors += [v for v in vars(t).values() if isinstance(v, torch.Tensor)]
            tensors += [*getattr(t, "features", {}).values()]
    before = [(t.clone(), t._version) for t in tensors]
    incoming = torch.tensor(3.0)
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(loss(leaf, *args), leaf, incoming)
    for t, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, copy)
        assert t._version == version
    assert incoming == 3


def test_an_incoming_gradient_without_strides():
    """Gradients of sums are expanded scalars."""
    loss, x, args = gpl(reduction="none"), *CALLS["dense"][1:]
    leaf = x.clone().requires_grad_()
    incoming = torch.tensor(2.0).expand(2)
    (grad,) = torch.autograd.grad(loss(leaf, *args), leaf, incoming)
    assert torch.equal(grad, 2 * value_and_grad(loss, x, *args)[1])
    assert torch.equal(incoming, torch.full((2,), 2.0))


# --------------------------------------------------------------------------------- memory formats


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", SOME)
def test_gradient_in_the_predictions_memory_format(name, dtype):
    loss, x, args = CALLS[name]
    x = x.to(dtype)
    want = value_and_grad(loss, x, *args)
    assert want[1].is_contiguous()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    value, grad = value_and_grad(loss, nhwc, *args)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert not grad.is_contiguous()
    assert grad.dtype == dtype
    assert error(value, want[0]) < 1e-6
    assert error(grad, want[1].double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    view = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert value_and_grad(loss, view, *args)[1].is_contiguous()


# --------------------------------------------------------------------------- which backend, and why


def is_fast(loss, *args):
    value = loss(*args)
    try:
        fast_node(value)
    except AssertionError:
        return False
    return True


def test_auto_is_fast_where_it_can_be(monkeypatch):
    monkeypatch.delenv("GPL_FAST_BACKEND", raising=False)
    x, y = torch.randn(2, *SHAPE)
    x.requires_grad_()
    assert is_fast(gpl("auto"), x, y)
    assert not is_fast(gpl("reference"), x, y)
    assert not is_fast(gpl("auto"), x.detach().double().requires_grad_(), y.double())


def test_the_variable_overrides_auto_alone(monkeypatch):
    x, y = torch.randn(2, *SHAPE)
    x.requires_grad_()
    monkeypatch.setenv("GPL_FAST_BACKEND", "reference")
    assert not is_fast(gpl("auto"), x, y)
    assert is_fast(gpl("fast"), x, y)
    monkeypatch.setenv("GPL_FAST_BACKEND", "fast")
    assert is_fast(gpl("auto"), x, y)
    assert not is_fast(gpl("reference"), x, y)
    with pytest.raises(BackendUnavailable, match="float64 is the reference's"):
        gpl("auto")(x.double(), y.double())
    monkeypatch.setenv("GPL_FAST_BACKEND", "quick")
    with pytest.raises(ValueError, match=r"GPL_FAST_BACKEND: got 'quick'.*unset"):
        gpl("auto")(x, y)


def test_fast_says_why_it_cannot_run():
    x, y = torch.randn(2, *SHAPE, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r"float64.*use backend='auto'"):
        gpl()(x, y)
    module = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3), torch.nn.Tanh())
    net = LossNet.from_module(module, ["1"])
    with pytest.raises(BackendUnavailable, match="from_module"):
        GenericPerceptualLoss(5, net, backend="fast")(x.float(), y.float())


# ----------------------------------------------------------------------------------------- explain


EXPLAINED = {
    "dense": (gpl, "dense", False),
    "mask": (gpl, "dense", True),
    "labels": (lambda: gpl(ignore_index=255), "labels", False),
    "labels, mask": (lambda: gpl(ignore_index=255), "labels", True),
    "topk": (gpl, "topk", False),
    "features": (gpl, "features", False),
    "bfloat16": (lambda: gpl(compute_dtype=BF16, level_weights=(1, 1)), "dense", False),
    "avg": (lambda: gpl(pool="avg"), "dense", False),
    "stride": (lambda: gpl(pool="stride"), "topk", True),
    "sigmoid": (lambda: gpl(activation="sigmoid"), "dense", True),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_says_what_is_measured(name):
    make, kind, masked = EXPLAINED[name]
    loss = make()
    pred, target = inputs(kind, loss)
    mask = torch.rand(2, 19, 22) < 0.8 if masked else None
    said = loss.explain(pred, target, mask)
    kept = []
    leaf = pred.requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = loss(leaf, target, mask)
    own = {t.data_ptr() for t in (leaf, *loss.net.cached_tensors()) if t is not None}
    if mask is not None:
        own.add(mask.data_ptr())
    storages = {t.data_ptr(): t for t in kept if t.data_ptr() not in own}
    assert said.bytes_saved == sum(t.untyped_storage().nbytes() for t in storages.values())
    planned, _ = left_by(value)
    assert said.backend == "fast"
    assert said.compute_dtype == planned.dtype
    assert said.workspace_bytes == planned.bytes_transient()
    by_layer = planned.bytes_saved_by_layer()
    assert {x.name: x.bytes_saved for x in said.layers if x.bytes_saved} == {
        layer: count for layer, count in by_layer.items() if layer
    }
    assert "fast" in str(said)

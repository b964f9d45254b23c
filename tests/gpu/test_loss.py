"""The whole loss on the device: values and gradients against the reference in float64 there.

err(fast, float64) <= 2 err(reference in the same dtype, float64) + what rounding may swap.
"""

from __future__ import annotations

import contextlib

import graph_recipe
import pytest
import torch
from cases import ATOL, NARROW, SHAPES, error, make_target

import gpl_fast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradient: rounding swaps winners of pools and signs, in the reference as in ours.
GRADIENT_ATOL = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
SMALL = (2, 5, 37, 45)


def loss_of(backend="fast", channels=5, **options):
    activation = options.pop("activation", "sigmoid" if channels == 1 else "softmax")
    return gpl_fast.GenericPerceptualLoss(
        channels, activation=activation, backend=backend, **options
    )


def moved(target, device, dtype=None):
    if isinstance(target, gpl_fast.TopK):
        return gpl_fast.TopK(target.values.to(device), target.indices.to(device), target.rest)
    floating = target.is_floating_point() and dtype is not None
    return target.to(device, dtype if floating else target.dtype)


def run(loss, x, *args, **kwargs):
    """(value, gradient of its sum)."""
    x = x.detach().requires_grad_()
    value = loss(x, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def check(make, x, target, dtype, **kwargs):
    """`make(backend)`'s fast path against its reference, both on the device."""
    truth = run(make("reference"), x.double(), moved(target, x.device, torch.float64), **kwargs)
    x, target = x.to(dtype), moved(target, x.device, dtype)
    ours, plain = (run(make(name), x, target, **kwargs) for name in ("fast", "reference"))
    for k, atol in ((0, ATOL[dtype]), (1, GRADIENT_ATOL[dtype])):
        bound = 2 * error(plain[k], truth[k]) + atol
        assert error(ours[k], truth[k]) <= bound
    assert ours[1].dtype == dtype
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_equals_the_reference(device, shape, kind, dtype):
    if kind == "topk" and shape[1] == 1:
        pytest.skip("one class has no top-k")
    x, target = 2 * torch.randn(shape, device=device), moved(make_target(kind, shape), device)
    check(lambda backend: loss_of(backend, shape[1]), x, target, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "avg"},
        {"pool": "stride"},
        {"kernel_size": 5},
        {"kernel_size": 1},
        {"net": "2,2,1"},
        {"level_weights": (1, 0.5, 0.25, 0, 2)},
        {"activation": "none", "temperature": 2.0},
        {"reduction": "none"},
        {"widths": NARROW},
        {"workspace_mb": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_loss_of_every_option(device, options, dtype):
    options = dict(options)
    if "net" in options:
        options["widths"] = (64, 128, 256)
    x, target = torch.randn(SMALL, device=device), torch.randn(SMALL, device=device)
    check(lambda backend: loss_of(backend, **options), x, target, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_loss_with_mask_and_ignored_labels(device, dtype):
    x, labels = torch.randn(SMALL, device=device), make_target("labels", SMALL).to(device)
    mask = torch.rand(2, 37, 45, device=device) > 0.3
    labels[0, :9] = 255
    x[:, :, -1, -1] = float("nan")
    mask[:, -1, -1] = False
    grad = check(lambda b: loss_of(b, ignore_index=255), x, labels, dtype, mask=mask)[1]
    dead = ~mask | (labels == 255)
    assert not grad[dead[:, None].expand_as(grad)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_loss_against_stored_features(device, dtype):
    x, target = torch.randn(SMALL, device=device), torch.randn(SMALL, device=device)
    stored = loss_of("reference").encode(target)
    plain = run(loss_of("reference"), x, stored)
    ours = run(loss_of(), x, stored)
    assert error(ours[0], plain[0]) <= 1e-4
    assert error(ours[1], plain[1]) <= 1e-2


@pytest.mark.parametrize("teacher", [False, True])
def test_small_segmentation_loss(device, teacher):
    x, labels = torch.randn(SMALL, device=device), make_target("labels", SMALL).to(device)
    labels[0, :5] = 255
    soft = torch.randn(SMALL, device=device) if teacher else None
    weight = torch.rand(5).tolist()
    options = {"class_weight": torch.tensor(weight), "label_smoothing": 0.1}

    def total(backend):
        return gpl_fast.SegmentationLoss(5, backend=backend, **options)

    truth = run(total("reference"), x.double(), labels, None if soft is None else soft.double())
    ours, plain = (run(total(name), x, labels, soft) for name in ("fast", "reference"))
    for k in (0, 1):
        assert error(ours[k], truth[k]) <= 2 * error(plain[k], truth[k]) + 1e-4


def test_equal_inputs_give_exactly_zero(device):
    for dtype in DTYPES:
        x = torch.randn(SMALL, device=device).to(dtype)
        value, grad = run(loss_of(), x, x.clone())
        assert value == 0
        assert not grad.any()


def test_tf32_is_taken_where_it_is_allowed(cuda):
    x, target = torch.randn(2, 150, 64, 64, device=cuda), torch.randn(2, 150, 64, 64, device=cuda)
    truth = run(loss_of("reference", 150), x.double(), target.double())[0]
    exact = run(loss_of("fast", 150), x, target)[0]
    torch.backends.cudnn.allow_tf32 = True
    allowed = run(loss_of("fast", 150), x, target)[0]
    assert error(exact, truth) <= 1e-5
    assert error(allowed, truth) <= 1e-2


def test_the_gradient_has_the_predictions_layout(device):
    target = torch.randn(SMALL, device=device)
    nhwc = torch.randn(SMALL, device=device).contiguous(memory_format=torch.channels_last)
    other = run(loss_of(), nhwc, target)[1]
    plain = run(loss_of(), nhwc.contiguous(), target)[1]
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    torch.testing.assert_close(other.contiguous(), plain)


def test_inputs_are_never_written(device):
    x, target = torch.randn(SMALL, device=device), torch.randn(SMALL, device=device)
    mask = torch.rand(2, 37, 45, device=device) > 0.3
    before = [t.clone() for t in (x, target, mask)]
    run(loss_of(), x, target, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip((x, target, mask), before, strict=True))


def test_nothing_valid_and_no_image(device):
    x, target = torch.randn(SMALL, device=device), torch.randn(SMALL, device=device)
    mask = torch.zeros(2, 37, 45, dtype=torch.bool, device=device)
    value, grad = run(loss_of(), x, target, mask=mask)
    assert value == 0
    assert not grad.any()
    value, grad = run(loss_of(), x[:0], target[:0])
    assert value == 0
    assert grad.shape == x[:0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_twenty_runs_give_the_same_bits(device, kind, dtype):
    shape = (3, 19, 130, 131) if device.type == "cuda" else SMALL
    x = torch.randn(shape, device=device).to(dtype)
    target = moved(make_target(kind, shape), device, dtype)
    loss = loss_of(channels=shape[1])
    first = run(loss, x, target)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(loss, x, target), first, strict=True))


# ------------------------------------------------------------------------------ compiler, graphs


@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_compiled_equals_eager(device, kind):
    loss = loss_of(widths=NARROW)
    x, target = torch.randn(SMALL, device=device), moved(make_target(kind, SMALL), device)
    eager = run(loss, x, target)
    torch.compiler.reset()
    compiled = run(torch.compile(loss, fullgraph=True), x, target)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_no_step_waits_for_the_device(cuda):
    loss = loss_of()
    x, labels = torch.randn(SMALL, device=cuda), make_target("labels", SMALL).to(cuda)
    run(loss, x, labels)  # compiled, weights cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(loss, x, labels)
        run(loss, x, torch.randn(SMALL, device=cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_small_graph_of_the_page_replays_on_new_inputs(device, kind, dtype):
    """docs/gpu.md's recipe, as it stands there; on the CPU with a graph of its own."""
    loss = loss_of(compute_dtype=dtype)
    x = torch.randn(SMALL, device=device, requires_grad=True)
    target = moved(make_target(kind, SMALL), device)
    with contextlib.nullcontext() if device.type == "cuda" else graph_recipe.on_the_cpu([]):
        graph, value, grad = graph_recipe.capture()(loss, x, target)
    for _ in range(3):
        new = torch.randn(SMALL, device=device)
        other = moved(make_target(kind, SMALL), device)
        with torch.no_grad():
            x.copy_(new)
        target.copy_(other)
        graph.replay()
        wanted = run(loss, new, other)
        assert torch.equal(value, wanted[0])
        assert torch.equal(grad, wanted[1])


# --------------------------------------------------------------------------- streams and devices


def test_a_side_stream_waits_for_nothing_else(cuda):
    loss = loss_of()
    x, target = torch.randn(SMALL, device=cuda), torch.randn(SMALL, device=cuda)
    wanted = run(loss, x, target)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = run(loss, late, target)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_two_streams_do_not_meet(cuda):
    loss, shape = loss_of(), (2, 5, 200, 200)
    inputs = [(torch.randn(shape, device=cuda), torch.randn(shape, device=cuda)) for _ in range(2)]
    wanted = [run(loss, *pair) for pair in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got = []
    for _ in range(5):
        for stream, pair in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(loss, *pair))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(results, wanted[i % 2], strict=True))


def test_a_device_that_is_not_the_current_one(second_device, cuda):
    x, target = torch.randn(SMALL), torch.randn(SMALL)
    first = run(loss_of(), x.to(cuda), target.to(cuda))
    second = run(loss_of(), x.to(second_device), target.to(second_device))
    assert second[1].device == second_device
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_weights_of_pixels(device, kind):
    """0 and 1 have the bits of a bool mask; others multiply both maps."""
    x, target = torch.randn(SMALL, device=device), make_target(kind, SMALL)
    target = moved(target, device, torch.float32)
    mask = torch.rand(2, 37, 45, device=device) > 0.3
    mask[:, :20, :20] = True
    of_bool, of_ones = (run(loss_of(), x, target, mask=m) for m in (mask, mask.float()))
    assert all(torch.equal(a, b) for a, b in zip(of_bool, of_ones, strict=True))
    m = mask * (3 * torch.rand(2, 37, 45, device=device))
    got, want = (run(loss_of(backend=b), x, target, mask=m) for b in ("fast", "reference"))
    torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=0)
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten() for g in (got[1], want[1])), dim=0)
    assert cosine > 0.99


def test_weights_that_nobody_looks_at(cuda, monkeypatch):
    x, target = torch.randn(SMALL, device=cuda), torch.randn(SMALL, device=cuda)
    m = torch.rand(2, 37, 45, device=cuda)
    wild = m.clone()
    wild[0, 3:6, 5] = torch.tensor([-1.0, float("nan"), -float("inf")], device=cuda)
    zero = torch.where(wild > 0, wild, 0)
    monkeypatch.delenv("GPL_FAST_CHECK", raising=False)
    got, wanted = (run(loss_of(), x, target, mask=each) for each in (wild, zero))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    monkeypatch.setenv("GPL_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="finite ones >= 0"):
        loss_of()(x, target, wild)


def test_labels_out_of_range_are_ignored(cuda, monkeypatch):
    x, labels = torch.randn(SMALL, device=cuda), make_target("labels", SMALL).to(cuda)
    wrong = labels.clone()
    wrong[0, 3:7, 5] = torch.tensor([5, 4000, -7, 2**40], device=cuda)
    ignored = labels.clone()
    ignored[0, 3:7, 5] = 255
    monkeypatch.delenv("GPL_FAST_CHECK", raising=False)
    loss = loss_of(ignore_index=255)
    got, wanted = run(loss, x, wrong), run(loss, x, ignored)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    monkeypatch.setenv("GPL_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="label"):
        loss(x, wrong)


# ------------------------------------------------------------------------------- beyond 2^31


@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_loss_beyond_2_31_elements(device, kind):
    """16 x 1203 x 512 x 512: the last image's gradient is what that image alone gives."""
    big = device.type == "cuda"
    shape = (16, 1203, 512, 512) if big else (3, 20, 40, 40)
    needed = (34 if kind == "labels" else 46) * 2**30
    if big and torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    x = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()
    if kind == "labels":
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    else:
        target = torch.empty_like(x).normal_()
    loss = loss_of(channels=shape[1], reduction="none")
    value, grad = run(loss, x, target)
    alone = run(loss, x[-1:], target[-1:])
    assert error(value[-1:], alone[0]) <= 1e-2
    assert error(grad[-1:], alone[1]) <= 0.05
    assert grad[0].abs().sum() > 0

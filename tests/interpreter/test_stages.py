"""Every stage as a Triton kernel, by the operators' own tests and against the operators' bits."""

from __future__ import annotations

import importlib

import cpu_tests
import pytest
import torch

from gpl_fast import kernels, ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)


operators = cpu_tests.load("ops")
operators.ops = cpu_tests.Kernels()
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
NONE, SOFTMAX, MAX, AVG = operators.NONE, operators.SOFTMAX, operators.MAX, operators.AVG

OPERATOR_TESTS = [
    ("test_softmax_pack_dense", 1, (1, 5), FLOAT),
    ("test_softmax_pack_dense", 3, (13, 27), BF16),
    ("test_softmax_pack_dense", 19, (7, 33), FLOAT),
    ("test_softmax_pack_dense", 19, (2, 300), HALF),
    ("test_softmax_pack_dense", 150, (3, 27), BF16),
    ("test_softmax_pack_equal_inputs_give_zero", NONE),
    ("test_softmax_pack_equal_inputs_give_zero", SOFTMAX),
    ("test_softmax_pack_equal_inputs_give_zero", operators.SIGMOID),
    ("test_softmax_pack_mixed_activations", FLOAT),
    ("test_softmax_pack_mixed_activations", BF16),
    ("test_softmax_pack_labels", 3, HALF),
    ("test_softmax_pack_labels", 19, BF16),
    ("test_softmax_pack_labels", 150, FLOAT),
    ("test_softmax_pack_topk", 3, 1, False),
    ("test_softmax_pack_topk", 19, 4, True),
    ("test_softmax_pack_without_target_is_the_activation",),
    ("test_invalid_pixels_are_exactly_zero",),
    ("test_nan_in_a_valid_pixel_stays",),
    ("test_softmax_pack_extreme_logits", 1e4),
    ("test_softmax_pack_extreme_logits", 1e30),
    *(("test_any_temperature_forward", 3, t) for t in operators.TEMPERATURES),
    *(("test_any_temperature_backward", 3, t) for t in operators.TEMPERATURES),
    *(("test_any_temperature_of_listed_targets", t) for t in (1e-46, 0.3)),
    *(
        ("test_any_temperature_of_the_other_activations", a, t)
        for a in (NONE, operators.SIGMOID)
        for t in (1e-46, 0.3)
    ),
    ("test_a_target_that_is_taken_as_it_is_has_no_temperature",),
    ("test_cross_entropy_of_padded_and_large_logits",),
    ("test_without_a_backward_the_cross_entropy_leaves_no_lse", SOFTMAX, 3.0),
    ("test_without_a_backward_the_cross_entropy_leaves_no_lse", NONE, 1.0),
    ("test_a_cross_entropy_of_weight_0_has_no_gradient",),
    ("test_cross_entropy", SOFTMAX, 1.0, False, 0.0),
    ("test_cross_entropy", SOFTMAX, 2.0, True, 0.2),
    ("test_cross_entropy", NONE, 1, True, 0.0),
    ("test_softmax_bwd", 1, (7, 33), FLOAT),
    ("test_softmax_bwd", 3, (2, 300), HALF),
    ("test_softmax_bwd", 19, (13, 27), BF16),
    ("test_softmax_bwd", 150, (3, 27), FLOAT),
    ("test_softmax_bwd_with_cross_entropy_and_invalid_pixels",),
    ("test_strips_equal_the_whole", FLOAT),
    ("test_strips_equal_the_whole", BF16),
    ("test_layouts_give_the_same_bits",),
    ("test_relu_pool", 64, (13, 27), BF16, MAX),
    ("test_relu_pool", 3, (7, 33), FLOAT, MAX),
    ("test_relu_pool", 19, (2, 2), HALF, MAX),
    ("test_relu_pool", 40, (8, 6), FLOAT, AVG),
    ("test_relu_pool", 3, (7, 33), BF16, AVG),
    ("test_relu_pool", 64, (13, 27), HALF, AVG),
    ("test_max_pool_codes",),
    ("test_avg_pool_mask_is_the_sign_everywhere",),
    ("test_equal_winners_keep_the_difference",),
    ("test_nan_goes_through_the_pool",),
    ("test_relu", 1, FLOAT),
    ("test_relu", 19, BF16),
    ("test_relu", 64, HALF),
    ("test_label_conv", 1, 3, 64, FLOAT),
    ("test_label_conv", 19, 1, 64, HALF),
    ("test_label_conv", 19, 3, 24, BF16),
    ("test_label_conv", 150, 5, 70, BF16),
    ("test_topk_conv", 19, 4, BF16, True),
    ("test_topk_conv", 3, 1, FLOAT, False),
    ("test_diff_reduce", (3, 1), FLOAT),
    ("test_diff_reduce", (2, 9001), BF16),
    ("test_no_images",),
    ("test_row_slices_of_one_image_are_written_in_place",),
]


@pytest.mark.parametrize("case", OPERATOR_TESTS, ids=str)
def test_as_the_operators(case, monkeypatch):
    name, *arguments = case
    if name == "test_label_conv" and arguments[1] == 5:  # by the smaller tiles it takes longest
        label_conv = importlib.import_module("gpl_fast.kernels.label_conv")
        monkeypatch.setattr(label_conv, "PIXELS", 128)
    getattr(operators, name)(*arguments)


def test_every_stage_has_a_kernel():
    # A block's data gradient in one kernel is CUDA C++'s; Triton's backward takes ATen's.
    blocks = {"conv_block_bwd", "conv_block_logits_bwd"}
    of_the_cpu = {"winograd_weight", "winograd", "direct_weight", "direct_conv", "populate"}
    stages = {*ops._MUTATING, "diff_reduce_fwd"} - blocks - of_the_cpu
    assert stages == set(kernels.__all__) - {"conv_block_fwd"}


# ---------------------------------------------------------------------------- bit for bit


def both(run):
    """`run(stages)` by the operators and by the kernels: the same bits, NaN at the same places."""
    for by_operator, by_kernel in zip(run(ops), run(operators.ops), strict=True):
        assert by_operator.dtype == by_kernel.dtype
        torch.testing.assert_close(by_kernel, by_operator, rtol=0, atol=0, equal_nan=True)


def empties(*shapes, dtype=torch.uint8):
    return [operators.poisoned(*shape, dtype=dtype) for shape in shapes]


def signed(*shape, dtype):
    """Ties, zeros of both signs, and a few NaN and infinities among ordinary numbers."""
    x = torch.randn(shape).mul(4).round().div(4)
    x = torch.where(torch.rand(shape) < 0.1, -0.0, x)
    rare = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = torch.where(torch.rand(shape) < 0.01, rare[torch.randint(3, shape)], x)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("shape", [(3, 5, 7, 19), (2, 2, 65, 64), (2, 7, 1, 1)])
def test_relu_has_the_operators_bits(shape, dtype):
    z, dz, dy = (signed(*shape, dtype=dtype) for _ in range(3))
    packed = (*shape[:3], -(-shape[3] // 8))

    def run(stages):
        y, delta, plain, back = empties(*[shape] * 4, dtype=dtype)
        mask, plain_mask = empties(packed, packed)
        stages.relu_diff_fwd(
            z, dz=dz, from_target=operators.odd_images(shape[0]), y=y, delta=delta, mask=mask
        )
        stages.relu_fwd(z, y=plain, mask=plain_mask)
        stages.relu_bwd(dy, mask=mask, dz=back)
        return y, delta, plain, mask, plain_mask, back

    both(run)


@pytest.mark.parametrize("pool", [MAX, AVG])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("shape", [(3, 13, 27, 19), (2, 4, 65, 64), (2, 5, 3, 1), (1, 1, 6, 8)])
def test_pools_have_the_operators_bits(shape, dtype, pool):
    n, h, w, c = shape
    z, dz = (signed(*shape, dtype=dtype) for _ in range(2))
    out = (n, h // 2, w // 2, c)
    dy = signed(*out, dtype=dtype)
    packed = (*out[:3], -(-c // 2)) if pool == MAX else (n, h, w, -(-c // 8))

    def run(stages):
        y, delta, plain = empties(out, out, out, dtype=dtype)
        (back,) = empties((n, h + 3, w, c), dtype=dtype)
        code, plain_code = empties(packed, packed)
        stages.relu_pool_diff_fwd(
            z, dz=dz, from_target=operators.odd_images(n), pool=pool, y=y, delta=delta, code=code
        )
        stages.relu_pool_fwd(z, pool=pool, y=plain, code=plain_code)
        stages.relu_pool_bwd(dy, code=code, pool=pool, height=h, width=w, row0=-2, dz=back)
        return y, delta, plain, code, plain_code, back

    both(run)


def test_taken_has_the_operators_bits_where_the_halves_are_clear():
    x, labels = 3 * torch.randn(2, 19, 13, 27), torch.randint(-1, 20, (2, 13, 27))

    def run(stages):
        y = operators.poisoned(2, 13, 27, 32)
        (taken,) = empties((2, 13, 27))
        lse, ce_rows = operators.poisoned(2, 13, 27), None
        stages.softmax_pack_fwd(
            x, valid=None, target=None, from_target=None, labels=labels, topk_values=None,
            topk_indices=None, topk_rest=None, activation=SOFTMAX, target_activation=SOFTMAX,
            temperature=1.0, ce_labels=None, class_weight=None, label_smoothing=0.0, row0=0,
            rows=13, core0=0, core_rows=13, y=y, delta=None, taken=taken, lse=lse, ce_lse=None,
            ce_rows=ce_rows,
        )  # fmt: skip
        probability = x.softmax(1).gather(1, labels.clamp(0, 18).unsqueeze(1)).squeeze(1)
        return (taken.where((probability - 0.5).abs() > 1e-5, 0),)

    both(run)


# ------------------------------------------------------------------- several blocks of classes


@pytest.mark.parametrize("first", [float("nan"), -float("inf")])
def test_a_block_of_classes_without_a_number(first):
    """64 classes are looked at together: what the first ones are, the last ones must not forget."""
    x = torch.randn(1, 150, 1, 5)
    x[:, :64, :, 2] = first
    x[:, 3, :, 2] = float("nan") if first != first else -float("inf")
    y, lse = operators.poisoned(1, 1, 5, 160), operators.poisoned(1, 1, 5)
    kernels.softmax_pack_fwd(
        x, activation=SOFTMAX, target_activation=SOFTMAX, temperature=1.0, row0=0, rows=1, core0=0,
        core_rows=1, y=y, lse=lse,
    )  # fmt: skip
    want = x.softmax(1).permute(0, 2, 3, 1)
    torch.testing.assert_close(y[..., :150], want, equal_nan=True)
    torch.testing.assert_close(lse, x.logsumexp(1), equal_nan=True)
    assert not y[..., 150:].any()


def test_padding_of_the_gradient_is_not_read_as_classes():
    x, dy = torch.randn(1, 19, 2, 5), torch.randn(1, 2, 5, 32)
    dy[..., 19:] = float("nan")
    dx = operators.poisoned(1, 19, 2, 5)
    kernels.softmax_bwd(
        x, activation=SOFTMAX, temperature=1.0, row0=0, rows=2, dx=dx, lse=x.logsumexp(1), dy=dy,
        scale=torch.ones(1),
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    leaf.softmax(1).backward(dy[..., :19].permute(0, 3, 1, 2))
    torch.testing.assert_close(dx, leaf.grad)

"""SegmentationLoss in modes "binary" and "multilabel": labels of single elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import NARROW, agree, error, value_and_grad
from elements import CHANNELS, DTYPES, TARGETS, against_float64, drawn
from inside import step
from policies import decided
from saved import fast_node

from gpl_fast import GenericPerceptualLoss, LossNet, SegmentationLoss, TopK, functional, reference
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = tuple(CHANNELS)
SMALL = {"net": "1,1", "widths": NARROW}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient(mode, backend, dtype, kind):
    for seed, (rows, arithmetic) in enumerate([(None, "float32"), (4, "own"), (2, "mixed")] * 2):
        with decided(rows=rows, arithmetic=arithmetic):
            against_float64(mode, kind, DTYPES[dtype], seed)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", ["float64"])
@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, backend, dtype, kind):
    d = drawn(mode, kind, torch.float64, 1, size=(1, 5, 6))
    loss = SegmentationLoss(CHANNELS[mode], backend=backend, **d.options)
    loss.gpl.options = GenericPerceptualLoss(
        CHANNELS[mode], compute_dtype=torch.float64, backend=backend, activation="sigmoid",
        **{k: d.options[k] for k in ("temperature", "reduction", "ignore_index")}, **SMALL,
    ).options  # fmt: skip
    x = torch.where(d.counted, d.logits, torch.zeros((), dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda x: loss(x, d.labels, d.teacher, d.mask), x.requires_grad_(), eps=1e-6
    )


# ------------------------------------------------------------------------------------ cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([0.5, 0.0, 7.0])])
def test_the_cross_entropy_is_pytorchs(smoothing, pos_weight, backend):
    x, y = 3 * torch.randn(2, 3, 9, 8).double(), torch.randint(2, (2, 3, 9, 8))
    options = {"pos_weight": pos_weight, "label_smoothing": smoothing, **SMALL}
    loss = SegmentationLoss(3, mode="multilabel", backend=backend, **options)
    dtype = torch.float64 if backend == "reference" else torch.float32
    ours = loss(x.to(dtype), y, return_parts=True)["loss_ce"]
    soft = y.double() * (1 - smoothing) + smoothing / 2
    of_ones = None if pos_weight is None else pos_weight.double().view(-1, 1, 1)
    truth = F.binary_cross_entropy_with_logits(x, soft, pos_weight=of_ones)
    assert error(ours, truth) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_it_stays_exact_where_logits_are_large(backend):
    """Sure and right costs e^−|x|, sure and wrong |x|."""
    for size in (20.0, 80.0, 1e4, 1e36):
        x = torch.tensor([size, -size]).view(1, 1, 1, 2).repeat(1, 1, 4, 2)
        right = (x > 0).long()
        loss = SegmentationLoss(1, mode="binary", net="1", widths=(8,), backend=backend)
        for labels, one in ((right, torch.tensor(-size).double().exp()), (1 - right, size)):
            found = loss(x, labels, return_parts=True)["loss_ce"]
            torch.testing.assert_close(float(found), float(one), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_counted_is_zero_and_connected(mode, backend):
    c = CHANNELS[mode]
    x = torch.full((2, c, 8, 9), float("nan"))
    labels = torch.full((2, c, 8, 9), 255)
    for reduction in ("mean", "sum", "none"):
        loss = SegmentationLoss(c, mode=mode, backend=backend, reduction=reduction, **SMALL)
        value, grad = value_and_grad(loss, x, labels)
        assert not value.any()
        assert not grad.any()
    some = labels.clone()
    some[1] = 1
    value, grad = value_and_grad(loss, x.nan_to_num(0.3), some)
    assert value[0] == 0
    assert value[1] > 0
    assert not grad[0].any()


def test_no_image(backend):
    loss = SegmentationLoss(3, mode="multilabel", backend=backend, **SMALL)
    x = torch.zeros(0, 3, 8, 9)
    value, grad = value_and_grad(loss, x, torch.zeros(0, 3, 8, 9, dtype=torch.long))
    assert value == 0
    assert grad.shape == x.shape


# ----------------------------------------------------------------------------- two ways to the same


def test_labels_of_one_class_with_and_without_their_axis(backend):
    loss = SegmentationLoss(1, mode="binary", backend=backend, **SMALL)
    x, y = torch.randn(2, 1, 9, 8), torch.randint(3, (2, 9, 8))
    y[y == 2] = 255
    multilabel = SegmentationLoss(1, mode="multilabel", backend=backend, **SMALL)
    wanted = value_and_grad(loss, x, y)
    for other, labels in ((loss, y[:, None]), (multilabel, y[:, None]), (multilabel, y)):
        assert all(map(torch.equal, value_and_grad(other, x, labels), wanted))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16,
                                   torch.bfloat16, torch.float64])  # fmt: skip
def test_labels_of_any_dtype(dtype, backend):
    loss = SegmentationLoss(3, mode="multilabel", backend=backend, ignore_index=-1, **SMALL)
    x, y = torch.randn(2, 3, 9, 8), torch.randint(2, (2, 3, 9, 8))
    if dtype not in (torch.bool, torch.uint8):
        y[:, 1, 2:4] = -1
    wanted = value_and_grad(loss, x, y)
    other = y.to(dtype).contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, value_and_grad(loss, x, other), wanted))


def test_a_label_that_a_dtype_cannot_hold_is_not_another_one():
    """255 is −1 in uint8 to PyTorch."""
    loss = SegmentationLoss(1, mode="binary", ignore_index=-1, **SMALL)
    labels = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"64 elements that are neither 0 nor 1, such as \[255"):
        loss(torch.zeros(1, 1, 8, 8), labels)


def test_one_hot_labels_are_the_classes_map(backend):
    """The perceptual term is that of labels, on sigmoids."""
    x, classes = torch.randn(2, 4, 17, 14), torch.randint(4, (2, 17, 14))
    one_hot = F.one_hot(classes, 4).permute(0, 3, 1, 2)
    total = SegmentationLoss(4, mode="multilabel", ce_weight=0, gpl_weight=1, backend=backend,
                             **SMALL)  # fmt: skip
    gpl = GenericPerceptualLoss(4, activation="sigmoid", backend=backend, **SMALL)
    agree(value_and_grad(total, x, one_hot), value_and_grad(gpl, x, classes))
    dense = GenericPerceptualLoss(
        4, activation="sigmoid", target_activation="none", backend=backend, **SMALL
    )
    as_dense = value_and_grad(dense, x, one_hot.float())
    assert all(map(torch.equal, value_and_grad(total, x, one_hot), as_dense))


def test_an_ignored_element_is_zero_in_both_maps_alone(backend):
    """As by hand: the prediction's logit there is −inf and the target's map 0."""
    x, y = torch.randn(2, 3, 9, 8), torch.randint(2, (2, 3, 9, 8))
    ignored = torch.rand(x.shape) < 0.2
    total = SegmentationLoss(3, mode="multilabel", ce_weight=0, gpl_weight=1, backend=backend,
                             **SMALL)  # fmt: skip
    value, grad = value_and_grad(total, x, y.masked_fill(ignored, 255))
    gpl = GenericPerceptualLoss(
        3, activation="sigmoid", target_activation="none", backend=backend, **SMALL
    )
    by_hand = value_and_grad(
        gpl, x.masked_fill(ignored, -float("inf")), y.masked_fill(ignored, 0).float()
    )
    agree((value, grad), by_hand)
    assert not grad[ignored].any()
    poisoned = value_and_grad(
        total, x.masked_fill(ignored, float("nan")), y.masked_fill(ignored, 255)
    )
    assert all(map(torch.equal, poisoned, (value, grad)))


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_takes_all_classes_of_a_pixel(mode, backend):
    c = CHANNELS[mode]
    x, y = torch.randn(2, c, 9, 8), torch.randint(2, (2, c, 9, 8))
    mask = torch.rand(2, 9, 8) < 0.7
    loss = SegmentationLoss(c, mode=mode, backend=backend, **SMALL)
    masked = value_and_grad(loss, x, y, mask=mask)
    ignored = value_and_grad(loss, x, y.where(mask.unsqueeze(1), 255))
    agree(masked, ignored)
    assert not masked[1].masked_select(~mask.unsqueeze(1)).any()
    hidden = x.where(mask.unsqueeze(1), float("nan"))
    junk = y.where(mask.unsqueeze(1), 77)
    assert all(map(torch.equal, value_and_grad(loss, hidden, junk, mask=mask), masked))


@pytest.mark.parametrize("mode", MODES)
def test_a_floating_mask_of_zeros_and_ones_is_the_bool_one(mode, backend):
    c = CHANNELS[mode]
    x, y = torch.randn(2, c, 9, 8), torch.randint(2, (2, c, 9, 8))
    mask = torch.rand(2, 9, 8) < 0.7
    loss = SegmentationLoss(c, mode=mode, backend=backend, **SMALL)
    found, wanted = (value_and_grad(loss, x, y, mask=m) for m in (mask.float(), mask))
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(loss.count(y, mask.float()), loss.count(y, mask))


def test_weights_of_pixels_weigh_all_classes(backend):
    x, y = torch.randn(2, 3, 9, 8), torch.randint(2, (2, 3, 9, 8))
    m = torch.rand(2, 9, 8)
    y[0, 1, :4] = 255
    loss = SegmentationLoss(3, mode="multilabel", backend=backend, gpl_weight=0.2, **SMALL)
    each = F.binary_cross_entropy_with_logits(x, (y == 1).float(), reduction="none")
    counted = (y != 255) * m.unsqueeze(1)
    ce = loss(x, y, mask=m, return_parts=True)["loss_ce"]
    torch.testing.assert_close(ce, (each * counted).sum() / counted.sum())
    torch.testing.assert_close(loss.count(y, m), torch.tensor([counted.double().sum(), 2.0]))


@pytest.mark.parametrize("mode", MODES)
def test_small_logits_are_resized(mode, backend):
    c = CHANNELS[mode]
    x, y = torch.randn(2, c, 5, 4), torch.randint(2, (2, c, 10, 9))
    loss = SegmentationLoss(c, mode=mode, backend=backend, **SMALL)
    agree(value_and_grad(loss, x, y),
          value_and_grad(lambda x, y: loss(reference.resize(x, (10, 9)), y), x, y))  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_as_a_function(mode, backend):
    c = CHANNELS[mode]
    x, y = torch.randn(2, c, 9, 8), torch.randint(2, (2, c, 9, 8))
    net = LossNet.vgg(c, (1, 1), NARROW[:2])
    options = {"mode": mode, "pos_weight": [2.0] * c, "class_weight": [0.5] * c,
               "label_smoothing": 0.1, "backend": backend}  # fmt: skip
    loss = SegmentationLoss(c, net=net, **options)
    found = value_and_grad(
        lambda x, y: functional.segmentation_loss(x, y, net, ignore_index=255, **options), x, y
    )
    assert all(map(torch.equal, found, value_and_grad(loss, x, y)))


def test_strips_do_not_change_a_bit_of_the_cross_entropy():
    x, y = torch.randn(2, 5, 19, 14), torch.randint(2, (2, 5, 19, 14))
    y[:, :, 4:9, 3:5] = 255
    loss = SegmentationLoss(5, mode="multilabel", backend="fast", pos_weight=[2.0] * 5, **SMALL)
    found = []
    for rows in (None, 2, 4):
        with decided(rows=rows, arithmetic="own"):
            found.append(
                value_and_grad(lambda x, y: loss(x, y, return_parts=True)["loss_ce"], x, y)
            )
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


def test_pieces_of_a_batch_add_up(backend):
    x, y = torch.randn(4, 3, 9, 8), torch.randint(2, (4, 3, 9, 8))
    y[0, 1] = 255
    y[2, :, 2:4] = 255
    loss = SegmentationLoss(3, mode="multilabel", class_weight=[1.0, 2.0, 0.5], backend=backend,
                            **SMALL)  # fmt: skip
    counts = sum(loss.count(part) for part in y.split(2))
    assert counts.tolist() == [float((y != 255).sum()), 4.0]
    whole = value_and_grad(loss, x, y)
    pieces = [
        value_and_grad(loss, a, b, normalizer=counts)
        for a, b in zip(x.split(2), y.split(2), strict=True)
    ]
    agree((sum(p[0] for p in pieces), torch.cat([p[1] for p in pieces])), whole)


# ------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("kind", ["labels", "ignored stay", "teacher", "no ce", "no ce, all stay"])
def test_what_is_saved_besides_the_perceptual_terms(kind):
    """The caller's logits and the labels in uint8: nothing else of the cross-entropy."""
    n, c, h, w = 2, 5, 16, 16
    x, y = torch.randn(n, c, h, w).requires_grad_(), torch.randint(2, (n, c, h, w))
    options = {
        "ignored stay": {"gpl_ignore": False},
        "no ce": {"ce_weight": 0},
        "no ce, all stay": {"ce_weight": 0, "gpl_ignore": False},
    }.get(kind, {})
    loss = SegmentationLoss(c, mode="multilabel", backend="fast", **options, **SMALL)
    teacher = torch.randn(n, c, h, w) if kind == "teacher" else None
    total = loss(x, y, teacher)
    tensors = fast_node(total).saved_tensors
    assert tensors[0].data_ptr() == x.data_ptr()
    labels = [t for t in tensors if t.dtype == torch.uint8 and t.shape == x.shape]
    assert len(labels) == (kind != "no ce, all stay")
    gpl = GenericPerceptualLoss(c, activation="sigmoid", target_activation="none", backend="fast",
                                **SMALL)  # fmt: skip
    alone = fast_node(gpl(x, torch.rand(x.shape))).saved_tensors

    def size(saved):
        return sum(t.numel() * t.itemsize for t in saved)

    assert size(tensors) == size(alone) + size(labels)
    said = loss.explain(x, y, teacher)
    assert said.bytes_saved == size(tensors[1:])
    assert ("binary_ce_fwd" in str(said)) == (kind not in ("no ce", "no ce, all stay"))
    assert ("binary_ce_bwd" in str(said)) == (kind != "no ce, all stay")


@pytest.mark.parametrize("mode", MODES)
def test_the_memory_of_a_step_is_what_is_planned(mode):
    c = CHANNELS[mode]
    loss = SegmentationLoss(c, mode=mode, net="1,1", widths=(16, 16), backend="fast")
    x = torch.randn(2, c, 96, 128)
    for taken in step(loss, x, torch.randint(2, x.shape)):
        assert taken.transient <= taken.plan.bytes_transient()


def test_explained_and_printed():
    loss = SegmentationLoss(3, mode="multilabel", pos_weight=[1.0, 2.0, 3.0], **SMALL)
    assert "mode='multilabel'" in repr(loss)
    assert "pos_weight=[1.0, 2.0, 3.0]" in repr(loss)
    assert not loss.state_dict()
    x = torch.empty(2, 3, 64, 64, device="meta")
    found = loss.explain(x, torch.empty(2, 3, 64, 64, device="meta", dtype=torch.uint8),
                         architecture="sm_90")  # fmt: skip
    assert "binary_ce_fwd (Triton)" in str(found)
    assert "binary_ce_bwd (csrc/cuda)" in str(found)


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    c = CHANNELS[mode]
    loss = SegmentationLoss(c, mode=mode, pos_weight=[2.0] * c, backend="fast", **SMALL)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in ((9, 8), (12, 10)):
        x, y = torch.randn(2, c, *size), torch.randint(2, (2, c, *size))
        y[:, :, 2:4] = 255
        for args in ((y,), (y, torch.randn(x.shape))):
            assert all(map(torch.equal, value_and_grad(compiled, x, *args),
                           value_and_grad(loss, x, *args)))  # fmt: skip


def test_the_operator_holds_what_it_says():
    labels = torch.tensor([0, 1, 255, 0]).view(1, 1, 2, 2)
    for mask in (None, torch.tensor([[[True, False], [True, True]]])):
        torch.library.opcheck(
            torch.ops.gpl_fast.check_elements.default, (labels, mask, [255]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SegmentationLoss(3, mode="multi"), "mode: got 'multi', expected one of"),
        (lambda: SegmentationLoss(2, mode="binary"), "num_classes: got 2, expected 1 with mode="),
        (lambda: SegmentationLoss(0, mode="multilabel"), "num_classes: got 0"),
        (lambda: SegmentationLoss(1), "one channel use mode='binary'"),
        (lambda: SegmentationLoss(3, pos_weight=[1, 1, 1]), "pos_weight: got one with mode='multi"),
        (lambda: SegmentationLoss(3, mode="multilabel", pos_weight=[1, 1]), "pos_weight: got sha"),
        (lambda: SegmentationLoss(3, mode="multilabel", pos_weight=[1, -1, 1]), "pos_weight: got"),
        (lambda: SegmentationLoss(1, mode="binary", activation="softmax"),
         "activation: got 'softmax' with mode='binary'.*expected 'sigmoid'"),
    ],
)  # fmt: skip
def test_what_a_mode_does_not_take(make, said):
    with pytest.raises(ValueError, match=said):
        make()


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("labels", "error", "said"),
    [
        (torch.zeros(2, 8, 8).long(), ValueError, r"expected \(N, 3, H, W\).*mode='multiclass'"),
        (torch.zeros(2, 8, 8, 3).long(), ValueError, r"movedim\(-1, 1\)"),
        (torch.zeros(3, 3, 8, 8).long(), ValueError, "got 3 images, expected 2"),
        (torch.zeros(2, 3, 4, 8).long(), ValueError, "labels: got size"),
        (torch.full((2, 3, 8, 8), 0.5), ValueError,
         r"384 elements that are neither 0 nor 1, such as \[0.5\].*target_activation='none'"),
        (torch.full((2, 3, 8, 8), float("nan")), ValueError, "384 elements"),
        (torch.full((2, 3, 8, 8), 2), ValueError, r"\[2\], expected 0 and 1 or ignore_index=255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), TypeError, "labels: got torch.complex64"),
        ([[0]], TypeError, "labels: got"),
    ],
)  # fmt: skip
def test_labels_that_are_refused(labels, error, said):
    with pytest.raises(error, match=said):
        SegmentationLoss(3, mode="multilabel", **SMALL)(X, labels)


def test_teachers_that_single_elements_cannot_leave():
    loss = SegmentationLoss(3, mode="multilabel", gpl_ignore=True, **SMALL)
    labels = torch.zeros(2, 3, 8, 8).long()
    sparse = TopK(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8).long())
    for teacher, kind in ((loss.encode(torch.randn(X.shape)), "features"), (sparse, "topk")):
        with pytest.raises(ValueError, match=f"teacher of {kind}, which no single elements"):
            loss(X, labels, teacher)


def test_multi_hot_labels_elsewhere_name_the_mode():
    with pytest.raises(ValueError, match="mode='multilabel'"):
        SegmentationLoss(3, **SMALL)(X, torch.zeros(2, 3, 8, 8).long())

"""The segmentation total where weights vanish, terms are off, and validation loops run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpl_fast import SegmentationLoss, TopK

N, C, SIZE = 3, 4, (32, 36)


def logits():
    return (3 * torch.randn(N, C, *SIZE)).requires_grad_()


def labels(ignored=True):
    y = torch.randint(0, C, (N, *SIZE))
    if ignored:
        y[:, :4] = 255
    return y


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_no_counted_weight_means_no_cross_entropy(reduction, smoothing, backend):
    """Image 0 holds only a class of weight 0, image 1 nothing that counts, image 2 everything."""
    y = labels()
    y[0], y[1] = 1, 255
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    x = logits()
    parts = SegmentationLoss(
        C, class_weight=weight, label_smoothing=smoothing, reduction=reduction, backend=backend,
        return_parts=True,
    )(x, y)  # fmt: skip
    each = [
        torch.zeros(()),
        torch.zeros(()),
        F.cross_entropy(x[2:], y[2:], weight, ignore_index=255, label_smoothing=smoothing),
    ]
    if reduction == "none":
        torch.testing.assert_close(parts["loss_ce"], torch.stack(each))
    elif reduction == "sum":
        torch.testing.assert_close(parts["loss_ce"], sum(each))
    else:
        both = F.cross_entropy(x, y, weight, ignore_index=255, label_smoothing=smoothing)
        torch.testing.assert_close(parts["loss_ce"], both)
    (dx,) = torch.autograd.grad(parts["loss_ce"].sum(), x)
    assert dx.isfinite().all()
    if reduction != "mean":
        assert (dx[:2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_but_weight_0_in_the_whole_batch(reduction, backend):
    y = torch.ones(N, *SIZE, dtype=torch.long)
    weight = [1.0, 0.0, 1.0, 1.0]
    x = logits()
    value = SegmentationLoss(
        C, class_weight=weight, label_smoothing=0.1, reduction=reduction, backend=backend,
        return_parts=True,
    )(x, y)["loss_ce"]  # fmt: skip
    assert (value == 0).all()
    (dx,) = torch.autograd.grad(value.sum(), x)
    assert (dx == 0).all()


@pytest.mark.parametrize(
    "options",
    [{"temperature": 3.0}, {"temperature": 0.3}, {"activation": "sigmoid"}, {"activation": "none"}],
    ids=str,
)
@pytest.mark.parametrize("teacher", ["labels", "dense", "topk"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_validation_loop_gives_the_training_loops_value(options, teacher, context, backend):
    total = SegmentationLoss(C, backend=backend, **options)
    x, y = logits(), labels()
    given = None
    if teacher == "dense":
        given = torch.randn(N, C, *SIZE)
    elif teacher == "topk":
        given = TopK(*torch.randn(N, C, *SIZE).softmax(dim=1).topk(2, dim=1))
    want = total(x, y, given)
    with context():
        torch.testing.assert_close(total(x, y, given), want.detach())
    # The cross-entropy is PyTorch's, whatever the perceptual term's activation.
    parts = total(x, y, given, return_parts=True)
    torch.testing.assert_close(parts["loss_ce"], F.cross_entropy(x, y, ignore_index=255))


def test_a_weight_of_0_computes_no_cross_entropy(backend, monkeypatch):
    from gpl_fast import reference

    x, y = logits(), labels()
    want = SegmentationLoss(C, backend=backend, return_parts=True)(x, y)["loss_gpl"]

    def refuse(*args, **kwargs):
        raise AssertionError("a cross-entropy was computed")

    monkeypatch.setattr(reference, "cross_entropy", refuse)
    monkeypatch.setattr(F, "cross_entropy", refuse)
    total = SegmentationLoss(C, ce_weight=0, backend=backend)
    parts = total(x, y, return_parts=True)
    assert parts["loss_ce"] == 0
    torch.testing.assert_close(parts["loss_gpl"], want)
    torch.testing.assert_close(total(x, y), want)


def test_both_weights_0_are_still_connected(backend):
    x = logits()
    value = SegmentationLoss(C, ce_weight=0, gpl_weight=0, backend=backend)(x, labels())
    assert value == 0
    (dx,) = torch.autograd.grad(value, x)
    assert (dx == 0).all()


def test_a_label_teacher_may_have_the_ignored_value(backend):
    """A pixel that the teacher ignores leaves the perceptual term, as with labels alone."""
    x, y = logits(), labels(ignored=False)
    teacher = labels()
    total = SegmentationLoss(C, backend=backend, return_parts=True)
    alone = SegmentationLoss(C, backend=backend, return_parts=True)(x, teacher)["loss_gpl"]
    torch.testing.assert_close(total(x, y, teacher)["loss_gpl"], alone)
    with pytest.raises(ValueError, match="outside"):
        SegmentationLoss(C, ignore_index=-1)(x, y, teacher)


def test_encoded_features_and_gpl_ignore(backend):
    x, y, teacher = logits(), labels(), torch.randn(N, C, *SIZE)
    total = SegmentationLoss(C, gpl_ignore=True, backend=backend, compute_dtype=torch.float32)
    want = total(x, y, teacher)
    made = total.encode(teacher, mask=y != 255)
    torch.testing.assert_close(total(x, y, made), want)
    for other in (total.encode(teacher), total.encode(teacher, mask=torch.ones(N, *SIZE).bool())):
        with pytest.raises(
            ValueError, match=r"gpl_ignore=True: .*encode\(teacher, mask="
        ) as caught:
            total(x, y, other)
        assert "leave it out" not in str(caught.value)  # there was no mask to leave out
    # Without it a teacher speaks for ignored pixels too.
    auto = SegmentationLoss(C, backend=backend, compute_dtype=torch.float32)
    torch.testing.assert_close(auto(x, y, auto.encode(teacher)), auto(x, y, teacher))


def test_class_weights_made_under_inference_mode(backend):
    with torch.inference_mode():
        total = SegmentationLoss(C, class_weight=torch.rand(C) + 0.5, backend=backend)
    x, y = logits(), labels()
    parts = total(x, y, return_parts=True)
    want = F.cross_entropy(x, y, total.class_weight.clone(), ignore_index=255)
    torch.testing.assert_close(parts["loss_ce"], want)
    (dx,) = torch.autograd.grad(parts["loss_ce"], x, retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(want, x)[0])


def test_class_weights_are_copies():
    weight = torch.ones(C)
    total = SegmentationLoss(C, class_weight=weight)
    weight.zero_()
    assert total.class_weight.tolist() == [1.0] * C


def test_return_parts_of_the_constructor_and_of_the_call():
    x, y = logits(), labels()
    parts = SegmentationLoss(C, return_parts=True)
    assert set(parts(x, y)) == {"loss_ce", "loss_gpl"}
    assert parts(x, y, return_parts=False).dim() == 0
    assert set(SegmentationLoss(C)(x, y, return_parts=True)) == {"loss_ce", "loss_gpl"}


@pytest.mark.parametrize("teacher", [False, True])
def test_labels_of_any_strides(teacher, backend):
    x, y = logits(), labels()
    given = torch.randn(N, C, *SIZE) if teacher else None
    total = SegmentationLoss(C, backend=backend)
    want = total(x, y, given)
    for strided in (
        y.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        y.transpose(1, 2).contiguous().transpose(1, 2),
        y[:1].expand(N, -1, -1),
    ):
        same = strided if strided.shape == y.shape and torch.equal(strided, y) else None
        value = total(x, strided, given)
        torch.testing.assert_close(value, total(x, strided.clone(), given))
        if same is not None:
            torch.testing.assert_close(value, want)

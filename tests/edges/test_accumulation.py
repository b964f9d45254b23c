"""A batch in pieces is the whole batch (normalizer=, count()), and several ignored labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import agree

from gpl_fast import GenericPerceptualLoss, LossNet, SegmentationLoss, functional

C, SIZE = 4, (18, 21)
WEIGHT = [1.0, 0.25, 0.0, 2.0]
PIECES = (slice(0, 1), slice(1, 3), slice(3, 5))


def batch(n=5):
    """Logits and labels; image 0 has few that count, image 3 none."""
    y = torch.randint(0, C, (n, *SIZE))
    y[0, 2:] = 255
    y[3] = 7
    return (3 * torch.randn(n, C, *SIZE)).requires_grad_(), y


def make(backend="fast", **words):
    return SegmentationLoss(C, net="1,1", ignore_index=(255, 7), backend=backend, **words)


def accumulated(loss, x, y, normalizer, *, teacher=None, mask=None):
    """Sum of the parts of the pieces, and of their gradients."""
    total = dict.fromkeys(("loss_ce", "loss_gpl"), 0.0)
    grad = torch.zeros_like(x)
    for piece in PIECES:
        parts = loss(
            x[piece], y[piece],
            teacher=None if teacher is None else teacher[piece],
            mask=None if mask is None else mask[piece],
            normalizer=normalizer, return_parts=True,
        )  # fmt: skip
        grad += torch.autograd.grad(sum(parts.values()), x)[0]
        total = {name: total[name] + part.detach() for name, part in parts.items()}
    return (*total.values(), grad)


def whole(loss, x, y, **given):
    parts = loss(x, y, return_parts=True, **given)
    (grad,) = torch.autograd.grad(sum(parts.values()), x)
    return (*(part.detach() for part in parts.values()), grad)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "class_weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", ["labels", "teacher"])
def test_pieces_add_up_to_the_batch(backend, target, smoothing, weight):
    x, y = batch()
    loss = make(backend, class_weight=weight, label_smoothing=smoothing, gpl_weight=3.0)
    given = {"mask": torch.rand(5, *SIZE) > 0.2}
    if target == "teacher":
        given["teacher"] = torch.randn(5, C, *SIZE)
    counts = sum(loss.count(y[p], given["mask"][p]) for p in PIECES)
    assert counts.tolist()[1] == 5
    agree(accumulated(loss, x, y, counts, **given), whole(loss, x, y, **given))


@pytest.mark.parametrize(
    "given",
    [
        lambda pixels: (int(pixels), 5),
        lambda pixels: [np.float32(pixels), np.int64(5)],
        lambda pixels: (pixels.long(), torch.tensor(5, dtype=torch.int32)),
        lambda pixels: torch.stack([pixels, torch.full_like(pixels, 5)]),
    ],
    ids=["int", "numpy", "tensors", "one tensor"],
)
@pytest.mark.parametrize("form", ["module", "function"])
def test_numbers_and_tensors_say_the_same(given, form):
    x, y = batch()
    loss = make()
    want = whole(loss, x, y)
    pixels = loss.count(y)[0]
    assert int(pixels) == int(((y != 255) & (y != 7)).sum())
    if form == "module":
        got = accumulated(loss, x, y, given(pixels))
    else:

        def call(logits, labels, **words):
            return functional.segmentation_loss(
                logits, labels, loss.net, ignore_index=[7, 255], **words
            )

        got = accumulated(call, x, y, given(pixels))
    agree(got, want)


def test_without_images_the_perceptual_term_is_a_mean_over_the_call(backend):
    x, y = batch()
    loss = make(backend)
    one = loss(x[:3], y[:3], return_parts=True)
    two = loss(x[:3], y[:3], return_parts=True, normalizer=1000)
    assert torch.equal(one["loss_gpl"], two["loss_gpl"])
    counted = loss.count(y[:3])[0]
    torch.testing.assert_close(two["loss_ce"], (one["loss_ce"] * counted / 1000).float())


def test_nothing_counted_anywhere_is_0(backend):
    x, y = batch()
    y[:] = 255
    loss = make(backend, label_smoothing=0.1, class_weight=WEIGHT)
    for normalizer in (loss.count(y), (0, 5), (3.0, 0), (torch.tensor(0), torch.tensor(0))):
        value = loss(x, y, normalizer=normalizer)
        (grad,) = torch.autograd.grad(value, x)
        assert value == 0
        assert (grad == 0).all()


def test_a_compiled_step_takes_new_counts_without_a_graph_of_its_own():
    x, y = batch()
    loss = make()
    graphs = 0

    def backend(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward

    step = torch.compile(loss, backend=backend, fullgraph=True)
    for pixels in (700.0, 800.0, 900.0, 1000.0):
        count = torch.tensor(pixels)
        torch.testing.assert_close(
            step(x, y, normalizer=(count, 5)), loss(x, y, normalizer=(pixels, 5))
        )
    assert graphs == 1
    for pixels in (700.0, 800.0, 900.0, 1000.0):
        got = step(x, y, normalizer=(pixels, 5))
        torch.testing.assert_close(got, loss(x, y, normalizer=(pixels, 5)))
    assert graphs <= 3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_have_divisors_of_their_own(reduction):
    x, y = batch()
    with pytest.raises(ValueError, match=f"{reduction}.*expected reduction='mean'"):
        make(reduction=reduction)(x, y, normalizer=(10, 5))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (-1, "got -1"),
        ((1, 2, 3), r"got \(1, 2, 3\)"),
        ((), r"got \(\)"),
        ("12", "got '12'"),
        (float("nan"), "got nan"),
        (torch.ones(3), r"got shape \(3,\)"),
        ((torch.ones(2), 1), r"\(2,\), expected a 0-dim tensor"),
        ((None, 1), "got None"),
        (torch.tensor(True), r"torch\.bool"),
        (torch.tensor(float("nan")), "got nan"),
        (torch.tensor([5.0, -1.0]), "got -1"),
        (np.ones(3), r"got array\(\[1\., 1\., 1\.\]\)"),
    ],
)
def test_other_normalizers_are_refused(given, word):
    x, y = batch()
    with pytest.raises(ValueError, match=f"normalizer: .*{word}"):
        make()(x, y, normalizer=given)


@pytest.mark.parametrize("given", [(255, 7), [7, 255, 7], (np.int64(255), torch.tensor(7))])
def test_several_labels_are_ignored(given, backend):
    x, y = batch()
    one = y.masked_fill(y == 7, 255)
    got = SegmentationLoss(C, net="1,1", ignore_index=given, backend=backend)
    want = SegmentationLoss(C, net="1,1", backend=backend)
    assert torch.equal(got(x, y), want(x, one))
    assert sorted(got.gpl.options.ignored) == [7, 255]
    alone = GenericPerceptualLoss(C, "1,1", ignore_index=given, backend=backend)
    assert torch.equal(
        alone(x, y), GenericPerceptualLoss(C, "1,1", ignore_index=255, backend=backend)(x, one)
    )
    teacher = torch.randn(5, C, *SIZE)
    for word in (True, False, "auto"):
        got.gpl_ignore = want.gpl_ignore = word
        assert torch.equal(got(x, y, teacher), want(x, one, teacher))


def test_few_and_no_ignored_labels():
    def of(index):
        return GenericPerceptualLoss(C, "1,1", ignore_index=index).options

    assert of([7]) == of(7) == of((7, 7))
    assert of([]) == of(None)
    assert of(()).ignored == ()
    assert "ignore_index=(255, 7)" in repr(GenericPerceptualLoss(C, "1,1", ignore_index=[255, 7]))
    with pytest.raises(ValueError, match=r"ignore_index: got 1\.5, expected an integer, several"):
        of((7, 1.5))
    with pytest.raises(ValueError, match="ignore_index: got 'seven'"):
        of("seven")
    with pytest.raises(ValueError, match="expected 'auto', integers or None"):
        SegmentationLoss(C, ignore_index="seven")


def test_wrong_labels_name_all_that_are_ignored():
    x, y = batch()
    y[1, 5, 5] = 9
    with pytest.raises(ValueError, match=r"got 1 pixels .*\[9\].*ignore_index=\(255, 7\)"):
        make()(x, y)
    with pytest.raises(ValueError, match=r"got 1 pixels .*\[9\].*ignore_index=\(255, 7\)"):
        make().count(y)


def test_several_ignored_labels_in_a_compiled_graph():
    x, y = batch()
    net = LossNet.vgg(C, (1, 1))
    for given in ((255, 7), (255, 7, 3), 255):
        loss = SegmentationLoss(C, net=net, ignore_index=given)
        labels = y if isinstance(given, tuple) else y.masked_fill(y == 7, 255)
        step = torch.compile(loss, backend="aot_eager", fullgraph=True)
        assert torch.equal(step(x, labels), loss(x, labels))

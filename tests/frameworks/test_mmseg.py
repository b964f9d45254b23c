"""examples/mmseg_head.py, gpl_fast.integrations.mmseg, and what docs/frameworks/mmsegmentation.md
says."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from recipes import recipe

import gpl_fast
from gpl_fast.integrations.mmseg import SegmentationLoss

TYPE = "gpl_fast.integrations.mmseg.SegmentationLoss"
LOGITS = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (2, 40, 48), generator=torch.Generator().manual_seed(1))
LABELS[:, :9] = 255


def test_the_loss_falls(tmp_path):
    runner = recipe("mmseg_head").main(str(tmp_path))
    history = runner.message_hub.get_scalar("train/decode.loss_gpl").data[0]
    assert history[-1] < 0.8 * history[0]
    assert not any("loss_decode" in name for name in runner.model.state_dict())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "sampler"])
@pytest.mark.parametrize("factor", [None, 1000.0], ids=["", "avg_factor"])
def test_the_cross_entropy_is_mmsegmentations(average, weighted, factor):
    weight = torch.rand(2, 40, 48) if weighted else None
    given = {"weight": weight, "avg_factor": factor, "ignore_index": 255}
    words = {"avg_non_ignore": average}
    theirs = CrossEntropyLoss(**words)(LOGITS, LABELS, **given)
    ours = SegmentationLoss(3, gpl_weight=0, **words)(LOGITS, LABELS, **given)
    torch.testing.assert_close(ours, theirs)


def test_class_weights_average_over_what_counts():
    labels = LABELS.clamp(max=2)  # mmsegmentation looks up the weight of 255, which is not there
    weight = [1.0, 2.0, 0.5]
    theirs = CrossEntropyLoss(class_weight=weight)(LOGITS, labels, ignore_index=255)
    ours = SegmentationLoss(3, gpl_weight=0, class_weight=weight)(LOGITS, labels)
    torch.testing.assert_close(ours, theirs)


def test_by_default_ignored_pixels_are_in_the_divisor():
    """Not so for `gpl_fast.SegmentationLoss` itself."""
    counted = float((LABELS != 255).float().mean())
    plain = gpl_fast.SegmentationLoss(3, gpl_weight=0)(LOGITS, LABELS)
    torch.testing.assert_close(SegmentationLoss(3, gpl_weight=0)(LOGITS, LABELS), plain * counted)
    assert counted < 0.9


def test_a_samplers_weights_leave_the_perceptual_term_alone():
    weight = torch.rand(2, 40, 48)
    plain = gpl_fast.SegmentationLoss(3, ce_weight=0)(LOGITS, LABELS)
    torch.testing.assert_close(SegmentationLoss(3, ce_weight=0)(LOGITS, LABELS, weight), plain)


def test_the_head_says_which_label_is_ignored():
    labels = torch.where(LABELS == 255, 7, LABELS)
    loss = SegmentationLoss(3)
    assert torch.equal(loss(LOGITS, labels, ignore_index=7), loss(LOGITS, LABELS, ignore_index=255))


def test_the_registry_takes_the_dotted_name():
    built = MODELS.build({"type": TYPE, "num_classes": 3, "net": [1, 1], "loss_name": "loss_p"})
    assert isinstance(built, SegmentationLoss)
    assert built.loss_name == "loss_p"
    with pytest.raises(TypeError, match="netz"):
        SegmentationLoss(3, netz="1,1")


def test_a_reduction_that_the_loss_has_not():
    with pytest.raises(ValueError, match="reduction_override: got 'none'"):
        SegmentationLoss(3)(LOGITS, LABELS, reduction_override="none")


def test_words_that_would_be_lost_are_refused():
    with pytest.raises(TypeError, match="decode head"):
        SegmentationLoss(3, ignore_index=7)
    with pytest.raises(TypeError, match="teacher"):
        SegmentationLoss(3)(LOGITS, LABELS, teacher=LOGITS)


def test_class_weights_may_be_a_tensor_and_many_classes_need_no_word():
    weight = [1.0, 2.0, 0.5]
    listed, given = (SegmentationLoss(3, class_weight=w) for w in (weight, torch.tensor(weight)))
    assert torch.equal(given(LOGITS, LABELS), listed(LOGITS, LABELS))
    logits = torch.randn(1, 300, 32, 32)
    labels = torch.randint(0, 300, (1, 32, 32))
    assert SegmentationLoss(300)(logits, labels, ignore_index=-1) > 0


def test_it_compiles_at_the_first_call():
    compiled = torch.compile(SegmentationLoss(3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(LOGITS, LABELS), SegmentationLoss(3)(LOGITS, LABELS))

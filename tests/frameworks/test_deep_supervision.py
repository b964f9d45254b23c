"""examples/deep_supervision.py, and what docs/frameworks/deep_supervision.md says."""

import pytest
import torch
from recipes import recipe

import gpl_fast


@pytest.fixture(scope="module")
def deep():
    return recipe("deep_supervision")


def test_the_loss_falls(deep):
    losses = deep.main(steps=12)
    assert losses[-1] < 0.9 * losses[0]


def test_encoded_labels_give_the_value_of_labels(deep):
    images, labels = deep.make_batch()
    outputs = deep.Pyramid()(images)
    stored = gpl_fast.SegmentationLoss(deep.CLASSES, gpl_ignore=True)
    target = stored.encode(labels, mask=labels != deep.IGNORED)
    plain = gpl_fast.SegmentationLoss(deep.CLASSES)
    a = deep.supervise(stored, outputs, labels, target)
    assert torch.isclose(a, deep.supervise(plain, outputs, labels, None), rtol=1e-5)


def test_features_encoded_without_the_mask_are_refused(deep):
    _, labels = deep.make_batch()
    loss = gpl_fast.SegmentationLoss(deep.CLASSES, gpl_ignore=True, ignore_index=deep.IGNORED)
    logits = torch.zeros(deep.BATCH, deep.CLASSES, deep.SIZE, deep.SIZE)
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="mask"):
        loss(logits, labels, teacher=loss.encode(teacher))


def test_features_of_another_loss_are_refused(deep):
    _, labels = deep.make_batch()
    features = gpl_fast.SegmentationLoss(deep.CLASSES, seed=1).encode(labels)
    logits = torch.zeros(deep.BATCH, deep.CLASSES, deep.SIZE, deep.SIZE)
    with pytest.raises(ValueError, match="fingerprint"):
        gpl_fast.SegmentationLoss(deep.CLASSES)(logits, labels, teacher=features)

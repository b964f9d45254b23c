"""examples/smp_segmentation.py, and what docs/frameworks/smp.md says."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from recipes import recipe

import gpl_fast

smp_segmentation = recipe("smp_segmentation")


@pytest.mark.parametrize("mode", smp_segmentation.CLASSES)
def test_the_loss_falls(mode):
    values = smp_segmentation.main(mode)
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("mode", smp_segmentation.CLASSES)
def test_the_cross_entropy_is_smps(mode):
    """On the same tensors: its SoftBCEWithLogitsLoss and SoftCrossEntropyLoss."""
    _, labels = smp_segmentation.scenes(mode)
    logits = torch.randn(4, smp_segmentation.CLASSES[mode], 64, 64)
    theirs = (
        smp.losses.SoftCrossEntropyLoss(smooth_factor=0.0)
        if mode == "multiclass"
        else smp.losses.SoftBCEWithLogitsLoss()
    )
    ours = gpl_fast.SegmentationLoss(logits.shape[1], mode=mode, return_parts=True)
    torch.testing.assert_close(ours(logits, labels)["loss_ce"], theirs(logits, labels))


def test_an_activation_of_the_model_would_be_applied_twice():
    """`activation="sigmoid"` makes probabilities of the logits; the prediction is not guessed at,
    and its value is another one."""
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, classes=1, activation=None).eval()
    images, labels = smp_segmentation.scenes("binary")
    logits = model(images).detach()
    loss = gpl_fast.SegmentationLoss(1, mode="binary")
    assert not torch.allclose(loss(logits.sigmoid(), labels), loss(logits, labels), rtol=0.05)


def test_a_binary_model_is_not_one_of_two_classes():
    with pytest.raises(ValueError, match="mode='binary'"):
        gpl_fast.SegmentationLoss(1)

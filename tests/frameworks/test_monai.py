"""examples/monai_segmentation.py, gpl_fast.integrations.monai and .volumes, and what
docs/frameworks/monai.md says."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss
from recipes import recipe

import gpl_fast
from gpl_fast.integrations.monai import SegmentationLoss
from gpl_fast.integrations.volumes import VolumeLoss


@pytest.fixture(scope="module")
def values() -> dict[str, list[float]]:
    return recipe("monai_segmentation").main()


@pytest.mark.parametrize("kind", ["images", "volumes", "deep supervision"])
def test_the_loss_falls(values, kind):
    assert values[kind][-1] < 0.9 * values[kind][0]


LOGITS = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (2, 1, 40, 48), generator=torch.Generator().manual_seed(1))
ONE_HOT = torch.nn.functional.one_hot(LABELS[:, 0], 3).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "labels",
    [LABELS.float(), LABELS.byte(), ONE_HOT.float(), ONE_HOT.bool(), MetaTensor(LABELS.float())],
    ids=["float", "uint8", "one-hot float", "one-hot bool", "MetaTensor"],
)
def test_labels_of_every_form(labels):
    expected = gpl_fast.SegmentationLoss(3)(LOGITS, LABELS[:, 0])
    found = SegmentationLoss(3)(MetaTensor(LOGITS), labels)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_plain_losses_refuse_float_labels_and_say_what_to_do():
    with pytest.raises(TypeError, match=r"labels\.long\(\)"):
        gpl_fast.SegmentationLoss(3)(LOGITS, LABELS.float())


def test_a_pixel_that_is_one_hot_nowhere_is_ignored():
    empty = ONE_HOT.float().clone()
    empty[:, :, :5] = 0
    labels = LABELS[:, 0].clone()
    labels[:, :5] = 255
    assert torch.equal(
        SegmentationLoss(3)(LOGITS, empty), gpl_fast.SegmentationLoss(3)(LOGITS, labels)
    )


def test_labels_resampled_linearly_are_refused():
    with pytest.raises(ValueError, match="nearest"):
        SegmentationLoss(3)(LOGITS, LABELS.float() * 0.5)


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_other_modes_take_labels_as_they_are(mode):
    logits, labels = (LOGITS[:, :1], ONE_HOT[:, :1]) if mode == "binary" else (LOGITS, ONE_HOT)
    words = {"num_classes": logits.shape[1], "mode": mode}
    found = SegmentationLoss(**words)(logits, labels.float())
    assert torch.equal(found, gpl_fast.SegmentationLoss(**words)(logits, labels))


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_a_volume_is_its_slices(dim):
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 20, 24, 28, generator=rng, requires_grad=True)
    labels = torch.randint(0, 3, (2, 20, 24, 28), generator=rng)
    mask = torch.rand(2, 20, 24, 28, generator=rng) > 0.2
    loss = gpl_fast.SegmentationLoss(3, net="1,1")
    found = VolumeLoss(loss, dim)(logits, labels, mask=mask)
    (gradient,) = torch.autograd.grad(found, logits)
    slices = [
        (logits.select(dim, i), labels.select(dim - 1, i), mask.select(dim - 1, i))
        for i in range(logits.shape[dim])
    ]
    counts = sum(loss.count(y, m) for _, y, m in slices)
    expected = sum(loss(x, y, mask=m, normalizer=counts) for x, y, m in slices)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_a_dimension_that_no_slices_go_along():
    with pytest.raises(ValueError, match="dim: got 1"):
        VolumeLoss(gpl_fast.GenericPerceptualLoss(3), dim=1)


def test_deep_supervision_calls_the_loss_in_float32_unless_told_otherwise():
    """It takes ``.float()`` of what came of autocast: `compute_dtype` keeps bfloat16."""
    asked = []

    class Asking(SegmentationLoss):
        def forward(self, logits, labels):
            asked.append((logits.dtype, self.explain(logits, labels.long()).compute_dtype))
            return super().forward(logits, labels)

    half = LOGITS.bfloat16()
    for dtype in (None, torch.bfloat16):
        DeepSupervisionLoss(Asking(3, compute_dtype=dtype))([half], LABELS.float())
    assert [given for given, _ in asked] == [torch.float32] * 2
    assert [str(used).removeprefix("torch.") for _, used in asked] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    "labels", [ONE_HOT * 0.9 + 0.05, ONE_HOT + ONE_HOT.roll(1, 1)], ids=["soft", "two classes"]
)
def test_maps_that_are_not_one_hot_are_refused(labels):
    with pytest.raises(ValueError, match="labels: got"):
        SegmentationLoss(3)(LOGITS, labels)


def test_pixels_of_no_class_need_an_ignored_label():
    with pytest.raises(ValueError, match="-1"):
        SegmentationLoss(3, ignore_index=None)(LOGITS, ONE_HOT * (LABELS > 0))


def test_stacked_outputs_are_no_volume():
    """DynUNet's (N, outputs, C, H, W), beside labels of images."""
    with pytest.raises(ValueError, match="prediction: got shape"):
        SegmentationLoss(3)(LOGITS[:, None].expand(-1, 3, -1, -1, -1), ONE_HOT)


def test_counts_of_the_same_labels():
    loss = SegmentationLoss(3)
    expected = gpl_fast.SegmentationLoss(3).count(LABELS)
    for labels in (LABELS.float(), ONE_HOT, MetaTensor(LABELS.float())):
        assert torch.equal(loss.count(labels), expected)
    assert loss.count(LABELS[:, :, None].float()).tolist() == expected.tolist()

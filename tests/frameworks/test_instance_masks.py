"""examples/instance_masks.py, and what docs/frameworks/instances.md says."""

import pytest
import torch
from recipes import recipe

import gpl_fast


@pytest.fixture(scope="module")
def instances():
    return recipe("instance_masks")


def test_the_loss_falls_at_every_number_of_instances(instances):
    history = instances.main(steps=40)
    assert set(history) == {0, 1, 3, 8, 64}
    for n, values in history.items():
        assert all(v == 0 for v in values) if n == 0 else values[-1] < 0.7 * values[0]


def test_no_instance_is_a_zero_loss_that_goes_backward(instances):
    model = instances.ConditionalMasks()
    image, centres, masks = instances.make_image(0, torch.Generator().manual_seed(0))
    value = gpl_fast.SegmentationLoss(1, mode="binary")(model(image, centres), masks)
    value.backward()
    assert value == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_masks_of_255_count_nothing_without_a_comparison():
    loss = gpl_fast.SegmentationLoss(1, mode="binary")
    logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    png = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    assert loss(logits, png) == 0
    assert loss(logits, png > 0) > 0


def test_sum_over_instances_is_mean_times_their_number():
    logits = torch.randn(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = logits[:, 0] > 1
    mean = gpl_fast.GenericPerceptualLoss(1, activation="sigmoid")(logits, masks.long())
    total = gpl_fast.GenericPerceptualLoss(1, activation="sigmoid", reduction="sum")
    assert torch.isclose(total(logits, masks.long()), 5 * mean)


def test_masks_of_28_pixels_need_a_network_of_fewer_blocks():
    logits, masks = torch.randn(3, 1, 28, 28, requires_grad=True), torch.rand(3, 28, 28) > 0.5
    with pytest.raises(ValueError, match="32"):
        gpl_fast.SegmentationLoss(1, mode="binary")(logits, masks)
    small = gpl_fast.SegmentationLoss(1, mode="binary", net="1,1,1", widths=(64, 128, 256))
    assert small(logits, masks) > 0

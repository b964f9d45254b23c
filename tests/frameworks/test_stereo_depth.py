"""examples/stereo_depth.py on the real stereo pair, and what docs/frameworks/depth.md says."""

import pytest
import torch
from recipes import recipe

import gpl_fast


@pytest.fixture(scope="module")
def depth():
    return recipe("stereo_depth")


def test_the_error_on_the_other_part_of_the_scene_falls(depth):
    for result in depth.main(steps=25).values():
        assert result["after"] < 0.7 * result["before"]


def test_the_scene_has_holes_and_they_are_inf(depth):
    images, truth = depth.scene()
    assert images.shape[-2:] == truth.shape[-2:]
    assert truth.isinf().any()
    assert truth.isfinite().float().mean() > 0.8


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), 0.0])
def test_what_stands_in_a_masked_hole_changes_nothing(depth, hole):
    _, truth = depth.scene()
    truth = truth[..., :96, :96]
    valid = truth.isfinite()
    assert not valid.all()
    loss = gpl_fast.GenericPerceptualLoss(1, activation="none")
    pred = torch.full_like(truth, 3.0).requires_grad_()
    value = loss(pred, truth.where(valid, torch.tensor(hole)), mask=valid)
    value.backward()
    assert value > 0
    assert torch.equal(value, loss(pred, truth, mask=valid))
    assert (pred.grad[~valid] == 0).all()
    assert pred.grad.isfinite().all()
    assert pred.grad.any()


def test_l1_times_the_mask_is_nan_in_holes_and_selection_is_not(depth):
    truth = torch.tensor([[[[1.0, float("inf")]]]])
    pred, valid = torch.zeros_like(truth), truth.isfinite()
    assert ((pred - truth).abs() * valid).sum().isnan()
    assert depth.l1(pred, truth, valid) == 1


def test_without_a_mask_holes_spoil_the_loss(depth):
    _, truth = depth.scene()
    loss = gpl_fast.GenericPerceptualLoss(1, activation="none")
    assert not loss(torch.zeros_like(truth), truth).isfinite()


def test_one_channel_refuses_softmax():
    with pytest.raises(ValueError, match="none"):
        gpl_fast.GenericPerceptualLoss(1)


def test_the_value_grows_with_the_square_of_the_unit(depth):
    loss = gpl_fast.GenericPerceptualLoss(1, activation="none")
    pred, truth = torch.rand(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(loss(10 * pred, 10 * truth), 100 * loss(pred, truth), rtol=1e-4)

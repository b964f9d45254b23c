"""Models of transformers with the loss, as in examples/transformers_*.py: what
docs/frameworks/transformers.md says of them."""

from __future__ import annotations

import math

import pytest
import torch
from recipes import recipe

import gpl_fast

example = recipe("transformers_segformer")


def test_a_model_in_bfloat16_gives_bfloat16_logits_and_a_float32_loss(tmp_path):
    """Without ``bf16=True`` there is no autocast that would make its logits float32."""
    model = example.segformer(8).to(torch.bfloat16)
    sample = example.Squares()[1]
    logits = model(sample["pixel_values"][None].bfloat16()).logits
    value = gpl_fast.SegmentationLoss(example.CLASSES)(logits, sample["labels"][None])
    value.backward()
    assert (logits.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    assert all(
        p.grad.isfinite().all() for p in model.decode_head.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_owns_the_loss_is_saved_and_loaded(tmp_path, dtype):
    torch.manual_seed(0)
    model = example.SegformerWithLoss(example.segformer(8).config).eval()
    model.save_pretrained(tmp_path)
    assert not any("criterion" in name for name in model.state_dict())
    loaded, told = example.SegformerWithLoss.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sample = example.Squares()[1]
    images, labels = sample["pixel_values"][None], sample["labels"][None]
    expected = model(images, labels).loss
    found = loaded.eval()(images.to(dtype), labels).loss
    torch.testing.assert_close(
        found.float(), expected, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_as_image_processors_leave_them(dtype):
    logits, labels = torch.randn(1, 3, 16, 16), example.Squares()[1]["labels"][None]
    loss = gpl_fast.SegmentationLoss(3)
    assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


def test_depth_with_holes():
    example = recipe("transformers_depth")
    values = example.main()
    assert values[-1] < 0.5 * values[0]
    _, depth = example.scenes()
    perceptual = gpl_fast.GenericPerceptualLoss(1, activation="none")
    predicted = torch.rand(depth.shape, requires_grad=True)
    example.depth_loss(predicted, depth, perceptual).backward()
    assert (predicted.grad[depth.isnan()] == 0).all()
    assert predicted.grad[depth.isfinite()].abs().min() > 0


def test_masks_whose_number_changes_and_may_be_0():
    values = recipe("transformers_mask2former").main()
    assert values[0] == 0
    assert all(map(math.isfinite, values))
    assert values[-1] < values[1]

"""Instance masks as Mask2Former makes them: queries matched to instances, the loss on the matched
masks; their number changes, and may be 0.

Run: ``python examples/transformers_mask2former.py``; some seconds on a CPU.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import gpl_fast

SIZE = 64


def small_mask2former() -> Mask2FormerForUniversalSegmentation:
    """(N, 3, H, W) to ``masks_queries_logits`` (N, 8, H / 4, W / 4)."""
    backbone = SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone, num_queries=8, hidden_dim=32, mask_feature_size=32,
            feature_size=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
            dim_feedforward=32, encoder_feedforward_dim=32, num_labels=1,
        )
    )  # fmt: skip


def scenes(step: int, images: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, H, W) and the instances' masks of each, bool (n, H, W) with n of 0 to 3."""
    rng = torch.Generator().manual_seed(step)
    masks = []
    for i in range(images):
        each = torch.zeros((step + i) % 4 if step else 0, SIZE, SIZE, dtype=torch.bool)
        for mask in each:
            y, x = torch.randint(0, SIZE - 20, (2,), generator=rng).tolist()
            mask[y : y + 20, x : x + 20] = True
        masks.append(each)
    covered = torch.stack([each.any(0) for each in masks]).float()[:, None]
    return covered + 0.2 * torch.randn(images, 3, SIZE, SIZE, generator=rng), masks


def matched(logits: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The queries that match an instance best, by Dice, and these: both (n, 1, H, W)."""
    logits = F.interpolate(logits, (SIZE, SIZE), mode="bilinear")
    chosen, targets = [], []
    for of_image, given in zip(logits, masks, strict=True):
        with torch.no_grad():
            p, t = of_image.sigmoid().flatten(1), given.flatten(1).to(logits)
            cost = 1 - 2 * (p @ t.T) / (p.sum(1, keepdim=True) + t.sum(1))
        query, instance = linear_sum_assignment(cost.cpu())
        chosen.append(of_image[query])
        targets.append(given[instance])
    return torch.cat(chosen).unsqueeze(1), torch.cat(targets).unsqueeze(1)


def main(steps: int = 12) -> list[float]:
    """Values of all steps; the first has no instance at all."""
    torch.manual_seed(0)
    model = small_mask2former()
    loss = gpl_fast.SegmentationLoss(1, mode="binary")  # beside the model's own, `ce_weight=0`
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    values = []
    for step in range(steps):
        images, masks = scenes(step)
        value = loss(*matched(model(images).masks_queries_logits, masks))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    print(f"no instance: {values[0]}; then {values[1]:.3f} to {values[-1]:.3f}")
    return values


if __name__ == "__main__":
    main()

"""The loss with segmentation-models-pytorch: binary, multiclass and multilabel.

Run: ``python examples/smp_segmentation.py``; some seconds on a CPU.
"""

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

import gpl_fast

CLASSES, SIZE = {"binary": 1, "multiclass": 3, "multilabel": 3}, 64


def scenes(mode: str, images: int = 4) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and labels as smp's own losses take them: (N, 1, H, W) in "binary",
    (N, H, W) in "multiclass", (N, C, H, W) in "multilabel"; squares that may overlap."""
    rng = torch.Generator().manual_seed(1)
    maps = torch.zeros(images, 3, SIZE, SIZE)
    for channels in maps:
        for k, channel in enumerate(channels):
            y, x = torch.randint(0, SIZE - 20, (2,), generator=rng).tolist()
            channel[y : y + 12 + 4 * k, x : x + 12 + 4 * k] = 1
    noisy = maps + 0.3 * torch.randn(maps.shape, generator=rng)
    if mode == "binary":
        return noisy, maps[:, 1:2]
    if mode == "multilabel":
        return noisy, maps
    return noisy, torch.where(maps.any(1), maps.argmax(1), 0)


def main(mode: str, steps: int = 8) -> list[float]:
    """Losses of all steps: ours, which holds the cross-entropy, and smp's Dice beside it."""
    torch.manual_seed(0)
    # No activation: the loss takes logits. Weights would come of encoder_weights="imagenet".
    model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES[mode], activation=None)
    loss = gpl_fast.SegmentationLoss(CLASSES[mode], mode=mode, gpl_weight=0.1)
    dice = smp.losses.DiceLoss(mode)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = scenes(mode)
    values = []
    for _ in range(steps):
        logits = model(images)
        value = loss(logits, labels) + 0.5 * dice(logits, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    print(f"{mode}: {values[0]:.3f} to {values[-1]:.3f} in {steps} steps")
    return values


if __name__ == "__main__":
    for each in CLASSES:
        main(each)

"""The loss with MONAI: float labels (N, 1, H, W), `DiceCELoss` beside it, deep supervision, and
volumes.

Run: ``python examples/monai_segmentation.py``; some seconds on a CPU.
"""

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn

from gpl_fast.integrations.monai import SegmentationLoss

CLASSES = 3


class DiceAndPerceptual(nn.Module):
    """MONAI's Dice and cross-entropy, and the perceptual term alone (``ce_weight=0``)."""

    def __init__(self) -> None:
        super().__init__()
        self.dice_ce = DiceCELoss(to_onehot_y=True, softmax=True)
        self.gpl = SegmentationLoss(CLASSES, ce_weight=0, gpl_weight=0.1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.dice_ce(logits, labels) + self.gpl(logits, labels)


def volumes(*size: int, images: int = 2) -> tuple[Tensor, Tensor]:
    """Noisy images (N, 1, *size) and labels (N, 1, *size), float as MONAI's transforms leave them:
    a ball (1) in a box (2)."""
    rng = torch.Generator().manual_seed(1)
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij"))
    labels = 2.0 * (grid.abs().amax(0) < 0.7)
    labels = torch.where(grid.square().sum(0) < 0.2, 1.0, labels).expand(images, 1, *size)
    return labels + 0.5 * torch.randn(labels.shape, generator=rng), labels.clone()


def train(model: nn.Module, loss: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Values of eight steps."""
    optimizer, values = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(8):
        logits = model(images)
        if logits.dim() == labels.dim() + 1:  # DynUNet stacks its outputs in dimension 1
            logits = list(logits.unbind(1))
        value = loss(logits, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    print(f"{type(model).__name__}, {images.dim() - 2}-D: {values[0]:.3f} to {values[-1]:.3f}")
    return values


def main() -> dict[str, list[float]]:
    """Train small networks on images, on volumes, and with deep supervision."""
    torch.manual_seed(0)
    small = {"in_channels": 1, "out_channels": CLASSES, "channels": (8, 16), "strides": (2,)}
    unet = {"kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "filters": [8, 8, 16, 16]}
    deep = DynUNet(2, 1, CLASSES, upsample_kernel_size=[2, 2, 2], deep_supervision=True,
                   deep_supr_num=2, **unet)  # fmt: skip
    return {
        "images": train(UNet(2, **small), DiceAndPerceptual(), *volumes(64, 64)),
        "volumes": train(UNet(3, **small), DiceAndPerceptual(), *volumes(8, 32, 32)),
        "deep supervision": train(deep, DeepSupervisionLoss(DiceAndPerceptual()), *volumes(64, 64)),
    }


if __name__ == "__main__":
    main()

"""Deep supervision: heads of several sizes, their maps resized, against one encoded target.

The target goes through the loss network once, each head's map once; for data that repeat, the
features come from a file.

Run: ``python examples/deep_supervision.py [--steps 20]``.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

CLASSES, SIZE, BATCH, IGNORED = 5, 64, 4, 255
WEIGHTS = (1.0, 0.5, 0.25)  # of the heads at 1, 1/2 and 1/4 of the size


class Pyramid(nn.Module):
    """Logits at three sizes, the largest first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.heads = nn.ModuleList(nn.Conv2d(16, CLASSES, 1) for _ in WEIGHTS)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = F.relu(block(F.avg_pool2d(x, 2) if i else x))
            outputs.append(head(x))
        return outputs


def make_batch() -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B, S, S): blocks of 16 pixels, and a border without label."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(CLASSES, (BATCH, SIZE // 16, SIZE // 16), generator=generator)
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = torch.rand(CLASSES, 3, generator=generator)[labels].permute(0, 3, 1, 2)
    labels[:, :2] = IGNORED
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def supervise(
    loss: gpl_fast.SegmentationLoss, outputs: list[Tensor], labels: Tensor, target: object
) -> Tensor:
    """The weighted mean of the heads; the loss resizes small logits to the labels' size."""
    terms = [w * loss(x, labels, teacher=target) for w, x in zip(WEIGHTS, outputs, strict=True)]
    return torch.stack(terms).sum() / sum(WEIGHTS)


def main(steps: int = 20) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(0)
    model = Pyramid()
    # gpl_ignore=True: to the loss stored features are a teacher, which would count everywhere.
    loss = gpl_fast.SegmentationLoss(CLASSES, gpl_ignore=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels = make_batch()
    losses = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "target.safetensors"
        loss.encode(labels, mask=labels != IGNORED).save(path)
        for _ in range(steps):
            target = gpl_fast.TargetFeatures.load(path)
            value = supervise(loss, model(images), labels, target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    main(**vars(parser.parse_args()))

"""A minimal training loop with the loss, on discs and squares that are made here.

Run: ``python examples/train_segmentation.py``; some seconds on a CPU.
"""

import torch
from torch import Tensor, nn

import gpl_fast

CLASSES, SIZE, BATCH, STEPS = 3, 64, 4, 100


def make_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images (B, 3, S, S) and labels (B, S, S): 0 background, 1 disc, 2 square."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.long)
    for label in labels:
        (y1, x1), (y2, x2) = torch.randint(12, SIZE - 12, (2, 2), generator=generator).tolist()
        label[(y - y1).square() + (x - x1).square() < 10**2] = 1
        label[y2 - 9 : y2 + 9, x2 - 9 : x2 + 9] = 2
    colours = torch.tensor([[0.2, 0.3, 0.2], [0.6, 0.4, 0.3], [0.4, 0.4, 0.6]])
    images = colours[labels].permute(0, 3, 1, 2)  # (B, 3, S, S)
    return images + 0.3 * torch.randn(images.shape, generator=generator), labels


def main() -> None:
    """Train a small network and print both parts of the loss and the accuracy."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(c_in, c_out, 5, padding=2), nn.BatchNorm2d(c_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, CLASSES, 1))
    loss = gpl_fast.SegmentationLoss(CLASSES, gpl_weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        images, labels = make_batch(generator)
        logits = model(images)
        parts = loss(logits, labels, return_parts=True)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        if step % 20 == 19:
            accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
            shown = "  ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
            print(f"step {step + 1:3}  {shown}  accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()

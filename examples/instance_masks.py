"""Instance masks by conditional convolutions, as in CondInst: 0 to 64 instances in a step.

Each instance brings the weights of its own small head; its mask is one channel, so the batch of the
loss is the number of instances, and 0 is a usual one.

Run: ``python examples/instance_masks.py [--steps 40]``.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

SIZE, CHANNELS, COUNTS = 32, 8, (3, 0, 8, 1, 64)


def make_image(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An image (1, 3, S, S), centres (n, 2) of n squares in pixels, and their masks (n, S, S)."""
    centres = torch.randint(8, SIZE - 8, (n, 2), generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    masks = (grid - centres[:, :, None, None]).abs().amax(dim=1) < 5  # (n, S, S) bool
    image = masks.any(dim=0).float().expand(1, 3, SIZE, SIZE)
    return image + 0.2 * torch.randn(image.shape, generator=generator), centres, masks


class ConditionalMasks(nn.Module):
    """Features of the image; a head of two 1x1 convolutions for each instance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, CHANNELS, 5, padding=2)
        )
        self.shapes = ((CHANNELS, CHANNELS + 2), (CHANNELS,), (1, CHANNELS), (1,))
        self.controller = nn.Linear(CHANNELS, sum(torch.Size(s).numel() for s in self.shapes))

    def forward(self, image: Tensor, centres: Tensor) -> Tensor:
        """Logits (n, 1, S, S)."""
        features, n = self.features(image), len(centres)
        at = features[0, :, centres[:, 0], centres[:, 1]].T  # (n, CHANNELS)
        parts = self.controller(at).split([torch.Size(s).numel() for s in self.shapes], dim=1)
        w1, b1, w2, b2 = (p.reshape(n, *s) for p, s in zip(parts, self.shapes, strict=True))
        line = torch.arange(SIZE)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        offsets = (grid - centres[:, :, None, None]) / 8  # (n, 2, S, S)
        x = torch.cat((features.expand(n, -1, -1, -1), offsets), dim=1).flatten(2)
        x = F.relu(w1 @ x + b1[..., None])
        return (w2 @ x + b2[..., None]).reshape(n, 1, SIZE, SIZE)


def main(steps: int = 40) -> dict[int, list[float]]:
    """Train and return the losses by number of instances."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = ConditionalMasks()
    loss = gpl_fast.SegmentationLoss(1, mode="binary")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history: dict[int, list[float]] = {n: [] for n in COUNTS}
    for step in range(steps):
        n = COUNTS[step % len(COUNTS)]
        image, centres, masks = make_image(n, generator)
        value = loss(model(image, centres), masks)  # 0 and connected to the graph for n = 0
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history[n].append(value.item())
    for n, values in history.items():
        print(f"{n:2} instances: loss {values[0]:.3f} -> {values[-1]:.3f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))

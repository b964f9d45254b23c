"""LPIPS as a metric and as a loss: how far an image is from blurred, noisy and restored ones.

A trunk with the structure of VGG-16 and random weights stands in for the trained one, so nothing is
downloaded. With the package lpips: ``metric = gpl_fast.LPIPS.from_module(lpips.LPIPS(net="vgg"))``.
The photograph comes with scikit-learn. Run: ``python examples/perceptual_metric.py``; some seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

# LPIPS' own, of images in [-1, 1].
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
STEPS = 10


def vgg16_features() -> nn.Sequential:
    """The 13 convolutions of VGG-16, He-initialised."""
    layers: list[nn.Module] = []
    channels = 3
    for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
            channels = width
    return nn.Sequential(*layers)


def photograph() -> Tensor:
    """(1, 3, 64, 96) in [0, 1]."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    return F.interpolate(image, size=(64, 96), mode="bilinear", antialias=True)


def main() -> None:
    """Print distances, restore a noisy image, save the metric and read it again."""
    torch.manual_seed(0)
    net = gpl_fast.LossNet.from_sequential(vgg16_features(), mean=MEAN, std=STD)
    metric = gpl_fast.LPIPS(net, normalize=True)  # images in [0, 1]; every channel counts 1
    image = photograph()
    noisy = (image + 0.1 * torch.randn_like(image)).clamp(0, 1)
    blurred = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4.0, mode="bilinear")
    target = metric.encode(image)  # once; each call runs the network on the other image alone
    for name, other in (("itself", image), ("noisy", noisy), ("blurred", blurred)):
        print(f"{name:9} {metric(other, target).item():.4f}")
    where = metric.distance_map(noisy, image)
    print("map      ", tuple(where.shape), f"from {where.min():.3f} to {where.max():.3f}")

    restored = noisy.clone().requires_grad_()
    optimizer = torch.optim.Adam([restored], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        metric(restored, target).backward()
        optimizer.step()
    print(f"restored  {metric(restored.detach(), target).item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metric.safetensors"
        metric.save(path)
        again = gpl_fast.LPIPS.load(path)
        print(f"the same  {again(noisy, target).item():.4f}")


if __name__ == "__main__":
    main()

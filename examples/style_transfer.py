"""Style transfer by optimising an image (Johnson et al., Section 3.2), with random weights.

A chain of convolutions with the structure of VGG-16's first three blocks and random weights stands
in for a trained network, so nothing is downloaded; ``torchvision.models.vgg16(...).features`` goes
in the same way. The two photographs come with scikit-learn. Run:
``python examples/style_transfer.py --out style_transfer.png``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vgg_features() -> nn.Sequential:
    """Convolutions and pools of VGG-16's first three blocks, He-initialised."""
    layers: list[nn.Module] = []
    channels = 3
    for count, width in ((2, 64), (2, 128), (3, 256)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def photograph(name: str, height: int) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
    size = (height, round(height * image.shape[3] / image.shape[2]))
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def main() -> None:
    """Optimise an image that has the temple's content and the flower's style."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--out", default="style_transfer.png")
    args = parser.parse_args()

    torch.manual_seed(0)
    net = gpl_fast.LossNet.from_sequential(vgg_features(), mean=MEAN, std=STD)
    loss = gpl_fast.PerceptualLoss(
        net,
        feature_layers={"relu2_2": 1.0},
        style_layers={"relu1_2": 2.0, "relu2_2": 2.0, "relu3_3": 2.0},
        tv_weight=1.0,
        return_parts=True,
    )
    content, style = photograph("china.jpg", args.height), photograph("flower.jpg", args.height)
    # Encoded once; the steps run the network on the image alone.
    target, style_target = loss.encode(content), loss.encode(style)
    image = content.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    for step in range(args.steps):
        parts = loss(image, target, style_target=style_target)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}", *(f"{name} {part.item():.4f}" for name, part in parts.items()))
    row = torch.cat([content, style, image.detach()], dim=3)[0]
    Image.fromarray((255 * row.permute(1, 2, 0).numpy()).astype(np.uint8)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()

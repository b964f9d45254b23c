"""Disparity with holes: L1 and the perceptual loss on scikit-image's stereo pair, which is real.

The network sees the left image and the right one; the truth is inf where nothing matched. It learns
on crops of the left part of the scene and is tested on the right part. One scene and one seed are
an example of the call, not a measurement of the loss.

Run: ``python examples/stereo_depth.py [--steps 60]``; needs scikit-image, downloads nothing.
"""

import argparse

import torch
from skimage.data import stereo_motorcycle
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

CROP, BATCH, SPLIT = 64, 4, 224  # columns of the half-size maps before SPLIT are for training


def scene() -> tuple[Tensor, Tensor]:
    """Both images (1, 6, H, W) and the disparity (1, 1, H, W) in tens of pixels, inf in holes."""
    left, right, disparity = (torch.from_numpy(x) for x in stereo_motorcycle())
    images = torch.cat((left, right), dim=2).permute(2, 0, 1)[None].float() / 127.5 - 1
    # Every second pixel of the truth: a mean over pixels would spread its holes.
    return F.avg_pool2d(images, 2), disparity[None, None, ::2, ::2][..., :250, :370] / 10


def crops(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch (B, 6, S, S) and (B, 1, S, S) of the part for training."""
    corners = [
        (
            int(torch.randint(images.shape[2] - CROP, (), generator=generator)),
            int(torch.randint(SPLIT - CROP, (), generator=generator)),
        )
        for _ in range(BATCH)
    ]
    pieces = [(..., slice(y, y + CROP), slice(x, x + CROP)) for y, x in corners]
    return torch.cat([images[p] for p in pieces]), torch.cat([truth[p] for p in pieces])


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for c_in, dilation in ((6, 1), (24, 2), (24, 4), (24, 8)):
        layers += [nn.Conv2d(c_in, 24, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 1, 1))


def l1(pred: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute error where the truth is known; select first: inf * 0 is NaN."""
    return (pred[valid] - truth[valid]).abs().mean()


def train(steps: int, weight: float) -> dict[str, float]:
    """The error of tens of pixels on the test part, before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, (images, truth) = network(), scene()
    loss = gpl_fast.GenericPerceptualLoss(1, activation="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def error() -> float:
        part = truth[..., SPLIT:]
        with torch.no_grad():
            return l1(model(images[..., SPLIT:]), part, part.isfinite()).item()

    before = error()
    for _ in range(steps):
        inputs, target = crops(images, truth, generator)
        valid = target.isfinite()  # (B, 1, S, S)
        pred = model(inputs)
        value = l1(pred, target, valid)
        if weight:
            value = value + weight * loss(pred, target, mask=valid)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return {"before": before, "after": error()}


def main(steps: int = 60) -> dict[str, dict[str, float]]:
    results = {name: train(steps, w) for name, w in (("L1", 0.0), ("L1 + loss", 0.1))}
    for name, r in results.items():
        print(f"{name:10} test error {10 * r['before']:.2f} -> {10 * r['after']:.2f} pixels")
    print("One scene, one seed: an example, not a claim.")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))

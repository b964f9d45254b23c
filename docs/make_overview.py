"""Makes docs/images/overview.png: ``python docs/make_overview.py``.

Two predictions with the same number of wrong pixels and the same confidence everywhere, hence the
same cross-entropy: one misses an object, the other has its errors scattered. Everything shown is
computed: energies of feature differences by block, and the gradient by the logits.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn import functional as F

import gpl_fast

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm

SIZE, CLASSES, MARGIN = 256, 5, 4.0
OUT = Path(__file__).parent / "images" / "overview.png"
GROUND, SKY, HOUSE, DISC, POLE = range(CLASSES)


def scene() -> Tensor:
    """Labels (256, 256): sky, ground, a house, a pole and a disc."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = torch.full((SIZE, SIZE), GROUND)
    labels[:150] = SKY
    labels[80:180, 30:120] = HOUSE
    labels[60:210, 206:214] = POLE
    labels[(y - 170).square() + (x - 160).square() < 30**2] = DISC
    return labels


def predictions(labels: Tensor) -> dict[str, Tensor]:
    """Two label maps with equally many wrong pixels."""
    missing = labels.clone()
    lost = labels == DISC
    missing[lost] = GROUND
    scattered = labels.clone()
    generator = torch.Generator().manual_seed(0)
    where = torch.randperm(labels.numel(), generator=generator)[: int(lost.sum())]
    scattered.view(-1)[where] = (labels.view(-1)[where] + 1) % CLASSES
    return {"one object is missing": missing, "errors are scattered": scattered}


def logits_of(labels: Tensor) -> Tensor:
    """Logits (1, C, H, W): MARGIN at the class that is predicted, 0 elsewhere."""
    return MARGIN * F.one_hot(labels, CLASSES).permute(2, 0, 1).unsqueeze(0).float()


def energies(loss: gpl_fast.GenericPerceptualLoss, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean over channels of (E' - E)^2 at three blocks, each (H_b, W_b)."""
    taps = ("pool1", "pool3", "pool5")
    target = F.one_hot(labels, CLASSES).permute(2, 0, 1).unsqueeze(0).float()
    with torch.no_grad():
        e_pred, e = loss.net.features(x.softmax(dim=1), taps), loss.net.features(target, taps)
    return {tap: (e_pred[tap] - e[tap]).square().mean(dim=1)[0] for tap in taps}


def main() -> None:
    """Compute and draw."""
    labels = scene()
    loss = gpl_fast.GenericPerceptualLoss(CLASSES)
    rows = []
    for name, predicted in predictions(labels).items():
        x = logits_of(predicted).requires_grad_()
        value = loss(x, labels[None])
        (gradient,) = torch.autograd.grad(value, x)
        ce = float(F.cross_entropy(x.detach(), labels[None]))
        maps = energies(loss, x.detach(), labels)
        rows.append(
            (name, predicted, ce, float(value.detach()), maps, gradient.abs().sum(dim=1)[0])
        )

    figure, axes = plt.subplots(2, 6, figsize=(16, 6.2))
    for axis_row, (name, predicted, ce, value, maps, gradient) in zip(axes, rows, strict=True):
        pictures = [("target: labels", labels), (f"prediction: {name}", predicted)]
        for axis, (title, picture) in zip(axis_row, pictures, strict=False):
            axis.imshow(picture, cmap="Set2", vmin=0, vmax=7, interpolation="nearest")
            axis.set_title(title, fontsize=10)
        axis_row[1].set_xlabel(f"cross-entropy {ce:.3f},  perceptual loss {value:.2e}", fontsize=10)
        for axis, (tap, energy) in zip(axis_row[2:], maps.items(), strict=False):
            top = max(float(row[4][tap].max()) for row in rows)
            axis.imshow(energy, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            axis.set_title(f"(E' - E)², {tap}, {energy.shape[0]} x {energy.shape[1]}", fontsize=10)
        top = max(float(row[5].quantile(0.995)) for row in rows)
        axis_row[5].imshow(gradient, cmap="magma", norm=PowerNorm(0.5, 0, top, clip=True))
        axis_row[5].set_title("|dL/dx|, square root shown", fontsize=10)
        for axis in axis_row:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=80)
    for name, _, ce, value, _, _ in rows:
        print(f"{name}: cross-entropy {ce:.4f}, perceptual loss {value:.3e}")


if __name__ == "__main__":
    main()

"""Makes docs/images/overview.png: ``python docs/make_overview.py``.

Two predictions with the same number of wrong pixels and the same confidence everywhere, hence the
same cross-entropy: one misses an object, the other has its errors scattered. Everything shown is
computed, by the reference in float64: energies of feature differences by block, and the gradient
by the logits. The figures that README.md states are printed.
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
    """Logits (1, C, H, W) float64: MARGIN at the class that is predicted, 0 elsewhere."""
    return MARGIN * one_hot(labels)


def one_hot(labels: Tensor) -> Tensor:
    """(H, W) -> (1, C, H, W) float64."""
    return F.one_hot(labels, CLASSES).permute(2, 0, 1).unsqueeze(0).double()


def energies(loss: gpl_fast.GenericPerceptualLoss, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Mean over channels of (E' - E)^2 between two maps at three blocks, each (H_b, W_b)."""
    taps = ("pool1", "pool3", "pool5")
    e_pred, e = loss.net.features(x, taps), loss.net.features(y, taps)
    return {tap: (e_pred[tap] - e[tap]).square().mean(dim=1)[0] for tap in taps}


def gradients(loss: gpl_fast.GenericPerceptualLoss, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the loss and of the cross-entropy, by the logits: (C, H, W) each."""
    x = x.clone().requires_grad_()
    values = (loss(x, labels[None]), F.cross_entropy(x, labels[None]))
    return [torch.autograd.grad(value, x)[0][0] for value in values]


def print_figures(labels: Tensor) -> None:
    """Both losses by pool and by network, and how far wrong pixels reach."""
    loss = gpl_fast.GenericPerceptualLoss(CLASSES)
    right = logits_of(labels)
    for name, predicted in predictions(labels).items():
        x, wrong = logits_of(predicted), predicted != labels
        ce = float(F.cross_entropy(x, labels[None]))
        print(f"{name}: {int(wrong.sum())} wrong pixels, cross-entropy {ce:.4f}")
        for pool in ("max", "avg"):
            nets = [gpl_fast.GenericPerceptualLoss(CLASSES, pool=pool, seed=s) for s in range(5)]
            values = " ".join(f"{float(net(x, labels[None])):.4f}" for net in nets)
            print(f"  perceptual loss, {pool} pools, seeds 0 to 4: {values}")
        print("  beside a prediction that is right everywhere,")
        for tap, energy in energies(loss, x.softmax(dim=1), right.softmax(dim=1)).items():
            share = float((energy > 0).double().mean())
            print(f"    features differ at {share:.0%} of the positions of {tap}")
        changes = zip(gradients(loss, x, labels), gradients(loss, right, labels), strict=True)
        for term, (ours, other) in zip(("perceptual loss", "cross-entropy"), changes, strict=True):
            change = (ours - other).abs().sum(dim=0)
            share = float(change[~wrong].sum() / change.sum())
            print(f"    {share:.0%} of the change of the {term}'s gradient is at right pixels")


def main() -> None:
    """Compute and draw."""
    labels = scene()
    print_figures(labels)
    loss = gpl_fast.GenericPerceptualLoss(CLASSES)
    rows = []
    for name, predicted in predictions(labels).items():
        x = logits_of(predicted)
        value, ce = float(loss(x, labels[None])), float(F.cross_entropy(x, labels[None]))
        maps = energies(loss, x.softmax(dim=1), one_hot(labels))
        gradient = gradients(loss, x, labels)[0].abs().sum(dim=0)
        rows.append((name, predicted, ce, value, maps, gradient))

    figure, axes = plt.subplots(2, 6, figsize=(16, 6.2))
    for axis_row, (name, predicted, ce, value, maps, gradient) in zip(axes, rows, strict=True):
        pictures = [("target: labels", labels), (f"prediction: {name}", predicted)]
        for axis, (title, picture) in zip(axis_row, pictures, strict=False):
            axis.imshow(picture, cmap="Set2", vmin=0, vmax=7, interpolation="nearest")
            axis.set_title(title, fontsize=10)
        axis_row[1].set_xlabel(f"cross-entropy {ce:.3f},  perceptual loss {value:.4f}", fontsize=10)
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


if __name__ == "__main__":
    main()

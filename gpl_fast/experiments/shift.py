"""One photograph against itself, moved by 0 to 8 pixels: which distances forgive it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpl_fast.experiments.frame import Experiment, Observe, Outcome, Settings, Table
from gpl_fast.loss import GenericPerceptualLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, NET = 128, "1,1,1,1,1"
LEVELS = NET.count(",") + 1


def photograph(name: str) -> Tensor:
    """(1, 3, H, W), channels of mean 0 and standard deviation 1."""
    from skimage import data

    pixels = torch.from_numpy(np.array(getattr(data, name)())).float()
    image = pixels.permute(2, 0, 1)[None]
    return (image - image.mean((2, 3), True)) / image.std((2, 3), keepdim=True)


def crop(image: Tensor, shift: int) -> Tensor:
    """A window of SIZE x SIZE, `shift` pixels to the right of the middle."""
    top, left = ((n - SIZE) // 2 for n in image.shape[2:])
    return image[:, :, top : top + SIZE, left + shift : left + shift + SIZE].contiguous()


def pixel_distances(a: Tensor, b: Tensor) -> dict[str, float]:
    """Of the pixels themselves."""
    return {"pixel L1": float((a - b).abs().mean()), "pixel L2": float((a - b).square().mean())}


def perceptual_losses(seed: int) -> dict[str, GenericPerceptualLoss]:
    """One a level, of the same random network."""
    one_hot = torch.eye(LEVELS).tolist()
    return {
        f"random, level {i + 1}": GenericPerceptualLoss(
            3, NET, activation="none", seed=seed, level_weights=weights
        )
        for i, weights in enumerate(one_hot)
    }


@torch.no_grad()
def distances(image: Tensor, others: Sequence[Tensor], seed: int) -> dict[str, list[float]]:
    """From `image` to each of the others."""
    found: dict[str, list[float]] = {name: [] for name in pixel_distances(image, image)}
    for other in others:
        for name, value in pixel_distances(image, other).items():
            found[name].append(value)
    for name, loss in perceptual_losses(seed).items():
        target = loss.encode(image)
        found[name] = [float(loss(other, target)) for other in others]
    return found


def picture(curves: dict[str, list[float]]) -> Figure:
    """A line a distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(curve, marker="o", ms=3, ls="--" if name.startswith("pixel") else "-", label=name)
    axis.set(xlabel="moved by (pixels)", ylabel="distance / to another photograph")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def run(settings: Settings, observe: Observe) -> Outcome:
    """Every shift, relative to the distance to another photograph; the mean over the networks."""
    astronaut = photograph("astronaut").to(settings.device)
    most = (astronaut.shape[3] - SIZE) // 2
    if settings.steps > most:
        raise ValueError(f"--steps: got {settings.steps}, expected at most {most}, the margin")
    shifts = range(settings.steps + 1)
    others = [crop(astronaut, s) for s in shifts]
    others.append(crop(photograph("coffee").to(settings.device), 0))
    on_step, found = observe("networks", len(settings.seeds)), []
    for seed in settings.seeds:
        found.append(distances(others[0], others, seed))
        on_step(math.nan, None)
    curves = {
        name: [fmean(one[name][s] / one[name][-1] for one in found) for s in shifts]
        for name in found[0]
    }
    rows = [[name, *(f"{value:.2f}" for value in curve)] for name, curve in curves.items()]
    last = f"level {LEVELS}"
    ends = {n: curves[n][-1] for n in ("pixel L2", f"random, {last}")}
    return Outcome(
        f"Moved by {settings.steps} pixels, the photograph is {ends['pixel L2']:.0%} as far from "
        f"itself as from another one by pixel L2, {ends[f'random, {last}']:.0%} at the last level "
        "of the random network.",
        [
            f"The middle {SIZE} x {SIZE} pixels of scikit-image's astronaut against the same "
            "window moved to the right, what enters included; each distance divided by that to "
            "the middle of its coffee.",
            f"Network {NET}, random, weights of seeds {settings.seeds}; the mean over them.",
        ],
        [Table("Distance / distance to another photograph", ["moved by", *map(str, shifts)], rows)],
        {"curves": curves, "seeds": found},
        picture(curves),
    )


EXPERIMENT = Experiment(
    title="A photograph moved against itself",
    question="Which distances forgive a shift of a few pixels, as eyes do?",
    seconds=20,
    run=run,
    seeds=(0, 1, 2, 3, 4),
    steps=8,
    quick_steps=8,
    unit="pixels",
)

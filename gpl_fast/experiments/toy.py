"""The toy experiment of the paper's supplement: which distance sees a shape that two images share?

(a) and (b) are independent Gaussian noise, 512 x 512, with the same points inside a centred disc
set to 0. (c) is (a), cut into patches that are shuffled. A distance sees the shape when (b) is
nearer to (a) than (c) is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gpl_fast.experiments.frame import Experiment, Observe, Outcome, Settings, Table
from gpl_fast.loss import GenericPerceptualLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, RADIUS, POINTS, PATCH = 512, 40, 10_000, 16
# How the text can be read; the first is what the others differ from.
READINGS = {
    "points": "10 000 points, drawn with replacement; patches of 16 x 16",
    "disc": "the whole disc is 0; patches of 16 x 16",
    "grid": "points as above; a grid of 16 x 16 patches, each of 32 x 32",
    "rows": "points as above; whole rows of patches of 16 x 16 are shuffled",
}
NETS = {"points": ("1,1,1,1,1", "vgg19")}  # of the other readings the first alone
# The supplement's counts of 50; it does not say which random network it used.
PAPER = {"pixel L2": "0 of 50", "random": "37 of 50"}


def make_images(
    generator: torch.Generator, reading: str = "points"
) -> tuple[Tensor, Tensor, Tensor]:
    """(a), (b) and (c), each (1, 1, 512, 512).

    The disc has 5025 pixels, fewer than the 10 000 points, so points are drawn with replacement:
    about 86 % of the disc becomes 0.
    """
    a = torch.randn(1, 1, SIZE, SIZE, generator=generator)
    b = torch.randn(1, 1, SIZE, SIZE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((y - SIZE // 2).square() + (x - SIZE // 2).square() <= RADIUS**2).nonzero()
    points = disc[torch.randint(len(disc), (POINTS,), generator=generator)]
    points = disc if reading == "disc" else points
    for image in (a, b):
        image[:, :, points[:, 0], points[:, 1]] = 0
    side = SIZE // 16 if reading == "grid" else PATCH
    return a, b, shuffle_patches(a, generator, side, SIZE if reading == "rows" else side)


def shuffle_patches(
    image: Tensor, generator: torch.Generator, high: int = PATCH, wide: int = PATCH
) -> Tensor:
    """`image` (1, 1, H, W) with its patches of high x wide in random order."""
    rows, columns = image.shape[2] // high, image.shape[3] // wide
    patches = image.view(rows, high, columns, wide).transpose(1, 2).reshape(-1, high, wide)
    patches = patches[torch.randperm(len(patches), generator=generator)]
    return patches.view(rows, columns, high, wide).transpose(1, 2).reshape(image.shape)


def squared(a: Tensor, b: Tensor) -> float:
    """Mean squared difference: the SSD of template matching, over the number of pixels."""
    return float((a - b).square().mean())


def zero_mean(a: Tensor, b: Tensor) -> float:
    """The same without each image's mean."""
    return squared(a - a.mean(), b - b.mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """1 - the normalised cross-correlation of the images without their means."""
    return 1 - float(F.cosine_similarity((a - a.mean()).flatten(), (b - b.mean()).flatten(), 0))


TEMPLATES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "pixel L2": squared, "zero-mean L2": zero_mean, "1 - correlation": correlation,
}  # fmt: skip


@torch.no_grad()
def perceptual(net: str, a: Tensor, b: Tensor, c: Tensor, seed: int) -> tuple[float, float]:
    """The loss between (a, b) and (a, c), with the network's weights drawn from `seed`."""
    loss = GenericPerceptualLoss(1, activation="none", net=net, seed=seed)
    features = loss.encode(a)
    return float(loss(b, features)), float(loss(c, features))


def trial(reading: str, images: tuple[Tensor, Tensor, Tensor], seed: int) -> dict[str, float]:
    """d(a, b) / d(a, c) by distance."""
    a, b, c = images
    ratios = {name: measure(a, b) / measure(a, c) for name, measure in TEMPLATES.items()}
    for net in NETS.get(reading, NETS["points"][:1]):
        to_b, to_c = perceptual(net, a, b, c, seed)
        ratios[f"random {net}"] = to_b / to_c
    return ratios


def picture(images: tuple[Tensor, Tensor, Tensor]) -> Figure:
    """(a), (b) and (c) side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.3), layout="constrained")
    titles = ("(a)", "(b): other noise, same disc", "(c): (a) in shuffled patches")
    for axis, image, title in zip(figure.subplots(1, 3), images, titles, strict=True):
        axis.imshow(image[0, 0].cpu().numpy(), cmap="gray", vmin=-3, vmax=3)
        axis.set_title(title)
        axis.axis("off")
    return figure


def run(settings: Settings, observe: Observe) -> Outcome:
    """Every reading, with new images and new weights in each trial."""
    tables, data, shown = [], {}, None
    total = settings.steps * len(settings.seeds)
    for reading, meaning in READINGS.items():
        on_step, found = observe(reading, total), []
        for seed in settings.seeds:
            generator = torch.Generator().manual_seed(seed)
            for index in range(settings.steps):
                a, b, c = (x.to(settings.device) for x in make_images(generator, reading))
                shown = shown or (a, b, c)
                found.append(trial(reading, (a, b, c), 1000 * seed + index))
                on_step(math.nan, None)
        ratios = {name: [one[name] for one in found] for name in found[0]}
        rows = []
        for name, values in ratios.items():
            count = f"{sum(ratio < 1 for ratio in values)} of {total}"
            paper = PAPER.get(name.split()[0] if name.startswith("random") else name, "")
            rows.append([name, count, f"{min(values):.4f} to {max(values):.4f}", paper])
        header = ["distance", "(b) is nearer to (a)", "d(a,b) / d(a,c)", "supplement"]
        tables.append(Table(f"{reading}: {meaning}", header, rows))
        data[reading] = ratios
    seen = sum(x < 1 for r in data.values() for x in r["random 1,1,1,1,1"])
    by_pixels = sum(x < 1 for r in data.values() for x in r["pixel L2"])
    assert shown is not None
    return Outcome(
        f"The random network 1,1,1,1,1 sees the disc in {seen} of {total * len(data)} trials, "
        f"pixel L2 in {by_pixels} (chance: half).",
        [
            f"{total} trials a reading, images of seeds {settings.seeds}; each trial has new "
            "images and new weights.",
            "d(a,b) / d(a,c): least to greatest. The supplement does not name its network.",
        ],
        tables,
        {"ratios": data},
        picture(shown),
    )


EXPERIMENT = Experiment(
    title="A disc under noise: the toy experiment of the supplement",
    question="Which distance sees a shape that two noisy images share?",
    seconds=900,
    run=run,
    steps=50,
    quick_steps=2,
    unit="trials",
)

"""The toy experiment of the paper's supplement: which distance sees a shape that two images share?

(a) and (b) are independent Gaussian noise, 512 x 512, with the same points inside a centred disc
set to 0. (c) is (a), cut into patches of 16 x 16 that are shuffled. A distance sees the shape when
(b) is nearer to (a) than (c) is. Run: ``python examples/toy_structure.py --out toy_out``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import gpl_fast

SIZE, RADIUS, POINTS, PATCH = 512, 40, 10_000, 16
# The supplement's counts of 50; it does not say which random network it used.
PAPER = {"pixel L2": "0 of 50", "random network": "37 of 50"}


def make_images(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(a), (b) and (c), each (1, 1, 512, 512).

    The disc has 5025 pixels, fewer than the 10 000 points, so points are drawn with replacement:
    about 86 % of the disc becomes 0.
    """
    a = torch.randn(1, 1, SIZE, SIZE, generator=generator)
    b = torch.randn(1, 1, SIZE, SIZE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((y - SIZE // 2).square() + (x - SIZE // 2).square() <= RADIUS**2).nonzero()
    points = disc[torch.randint(len(disc), (POINTS,), generator=generator)]
    for image in (a, b):
        image[:, :, points[:, 0], points[:, 1]] = 0
    return a, b, shuffle_patches(a, generator)


def shuffle_patches(image: Tensor, generator: torch.Generator) -> Tensor:
    """`image` (1, 1, H, W) with its patches in random order."""
    rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
    patches = image.view(rows, PATCH, columns, PATCH).transpose(1, 2).reshape(-1, PATCH, PATCH)
    patches = patches[torch.randperm(len(patches), generator=generator)]
    grid = patches.view(rows, columns, PATCH, PATCH).transpose(1, 2)
    return grid.reshape(image.shape)


def pixel_distances(a: Tensor, b: Tensor, c: Tensor, seed: int) -> tuple[float, float]:
    """Mean squared difference of (a, b) and (a, c)."""
    return float((a - b).square().mean()), float((a - c).square().mean())


def perceptual_distances(
    net: str, a: Tensor, b: Tensor, c: Tensor, seed: int
) -> tuple[float, float]:
    """The loss between (a, b) and (a, c), with the network's weights drawn from `seed`."""
    loss = gpl_fast.GenericPerceptualLoss(1, activation="none", net=net, seed=seed)
    with torch.no_grad():
        features = loss.encode(a)
        return float(loss(b, features)), float(loss(c, features))


def save_picture(images: Sequence[Tensor], path: Path) -> None:
    """(a), (b) and (c) side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3))
    titles = ("(a)", "(b): other noise, same disc", "(c): (a) in shuffled patches")
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image[0, 0], cmap="gray", vmin=-3, vmax=3)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run the trials, print the table, write it and the picture to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--nets", nargs="+", default=["1,1,1,1,1", "vgg19"])
    parser.add_argument("--seed", type=int, default=0, help="of the images; nets: its trial's")
    parser.add_argument("--out", type=Path, default=Path("toy_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    measures: dict[str, Callable[..., tuple[float, float]]] = {"pixel L2": pixel_distances}
    for net in args.nets:
        measures[f"random {net}"] = lambda *x, net=net: perceptual_distances(net, *x)
    ratios: dict[str, list[float]] = {name: [] for name in measures}
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    ) as bar:
        task = bar.add_task("trials", total=args.trials)
        for trial in range(args.trials):
            images = make_images(generator)
            if trial == 0:
                save_picture(images, args.out / "toy_structure.png")
            for name, measure in measures.items():
                to_b, to_c = measure(*images, trial)
                ratios[name].append(to_b / to_c)
            bar.advance(task)

    lines = ["| distance | (b) is nearer to (a) | d(a,b) / d(a,c), least to greatest | paper |"]
    lines.append("|---|---|---|---|")
    for name, values in ratios.items():
        count = sum(ratio < 1 for ratio in values)
        paper = PAPER[name if name in PAPER else "random network"]
        span = f"{min(values):.4f} to {max(values):.4f}"
        lines.append(f"| {name} | {count} of {args.trials} | {span} | {paper} |")
    text = "\n".join(lines)
    (args.out / "toy_structure.md").write_text(text + "\n")
    print(text)
    print(f"{args.trials} trials in {time.perf_counter() - start:.0f} s; written to {args.out}/")


if __name__ == "__main__":
    main()

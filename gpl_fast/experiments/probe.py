"""The supplement's mapping ability: how well a linear layer reads digits off a frozen random
VGG19, by its down-sampling."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from gpl_fast.experiments.frame import Experiment, Observe, Outcome, Settings, Table, with_interval
from gpl_fast.net.lossnet import LossNet

BLOCKS, POOLS, SIZE, CLASSES = (2, 2, 4, 4, 4), ("max", "avg", "stride"), 32, 10
TRAIN, QUICK_TRAIN, QUICK_TEST = 1347, 300, 150  # scans, in order of their writers
LR, DECAY = 0.01, 1e-3


def digits(quick: bool) -> tuple[Tensor, Tensor, int]:
    """Scans (N, 1, 32, 32), their classes, and how many come first, for training."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    labels = torch.from_numpy(bunch.target).long()
    chosen = torch.arange(len(labels))
    if quick:
        chosen = torch.cat([chosen[:QUICK_TRAIN], chosen[-QUICK_TEST:]])
    large = F.interpolate(images[chosen], size=(SIZE, SIZE), mode="bilinear")
    return large, labels[chosen], QUICK_TRAIN if quick else TRAIN


@torch.no_grad()
def embeddings(images: Tensor, pool: str, seed: int) -> Tensor:
    """The last layer's output (N, 512): one pixel is left of 32 x 32."""
    net = LossNet.vgg(1, BLOCKS, pool=pool, seed=seed)
    last = net.layer_names[-1]
    parts = [net.features(batch, [last])[last].flatten(1) for batch in torch.split(images, 100)]
    return torch.cat(parts)


def accuracy(features: Tensor, labels: Tensor, train: int, steps: int) -> float:
    """Of a linear layer on standardised features: share of the test's digits that are right."""
    mean, std = features[:train].mean(0), features[:train].std(0)
    features = (features - mean) / std.clamp(min=1e-6 * float(std.max()))
    weight = torch.zeros(CLASSES, features.shape[1] + 1, device=features.device)
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=LR, weight_decay=DECAY)

    def logits(x: Tensor) -> Tensor:
        return x @ weight[:, :-1].T + weight[:, -1]

    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(features[:train]), labels[:train])
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
    right = logits(features[train:]).argmax(1) == labels[train:]
    return float(right.float().mean())


def run(settings: Settings, observe: Observe) -> Outcome:
    """Each way to down-sample, over the networks; the pixels themselves beside them."""
    images, labels, train = digits(settings.quick)
    images, labels = images.to(settings.device), labels.to(settings.device)
    pixels = F.interpolate(images, size=(8, 8), mode="area").flatten(1)
    scores = {"pixels": [accuracy(pixels, labels, train, settings.steps)]}
    for pool in POOLS:
        on_step, scores[pool] = observe(pool, len(settings.seeds)), []
        for seed in settings.seeds:
            found = embeddings(images, pool, seed)
            scores[pool].append(accuracy(found, labels, train, settings.steps))
            on_step(math.nan, scores[pool][-1])
    rows = [[name, with_interval(values)] for name, values in scores.items()]
    means = {pool: fmean(scores[pool]) for pool in POOLS}
    best = max(means, key=lambda pool: means[pool])
    spread = f"over {len(settings.seeds)} networks"
    return Outcome(
        f"Best on average {spread}: {best}, {means[best]:.1%} of the digits right (chance: 10 %); "
        "the intervals of the table say how sure that is.",
        [
            f"scikit-learn's {len(labels)} scans of 8 x 8, enlarged to {SIZE} x {SIZE}: the first "
            f"{train} for training, the others, of other writers, for the test.",
            f"VGG19 (blocks {BLOCKS}), random and frozen, weights of seeds {settings.seeds}; "
            f"its last output, standardised; a linear layer, {settings.steps} steps of Adam "
            f"(learning rate {LR}, weight decay {DECAY}) on all scans. Nothing was selected.",
            "Intervals: 95 %, Student's t over networks. 'pixels': the same layer without one.",
        ],
        [Table("Share of unseen digits that are right", ["features", "accuracy"], rows)],
        {"accuracy": scores, "chance": 1 / CLASSES},
    )


EXPERIMENT = Experiment(
    title="What a linear layer reads off a random network",
    question="Does a random VGG19 keep what distinguishes digits, and which down-sampling best?",
    seconds=300,
    run=run,
    seeds=(0, 1, 2, 3, 4),
    steps=300,
    quick_steps=100,
)

"""The paper's Section 3.2: what a layer's weights do to the variance of what passes through it."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpl_fast.experiments.frame import Experiment, Observe, Outcome, Settings, Table
from gpl_fast.net.initialisation import Init, draw_weight, own_generator

CHANNELS, WIDTH, KERNEL, SAMPLES = 21, 256, 3, 4
INITS: tuple[Init, ...] = (
    "he", "xavier_normal", ("normal", 1.0), ("normal", 0.1), ("normal", 0.01),
    ("uniform", 1.0), ("uniform", 0.1), ("uniform", 0.01),
)  # fmt: skip
NAMES = ("he (ours)", "Xavier", "N(0, 1²)", "N(0, 0.1²)", "N(0, 0.01²)", "U ± 1", "U ± 0.1",
         "U ± 0.01")  # fmt: skip
# mIoU on Cityscapes of the paper's comparison of initialisations.
PAPER = ("71.3", "69.8", "diverges", "45.6", "68.5", "diverges", "51.7", "69.2")


def weight_variance(init: Init, fan_in: int, fan_out: int) -> float:
    """Var[w] of a layer."""
    if init == "he":
        return 2 / fan_in
    if init == "xavier_normal":
        return 2 / (fan_in + fan_out)
    assert not isinstance(init, str)
    kind, number = init
    return float(number) ** 2 / (3 if kind == "uniform" else 1)


def law(init: Init, layers: int) -> float:
    """The product of n_l Var[w_l] / 2 over the layers behind the first."""
    fan = KERNEL**2 * WIDTH
    return float((fan * weight_variance(init, fan, fan) / 2) ** (layers - 1))


def embeddings(maps: Tensor, init: Init, layers: int, seed: int) -> tuple[Tensor, Tensor]:
    """Responses of the first and the last convolution, in float64; no border is padded."""
    generator, x, first = own_generator(seed), maps, maps
    for index in range(layers):
        shape = (WIDTH, x.shape[1], KERNEL, KERNEL)
        weight = draw_weight(shape, init, generator).to(x.device, x.dtype)
        x = F.conv2d(x.relu() if index else x, weight)
        first = x if index == 0 else first
    return first, x


def measure(init: Init, layers: int, seed: int, device: str = "cpu") -> dict[str, float]:
    """Var[e_L], Var[e_1] and the same of the discrepancy of two maps of probabilities."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * layers + 1  # one pixel is left
    shape = (2 * SAMPLES, CHANNELS, size, size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    first, last = embeddings((3 * noise).softmax(1).to(device), init, layers, seed)

    def variance(x: Tensor) -> float:  # the mean is 0 over the weights
        return float(x.square().mean())

    discrepancy = variance(last[:SAMPLES] - last[SAMPLES:])
    sum_of_first = variance(first[:SAMPLES]) + variance(first[SAMPLES:])
    return {
        "gain": variance(last) / variance(first),
        "of_law": variance(last) / variance(first) / law(init, layers),
        "of_bound": discrepancy / (sum_of_first * law(init, layers)),
    }


def run(settings: Settings, observe: Observe) -> Outcome:
    """Each initialisation, over the seeds."""
    layers = settings.steps
    rows: list[list[str]] = []
    data: dict[str, dict[str, Any]] = {}
    for init, name, paper in zip(INITS, NAMES, PAPER, strict=True):
        on_step = observe(name, len(settings.seeds))
        found = []
        for seed in settings.seeds:
            found.append(measure(init, layers, seed, settings.device))
            on_step(math.nan, found[-1]["of_law"])
        gain = fmean([one["gain"] for one in found])
        of_law, of_bound = (fmean(one[k] for one in found) for k in ("of_law", "of_bound"))
        per_layer = law(init, 2)
        rows.append([name, f"{per_layer:.3g}", f"{law(init, layers):.2e}", f"{gain:.2e}",
                     f"{of_law:.2f}", f"{of_bound:.3f}", paper])  # fmt: skip
        data[name] = {"law": law(init, layers), "seeds": found, "of_law": of_law,
                      "of_bound": of_bound}  # fmt: skip
    header = ["initialisation", "factor of a layer", "law", "measured", "measured / law",
              "discrepancy / bound", "paper's mIoU"]  # fmt: skip
    worst = max(abs(one["of_law"] - 1) for one in data.values())
    return Outcome(
        f"The law holds within {worst:.0%}; He's initialisation alone keeps the scale, and no "
        "discrepancy is above its bound."
        if worst < 0.2 and all(one["of_bound"] <= 1 for one in data.values())
        else f"The law is missed by {worst:.0%} or the bound is crossed; see the table.",
        [
            f"{layers} convolutions of {KERNEL} x {KERNEL} with {WIDTH} channels and a ReLU "
            "between them, without pools and without padding, as in the paper's derivation.",
            f"{2 * SAMPLES} maps of probabilities of {CHANNELS} classes (softmax of noise of "
            "standard deviation 3); float64; measured is Var[e_L] / Var[e_1], the mean over "
            f"{len(settings.seeds)} draws of the weights, seeds {settings.seeds}. "
            "The discrepancy is between maps that are independent.",
            "The paper's mIoU is of Cityscapes, with its networks; it was not measured here.",
        ],
        [Table("Variance behind the last layer, relative to the first", header, rows)],
        {"initialisations": data},
    )


EXPERIMENT = Experiment(
    title="The variance law of the initialisation",
    question="Does the scale of the embeddings follow the law of the paper's Section 3.2?",
    seconds=120,
    run=run,
    seeds=tuple(range(32)),  # the law is of the mean over weights
    steps=8,
    quick_seeds=16,
    quick_steps=4,
    unit="layers",
)

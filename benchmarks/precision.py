"""Error of half precision against float64, plain form and difference form: a Markdown table.

The difference form with convolutions in the dtype, as on a CPU that multiplies its matrices, in the
mixed arithmetic of one that multiplies pairs of bfloat16, and in float32, as on others.

One map of 64 x 64, unit Gaussian logits whose right class is raised by a margin, in square regions
of one class; the teacher is the same logits with noise of half a unit: docs/numerics.md.

    python benchmarks/precision.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from gpl_fast import GenericPerceptualLoss, LossNet
from gpl_fast.fast import policy
from gpl_fast.tools import measure

SIZE = 64
# classes, side of a region, margins
CASES = [(19, 8, (0, 4, 8)), (150, 8, (0, 6, 12)), (847, 8, (0, 8, 14)), (1203, 8, (0, 14))]

FORMS = ("plain", "own", "mixed", "float32")  # the reference, and by `Policy.arithmetic`


@dataclass(frozen=True)
class Cpu(policy.Policy):
    """One of this arithmetic."""

    form: str = "own"

    def arithmetic(self, dtype: torch.dtype) -> str:
        return self.form


def peaked(channels: int, region: int, margin: float) -> tuple[Tensor, Tensor]:
    """Logits (1, C, 64, 64) and labels (1, 64, 64)."""
    coarse = torch.randint(channels, (1, SIZE // region, SIZE // region))
    labels = coarse.repeat_interleave(region, dim=1).repeat_interleave(region, dim=2)
    raised = torch.full((1, 1, SIZE, SIZE), float(margin))
    return torch.randn(1, channels, SIZE, SIZE).scatter_add(1, labels.unsqueeze(1), raised), labels


def row(channels: int, region: int, margin: float, kind: str, dtype: torch.dtype) -> list[str]:
    logits, labels = peaked(channels, region, margin)
    # float32, as float16 cannot hold the gradient of this loss; values that every dtype here holds.
    logits = logits.to(dtype).float()
    teacher = (logits + 0.5 * torch.randn_like(logits)).to(dtype).float()
    target = labels if kind == "labels" else teacher
    net = LossNet.vgg(channels)
    exact = GenericPerceptualLoss(channels, net, backend="reference")
    truth = measure.step(exact, logits.double(), labels if kind == "labels" else teacher.double())
    cells = [f"{channels}", f"{margin}", kind, str(dtype).removeprefix("torch.")]
    values, cosines = [], []
    for arithmetic in FORMS:
        if arithmetic == "mixed" and dtype != torch.bfloat16:
            values.append("")
            cosines.append("")
            continue
        backend = "reference" if arithmetic == "plain" else "fast"
        loss = GenericPerceptualLoss(channels, net, backend=backend, compute_dtype=dtype)
        with policy.injected(Cpu(form=arithmetic)):
            error, cosine = measure.deviation(measure.step(loss, logits, target), truth)
        values.append(f"{error:.2%}")
        cosines.append(f"{cosine:.3f}")
    return [*cells, *values, *cosines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    torch.manual_seed(parser.parse_args().seed)
    head = ["C", "margin", "target", "dtype"]
    head += [f"{what}, {form}" for what in ("value", "cosine") for form in FORMS]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for channels, region, margins in CASES:
        for margin in margins:
            for kind in ("labels", "teacher"):
                cells = row(channels, region, margin, kind, torch.bfloat16)
                print("| " + " | ".join(cells) + " |", flush=True)
    for channels, margin in ((19, 8), (150, 12)):
        cells = row(channels, 8, margin, "labels", torch.float16)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Which share of the classes matters to the first layer, on trained logits: Markdown tables.

Trains the demo's student and two nets of 150 and 1200 classes, and counts what each tile of pixels
could leave out. docs/class_blocks.md has the criteria, the tables and what follows from them.

    python benchmarks/class_blocks                    # about twenty minutes of one core
    python benchmarks/class_blocks --nets 150 --out shares.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from live_blocks import (
    Cut,
    Ranking,
    backward_pass,
    blocks,
    cluster,
    foreseen_backward,
    forward_passes,
    label_difference,
    rank,
)
from torch import Tensor, nn
from trained_nets import CPU, TASKS, Task, trained

from gpl_fast import GenericPerceptualLoss, LossNet

TILES = ((8, 16), (16, 16), (1, 32), (4, 8))  # the last as in scenes of twice the size
SCOPES = ("image", "tile", "pixel")
# Scopes of the forward and of the backward; "foreseen" is the pixel's, of the expected gradient.
IMAGE, DESIGN, BUILT = ("image", "image"), ("tile", "pixel"), ("tile", "foreseen")
PAIRS = (IMAGE, DESIGN, BUILT, ("pixel", "pixel"))
# Norm-wise error of rounding a map's entries to bfloat16, and to float16 or TF32.
BFLOAT16, FLOAT16 = 2.0**-9, 2.0**-12
TOLERANCES = (2.0**-3, 2.0**-5, 2.0**-7, BFLOAT16, FLOAT16)
# (order, classes of a block) shown beside each other; blocks of 1 are gathered columns.
SHOWN = (("given", 64), ("frequency", 64), ("clusters", 64), ("clusters", 16), ("given", 1))
GAINS = (1.1, 1.3, 1.7, 2.6, 4, 1000)  # of the first layer
COLUMN_TILES = 7  # every so many tiles are looked at where a block is one class; prime to a row
CALIBRATION = 4  # scenes that set the order by clusters
Orders = dict[tuple[str, int], Tensor]  # (C,) classes in order, by name and size of a block


@dataclass(frozen=True)
class Stage:
    """A net at one moment of its training, on its test scenes."""

    net: str
    classes: int
    step: int
    accuracy: float  # of pixels
    entropy: float  # of a pixel's prediction, nats


@dataclass(frozen=True)
class Shares:
    """Of the work of the first layer's passes that is left, means over the scenes."""

    net: str
    step: int
    target: str
    order: str
    block: int
    tile: str
    scope: str
    tolerance: float
    forward: float
    backward: float
    foreseen: float  # backward, as far as the forward can tell


@dataclass(frozen=True)
class Errors:
    """Relative errors of value and gradient on one scene, against float32 without skipping."""

    net: str
    target: str
    what: str
    value: float
    gradient: float


class Scene:
    """The maps of one scene in float64, their gradient in float32, and what skipping does to it."""

    def __init__(self, net: LossNet, logits: Tensor, target: Tensor) -> None:
        """Logits (C, H, W), and labels (H, W) or a teacher's logits (C, H, W)."""
        self.net, self.logits, self.target = net, logits, target
        self.loss = GenericPerceptualLoss(len(logits), net, activation="none", backend="reference")
        self.y = logits.double().softmax(dim=0)
        self.y_target = target if target.dim() == 2 else target.double().softmax(dim=0)
        self.value, dy = self._gradient(self.y, self.y_target)
        self.dx = self._softmax_bwd(dy)
        self.forward = forward_passes(self.y, self.y_target)
        self.passes = [*self.forward, backward_pass(self.y, dy), foreseen_backward(self.y)]

    def _gradient(self, y: Tensor, target: Tensor) -> tuple[float, Tensor]:
        leaf = y.float().unsqueeze(0).requires_grad_()
        value = self.loss(leaf, (target.float() if target.dim() == 3 else target).unsqueeze(0))
        (dy,) = torch.autograd.grad(value, leaf)
        return value.item(), dy[0].double()

    def _softmax_bwd(self, dy: Tensor) -> Tensor:
        return self.y * (dy - (self.y * dy).sum(dim=0))

    def _errors(self, value: float, dx: Tensor) -> tuple[float, float]:
        gradient = (dx - self.dx).norm() / self.dx.norm()
        return abs(value - self.value) / self.value, float(gradient)

    def skipping(self, forward: Sequence[Tensor], backward: Tensor) -> tuple[float, float]:
        """Relative errors of value and gradient if only these (C, H, W) bool are computed."""
        if self.target.dim() == 2:
            y = self.y - label_difference(self.y, self.target) * ~forward[0]
            target = self.y_target
        else:
            y = self.y * forward[0]
            target = y - (self.y - self.y_target) * forward[1]
        value, dy = self._gradient(y, target)
        return self._errors(value, self._softmax_bwd(dy * backward))

    def rounding(self, dtype: torch.dtype, backend: str) -> tuple[float, float]:
        """The same of a loss that computes in `dtype` and leaves nothing out."""
        loss = GenericPerceptualLoss(len(self.y), self.net, backend=backend, compute_dtype=dtype)
        x = self.logits.unsqueeze(0).requires_grad_()
        value = loss(x, self.target.unsqueeze(0))
        (dx,) = torch.autograd.grad(value, x)
        return self._errors(value.item(), dx[0].double())


def by_pixel(ranking: Ranking, tolerance: float, tile: tuple[int, int], width: int) -> Tensor:
    """(B, H, W) bool: the blocks that each pixel's own tile computes."""
    live = ranking.live(tolerance)
    live = live.view(len(live), -1, width // tile[1])
    return live.repeat_interleave(tile[0], dim=1).repeat_interleave(tile[1], dim=2)


def shares(
    scene: Scene, orders: Orders
) -> Iterator[tuple[tuple[str, int, str, str, float], list[float]]]:
    """((order, block, tile, scope, tolerance), [forward, backward, foreseen]): live shares."""
    for (name, size), order in orders.items():
        maps = [[blocks(part, order, size) for part in p.parts] for p in scene.passes]
        for tile in TILES:
            step = COLUMN_TILES if size == 1 else 1
            cuts = [Cut.of(p, m, tile, step) for p, m in zip(scene.passes, maps, strict=True)]
            for scope in SCOPES:
                rankings = [rank(cut, scope) for cut in cuts]
                for tolerance in TOLERANCES:
                    live = [r.live(tolerance).double().mean().item() for r in rankings]
                    forward = statistics.fmean(live[:-2])
                    key = (name, size, f"{tile[0]}x{tile[1]}", scope, tolerance)
                    yield key, [forward, *live[-2:]]


def errors(net: str, target: str, scene: Scene) -> Iterator[Errors]:
    """Of rounding, and of skipping single classes in tiles of TILES[0]."""
    for backend in ("reference", "fast"):
        what = f"bfloat16, {backend}"
        yield Errors(net, target, what, *scene.rounding(torch.bfloat16, backend))
    cuts = [Cut.of(p, p.parts, TILES[0]) for p in scene.passes]
    width = scene.y.shape[2]
    for pair in (IMAGE, BUILT):
        forward = [rank(cut, pair[0]) for cut in cuts[:-2]]
        backward = rank(cuts[-2], "image") if pair == IMAGE else rank(cuts[-1], "pixel")
        for tolerance in TOLERANCES[1:]:
            masks = [by_pixel(r, tolerance, TILES[0], width) for r in forward]
            last = by_pixel(backward, tolerance, TILES[0], width)
            at = power(tolerance)
            yield Errors(net, target, f"{', '.join(pair)}, {at}", *scene.skipping(masks, last))
            if pair == BUILT:
                everything = torch.ones_like(last)
                what = f"{pair[0]}, nothing, {at}"
                yield Errors(net, target, what, *scene.skipping(masks, everything))


def orders_for(task: Task, live: Tensor) -> Orders:
    """The classes as numbered, by frequency in training, and by what matters together.

    Args:
        live: (C, T) bool, tiles of other scenes than those measured.
    """
    frequency = torch.bincount(task.train.labels.flatten().long(), minlength=task.classes)
    given = torch.arange(task.classes)
    found: Orders = {("given", 1): given}
    for size in (16, 32, 64):
        found["given", size] = given
        found["frequency", size] = frequency.argsort(descending=True)
        found["clusters", size] = cluster(live, size)
    return found


@torch.no_grad()
def look(task: Task, step: int, student: nn.Module) -> tuple[Stage, list[Tensor]]:
    """Accuracy and entropy on the test scenes, and logits (C, H, W) of those that are used."""
    right, entropy, maps = [], [], []
    for i in range(len(task.test)):
        images, labels = task.test.batch(torch.tensor([i]), CPU)
        logits = student(images)
        right.append((logits.argmax(dim=1) == labels).double().mean().item())
        log_p = logits.log_softmax(dim=1)
        entropy.append(-(log_p.exp() * log_p).sum(dim=1).mean().item())
        if i < task.measured + CALIBRATION:
            maps.append(logits[0].contiguous())
    means = statistics.fmean(right), statistics.fmean(entropy)
    return Stage(task.name, task.classes, step, *means), maps


def measure(task: Task) -> Iterator[Stage | Shares | Errors]:
    """Everything about one task's student."""
    net, labels = LossNet.vgg(task.classes), task.test.labels.long()
    for step, student, teacher in trained(task):
        stage, maps = look(task, step, student)
        yield stage
        live = []
        for i in range(task.measured, len(maps)):
            p = forward_passes(maps[i].double().softmax(dim=0), labels[i])[0]
            live.append(rank(Cut.of(p, p.parts, TILES[0], step=2), "tile").live(BFLOAT16))
        orders = orders_for(task, torch.cat(live, dim=1))
        for target in ("labels", "teacher"):
            found = defaultdict(list)
            for i in range(task.measured):
                with torch.no_grad():
                    soft = teacher(task.test.batch(torch.tensor([i]), CPU)[0])[0].contiguous()
                scene = Scene(net, maps[i], labels[i] if target == "labels" else soft)
                for key, left in shares(scene, orders):
                    found[key].append(left)
                if i == 0 and step == task.steps[0]:
                    yield from errors(task.name, target, scene)
            for key, rows in found.items():
                means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
                yield Shares(task.name, step, target, *key, *means)


# ------------------------------------------------------------------------------------ The tables


def power(tolerance: float) -> str:
    return f"2^{tolerance.hex().split('p')[1]}"


def layer_gain(target: str, forward: float, backward: float) -> float:
    """Of the first layer, its data gradient included, if skipping cost nothing."""
    n = 1 if target == "labels" else 2  # labels enter by look-up
    return (n + 1) / max(n * forward + backward, 1e-9)


def loss_gain(target: str, classes: int, gain: float) -> float:
    """Of all convolutions of a step of net 1,1,1,1,1 whose first layer gains so much."""
    widths = (classes, 64, 128, 256, 512, 512)
    flops = [a * b / 4**i for i, (a, b) in enumerate(pairwise(widths))]
    first, rest = (2 if target == "labels" else 3) * flops[0], 3 * sum(flops[1:])
    return (first + rest) / (first / gain + rest)


class Tables:
    """What was measured, as Markdown."""

    def __init__(self, rows: Sequence[Stage | Shares | Errors]) -> None:
        self.stages = [row for row in rows if isinstance(row, Stage)]
        self.errors = [row for row in rows if isinstance(row, Errors)]
        self.at = {
            (r.net, r.step, r.target, r.order, r.block, r.tile, r.scope, r.tolerance): r
            for r in rows
            if isinstance(r, Shares)
        }

    def left(
        self, stage: Stage, target: str, order: str, size: int, tile: tuple[int, int],
        pair: Sequence[str], tolerance: float,
    ) -> tuple[float, float]:  # fmt: skip
        """Shares forward and backward."""
        key = (stage.net, stage.step, target, order, size, f"{tile[0]}x{tile[1]}")
        forward = self.at[(*key, pair[0], tolerance)].forward
        if pair == BUILT:
            return forward, self.at[(*key, "pixel", tolerance)].foreseen
        return forward, self.at[(*key, pair[1], tolerance)].backward

    def cell(
        self, stages: Sequence[Stage], target: str, order: str, size: int, tile: tuple[int, int],
        pair: Sequence[str] = DESIGN, tolerance: float = BFLOAT16,
    ) -> str:  # fmt: skip
        """Shares and the gain of the first layer; of several stages, over the steps between."""
        left = [self.left(s, target, order, size, tile, pair, tolerance) for s in stages]
        forward, backward = left[0]
        if len(stages) > 1:
            steps = torch.tensor([float(s.step) for s in stages])
            area = torch.trapezoid(torch.tensor(left), steps, dim=0) / (steps[-1] - steps[0])
            forward, backward = area.tolist()
        return f"{forward:.0%}, {backward:.0%}: {layer_gain(target, forward, backward):.2f}x"

    def text(self) -> str:
        last = {stage.net: stage for stage in self.stages}.values()
        columns = [f"{order}, {size}" if size > 1 else "columns" for order, size in SHOWN]
        stages = [
            [s.net, s.step, f"{s.accuracy:.0%}", f"{s.entropy:.2f}", target]
            + [self.cell([s], target, *shown, TILES[0]) for shown in SHOWN]
            for s in self.stages
            for target in ("labels", "teacher")
        ]
        for net in dict.fromkeys(s.net for s in self.stages if s.step == 0):
            course = [s for s in self.stages if s.net == net]
            stages += [
                [net, f"all, {', '.join(pair)}", "", "", target]
                + [self.cell(course, target, *shown, TILES[0], pair) for shown in SHOWN]
                for target in ("labels", "teacher")
                for pair in (DESIGN, IMAGE)
            ]
        scopes = [
            [s.net, ", ".join(pair), power(tolerance)]
            + [self.cell([s], "labels", *shown, TILES[0], pair, tolerance) for shown in SHOWN]
            for s in last
            for pair in PAIRS
            for tolerance in TOLERANCES[1:]
        ]
        sizes = [
            [s.net, order, size] + [self.cell([s], "labels", order, size, tile) for tile in TILES]
            for s in last
            for order, size in dict.fromkeys(key[3:5] for key in self.at)
        ]
        wrong = [
            [e.net, e.target, e.what, f"{e.value:.3%}", f"{e.gradient:.3%}"] for e in self.errors
        ]
        gains = [
            [classes, target, *(f"{loss_gain(target, classes, g):.2f}x" for g in GAINS)]
            for classes in (150, 1203)
            for target in ("labels", "teacher")
        ]
        parts = [
            ("By moment", ["net", "step", "right", "entropy", "target", *columns], stages),
            ("By scope and tolerance", ["net", "scope", "tolerance", *columns], scopes),
            ("By tile", ["net", "order", "block", *(f"{h}x{w}" for h, w in TILES)], sizes),
            ("Errors", ["net", "target", "what", "value", "gradient"], wrong),
            ("All convolutions", ["C", "target", *(f"{g}x" for g in GAINS)], gains),
        ]  # fmt: skip
        return "\n\n".join(f"{title}\n\n{_table(head, rows)}" for title, head, rows in parts)


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, metavar="CSV", help="every share")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same nets on every run of a machine
    rows: list[Stage | Shares | Errors] = []
    for name in args.nets:
        rows += measure(TASKS[name]())
    print(Tables(rows).text())
    if args.out:
        found = [asdict(row) for row in rows if isinstance(row, Shares)]
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()

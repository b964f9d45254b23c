"""`gpl-fast bench --roofline`: FLOPs and bytes of every stage of a step on a GPU, and their floors.

Counted from what the two walks of `gpl_fast.chain` would run, with their arguments, on tensors
without memory: neither a GPU nor Triton is needed. Bytes are those of each tensor once: halos,
weights that leave the cache and rows that other programs read again come on top. The floor of a
launch is the larger of its FLOPs and its bytes at a GPU's rates. docs/gpu.md says more.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_fast import chain, plan
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools.bench import check_shape


@dataclass(frozen=True)
class Rates:
    """Dense bfloat16 TFLOP/s with float32 accumulation, TB/s of memory, and who says so."""

    tflops: float
    tbps: float
    source: str

    def seconds(self, launch: Launch) -> float:
        """The floor of a launch."""
        return max(launch.flops / self.tflops, launch.bytes / self.tbps) / 1e12


# A GPU's peak first, then what has been measured on it.
GPUS: dict[str, tuple[Rates, ...]] = {
    "h200": (
        Rates(989, 4.8, "NVIDIA H200 data sheet, SXM"),
        Rates(790, 4.3, "measured: PyTorch's matmul and copy"),
    ),
    "h100": (Rates(989, 3.35, "NVIDIA H100 data sheet, SXM"),),
    "a100": (Rates(312, 2.039, "NVIDIA A100 80GB data sheet, SXM"),),
    "rtx4090": (Rates(165.2, 1.008, "NVIDIA Ada GPU architecture, appendix A"),),
}


@dataclass(frozen=True)
class Workload:
    """Logits (N, C, H, W), the kind of target ("dense" or "labels" or "topk"), the activation."""

    shape: tuple[int, int, int, int]
    kind: str
    activation: str = "softmax"


WORKLOADS = {
    "cityscapes": Workload((8, 19, 769, 769), "dense"),
    "voc": Workload((16, 21, 512, 512), "dense"),
    "ade20k": Workload((16, 150, 512, 512), "dense"),
    "ade20k, labels": Workload((16, 150, 512, 512), "labels"),
    "ade-full, labels": Workload((8, 847, 512, 512), "labels"),
    "lvis": Workload((4, 1203, 512, 512), "dense"),
    "lvis, labels": Workload((4, 1203, 512, 512), "labels"),
    "depth": Workload((8, 1, 385, 385), "dense", "none"),
    "masks": Workload((64, 1, 200, 200), "dense", "sigmoid"),
}
TOP = 8  # classes listed in a pixel of a top-k target
WORKSPACE_MB = 256.0

# ------------------------------------------------------------------------------------------ counts


@dataclass
class Launch:
    """One kernel's work."""

    name: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Listed:
    """A target that is looked up: `gpl_fast.kernels.Listed`, for which Triton is needed."""

    table: Tensor
    taken: Tensor
    taken_row0: int
    valid: Tensor | None
    labels: Tensor | None = None
    interior: Tensor | None = None
    values: Tensor | None = None
    indices: Tensor | None = None
    rest: Tensor | None = None
    rest_table: Tensor | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for the module of stages, and sees ATen's convolutions: collects both."""

    Listed = Listed

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default):
            x, w = args[:2]
            transposed = args[6]
            # Each weight meets each pixel of the side that is not spread.
            pixels = (x if transposed else out).numel() // (x if transposed else out).shape[1]
            name = "data gradient (ATen)" if transposed else "convolution (ATen)"
            self.launches.append(Launch(name, 2.0 * pixels * w.numel(), _bytes((x, w, out))))
        return out

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A stage without arithmetic worth counting, on tensors of the rows that it touches."""
        if name.startswith("_") or not name.endswith(("_fwd", "_bwd")):
            raise AttributeError(name)
        return lambda *args: self.launches.append(Launch(name, 0.0, _bytes(args)))

    def conv_block_fwd(
        self, a: Tensor, d: Tensor | None, weight: Tensor, *args: Any, **options: Any
    ) -> Tensor | None:
        """As `gpl_fast.kernels.conv_block_fwd`."""
        n, height, width, _ = a.shape
        k, stride = options["kernel_size"], options["stride"]
        rows = (height + 2 * options["pad_h"] - k) // stride + 1
        columns = (width + 2 * (k // 2) - k) // stride + 1
        branches = 1 if d is None else 2
        flops = 2.0 * branches * n * rows * columns * weight.numel()
        listed = next((x for x in args if isinstance(x, Listed)), None)
        moved: float = _bytes((a, d, weight, *args, *options.values()))
        if listed is not None:
            whole = (listed.labels, listed.values, listed.indices, listed.rest, listed.valid)
            image_rows = next(t.shape[-2] for t in whole if t is not None)
            moved += _bytes((listed.table, listed.taken, listed.interior, listed.rest_table))
            moved += _bytes(whole) * min(1.0, height / image_rows)
        self.launches.append(Launch("conv_block_fwd", flops, moved))
        return a.new_empty((n, 1), dtype=torch.float32) if options["reduce"] else None

    def relu_pool_bwd(
        self, dy: Tensor, code: Tensor, pool: int, height: int, width: int, row0: int, dz: Tensor
    ) -> None:
        """As the operator: rows of whole maps."""
        moved = _bytes((dy, code)) * min(1.0, dz.shape[1] / height) + _bytes((dz,))
        self.launches.append(Launch("relu_pool_bwd", 0.0, moved))

    def softmax_bwd(self, x: Tensor, lse: Tensor | None, dy: Tensor, *args: Any) -> None:
        """As the operator: rows of whole planes."""
        moved = _bytes((x, lse, *args)) * min(1.0, dy.shape[1] / x.shape[2]) + _bytes((dy,))
        self.launches.append(Launch("softmax_bwd", 0.0, moved))


def _bytes(arguments: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))


@cache
def launches(
    work: Workload, workspace_mb: float = WORKSPACE_MB
) -> tuple[list[Launch], list[Launch]]:
    """Of the forward and of the backward, in bfloat16 with the default network.

    Raises:
        ValueError: `gpl_fast.tools.bench.check_shape`, or it does not fit into the workspace.
    """
    n, c, h, w = work.shape
    net = LossNet.vgg(c)
    check_shape(net, work.shape, work.kind)
    text = plan.make_spec(
        net, feature_weights={net.layer_names[-1]: 1.0}, style_weights={}, kind=work.kind,
        activation=work.activation, target_activation=work.activation, temperature=1.0,
        device="cuda", dtype=torch.bfloat16, workspace_mb=workspace_mb,
    )  # fmt: skip
    planned = plan.Plan(plan.load_spec(text), n, h, w)
    x, packs = torch.empty(work.shape, device="meta"), _packs(net)
    recorder = Recorder()
    with recorder:
        forward = chain.Forward(planned, x, _target(work), packs, True)
        forward.stages, forward.blocks = recorder, True  # type: ignore[assignment]
        _, saved = forward.run()
        first, recorder.launches = recorder.launches, []
        g = torch.ones(4, n, device="meta")
        backward = chain.Backward(planned, x, {}, packs, saved, g)
        backward.stages = recorder  # type: ignore[assignment]
        backward.run()
    return first, recorder.launches


def _target(work: Workload) -> dict[str, Tensor]:
    n, c, h, w = work.shape
    if work.kind == "dense":
        return {"dense": torch.empty(work.shape, device="meta")}
    if work.kind == "labels":
        return {"labels": torch.empty((n, h, w), dtype=torch.long, device="meta")}
    shape = (n, min(TOP, c), h, w)
    return {
        "topk_values": torch.empty(shape, device="meta"),
        "topk_indices": torch.empty(shape, dtype=torch.long, device="meta"),
    }


def _packs(net: LossNet) -> dict[str, Tensor]:
    """Weights by `chain.pack_weights`' names and shapes."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packs: dict[str, Tensor] = {}
    for layer in net.layers:
        if layer.kind != "conv":
            continue
        k, c_out = layer.kernel_size, layer.out_channels
        c_in = layer.in_channels
        if not packs:
            packs["table"] = empty(k**2, c_in, c_out)
            packs["interior"] = empty(c_in, c_out, dtype=torch.float32)
            packs["rest_table"] = empty(k**2, c_out, dtype=torch.float32)
            c_in = plan.padded_channels(c_in)
        weight = empty(c_out, c_in, k, k).contiguous(memory_format=torch.channels_last)
        packs[f"w.{layer.name}"] = weight
        packs[f"block.{layer.name}"] = empty(k**2 * c_in, c_out)
    return packs


# ------------------------------------------------------------------------------------------ report


def as_data(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> dict[str, Any]:
    """All workloads in JSON's types: FLOPs, bytes and floors (one for each of "rates") by stage."""
    rates = GPUS[gpu]
    rows = [] if measured is None else read_measured(measured)
    workloads = []
    for name, w in work.items():
        stages = [
            {
                "half": half,
                "stage": stage,
                "launches": len(some),
                "flops": sum(v.flops for v in some),
                "bytes": sum(v.bytes for v in some),
                "floor_seconds": [sum(map(r.seconds, some)) for r in rates],
            }
            for half, made in zip(("forward", "backward"), launches(w, workspace_mb), strict=True)
            for stage, some in _by_name(made)
        ]
        workloads.append({"name": name, **asdict(w), "stages": stages, "measured": _of(w, rows)})
    named = {"gpu": gpu, "workspace_mb": workspace_mb, "rates": [asdict(r) for r in rates]}
    return {**named, "workloads": workloads}


def report(
    gpu: str,
    work: dict[str, Workload],
    measured: Path | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> str:
    """All workloads in Markdown, each beside its rows in a file of measured ones."""
    rates = GPUS[gpu]
    lines = [f"# {gpu}: floors of a step, bfloat16, net 1,1,1,1,1\n"]
    lines += [f"- {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s ({r.source})" for r in rates]
    rows = [] if measured is None else read_measured(measured)
    tables = [table(name, w, rates, rows, workspace_mb) for name, w in work.items()]
    return "\n".join([*lines, "", *tables])


def table(
    name: str,
    work: Workload,
    rates: Sequence[Rates],
    rows: Sequence[dict[str, Any]] = (),
    workspace_mb: float = WORKSPACE_MB,
) -> str:
    """One workload: a line a stage, all of them, and what was measured."""
    title = " x ".join(map(str, work.shape)) + f", {work.kind}, {work.activation}"
    floors = [f"floor at {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s, ms" for r in rates]
    columns = ["stage", "launches", "GFLOP", "GB", "FLOP / byte", *floors, "limit"]
    lines = [
        f"### {name}: {title}\n",
        "| " + " | ".join(columns) + " |",
        "|---|" + "--:|" * (len(columns) - 2) + "---|",
    ]
    halves = dict(zip(("forward", "backward"), launches(work, workspace_mb), strict=True))
    for half, made in halves.items():
        for stage, some in _by_name(made):
            lines.append(_line(f"{half}: {stage}", some, rates, limit=True))
    everything = [launch for made in halves.values() for launch in made]
    lines.append(_line("all", everything, rates) + "\n")
    found = _of(work, rows)
    seconds = {f"{half}_seconds": sum(map(rates[0].seconds, made)) for half, made in halves.items()}
    seconds["seconds_median"] = sum(seconds.values())
    if found:
        lines += ["| measured | forward, ms | backward, ms | both, ms |", "|---|--:|--:|--:|"]
        lines += [_measured_line(row, seconds) for row in found]
        lines += ["", f"In brackets the floor's share of it, at {rates[0].tflops:g} TFLOP/s.", ""]
    return "\n".join(lines)


def _of(work: Workload, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["shape"] == work.shape and row["target"] == work.kind]


def _by_name(made: Sequence[Launch]) -> Iterator[tuple[str, list[Launch]]]:
    order = list(dict.fromkeys(launch.name for launch in made))
    for name, some in groupby(sorted(made, key=lambda x: order.index(x.name)), lambda x: x.name):
        yield name, list(some)


def _line(name: str, some: Sequence[Launch], rates: Sequence[Rates], limit: bool = False) -> str:
    flops, moved = sum(v.flops for v in some), sum(v.bytes for v in some)
    floors = [f"{1e3 * sum(map(r.seconds, some)):.2f}" for r in rates]
    bound = "arithmetic" if flops / rates[0].tflops > moved / rates[0].tbps else "memory"
    cells = [
        name, f"{len(some)}" if limit else "", f"{flops / 1e9:,.0f}", f"{moved / 1e9:.2f}",
        f"{flops / moved:.0f}", *floors, bound if limit else "",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _measured_line(row: dict[str, Any], floors: dict[str, float]) -> str:
    cells = [f"{row['provider']}, {row['machine']}"]
    for part in ("forward_seconds", "backward_seconds", "seconds_median"):
        value = row.get(part)
        share = "" if value is None else f"{1e3 * value:.2f} ({floors[part] / value:.0%})"
        cells.append(share)
    return "| " + " | ".join(cells) + " |"


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Rows with times of a benchmark's CSV, or of the JSON of a GPU report or `gpl-fast bench`.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            machine = found.get("machine", "")
            rows = found.get("benchmark", found)["rows"]
            rows = [{"machine": machine, **row} for row in rows]
        else:
            rows = csv_rows(text)
        return [_numbers(row) for row in rows if row.get("seconds_median")]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{path}: got no rows of a benchmark ({error!r}), expected a CSV of "
            "benchmarks/run.py, or a report.json of make gpu-report or gpl-fast bench --json"
        ) from error


def csv_rows(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV, each with what the lines "# key: value" above the columns say of all."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    shared = dict(line.removeprefix("# ").split(": ", 1) for line in lines[:begin])
    return [{**shared, **row} for row in csv.DictReader(lines[begin:])]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    shape = row["shape"].split("x") if isinstance(row["shape"], str) else row["shape"]
    seconds = {k: float(row[k]) for k in row if "seconds" in k and row[k] not in (None, "")}
    about = {k: row[k] for k in ("machine", "provider", "target")}
    return {**about, "shape": tuple(map(int, shape)), **seconds}

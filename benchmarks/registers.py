"""Registers and shared memory of the compiled CUDA kernels.

``python benchmarks/registers.py`` prints the table of the library that is built; no GPU is needed,
only cuobjdump (of the toolkit or of Triton's wheel) and c++filt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gpl_fast import ops

RESERVED = 1024  # bytes of shared memory that the system takes from sm_90 on
ARITHMETIC = ("bf16", "fp16", "tf32", "fp32")  # csrc/cuda/conv_block/conv_tile.cuh's Math, in order
FORMS = ("softmax", "other", "cross-entropy", "any")  # csrc/cuda/softmax_bwd.cuh's LogitsForm
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
TILE_H, TILE_W, PIXEL_BYTES = 8, 16, 128  # of csrc/cuda/conv_block/dz_tile.cuh
LOGITS_SUMS = 12  # bytes that a lane keeps of a pixel


@dataclass(frozen=True)
class Usage:
    """Of a kernel on one architecture, in bytes but for the registers."""

    registers: int
    stack: int
    local: int
    shared: int  # static, without `RESERVED`


def cuobjdump() -> str | None:
    """Of PATH, or of Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    tool = Path(folders[0], "backends", "nvidia", "bin", "cuobjdump") if folders else None
    return str(tool) if tool and tool.exists() else None


def _output(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


@cache
def usage(library: Path = ops.LIBRARY) -> dict[str, dict[str, Usage]]:
    """Kernel -> architecture ("80", "90a", …) -> what it takes; empty without CUDA code."""
    tool = cuobjdump()
    assert tool is not None
    text = _output("c++filt", stdin=_output(tool, "-res-usage", str(library)))
    found: dict[str, dict[str, Usage]] = {}
    architecture = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (.*):$", line):
            name = short_name(match[1])
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            shared -= RESERVED if int(architecture.rstrip("a")) >= 90 and shared else 0
            found.setdefault(name, {})[architecture] = Usage(registers, stack, local, shared)
    return found


def short_name(demangled: str) -> str:
    """``conv_block_bwd_kernel<bf16, 128>`` of the whole signature."""
    name = re.sub(r"\(anonymous namespace\)::|gpl_fast::cuda::|^void ", "", demangled)
    name = re.sub(r"\(Math\)(\d)", lambda found: ARITHMETIC[int(found[1])], name)
    name = re.sub(r"\(LogitsForm\)(\d)", lambda found: FORMS[int(found[1])], name)
    for full, short in TYPES.items():
        name = name.replace(full, short)
    return name.split("(")[0]


def dynamic_shared(name: str, kernel_size: int, dz_tiles: int = 2) -> tuple[int, int]:
    """(threads, bytes) of a launch of a conv_block kernel, as the kernels' layouts have it."""
    found = re.fullmatch(r"(\w+)<(\w+), (\d+)(?:, (\w+))?>", name)
    assert found is not None, name
    kernel, arithmetic, bn = found[1], found[2], int(found[3])
    if (
        kernel == "conv_block_fwd_sm90_kernel"
    ):  # two stages of two maps and three taps; what it stores
        rows, slabs = 34 if bn == 64 else 18, bn // 64
        stage = 2 * rows * 8 * PIXEL_BYTES + 3 * slabs * 64 * PIXEL_BYTES
        return 384, 2 * stage + 2 * 32 * (2 * (PIXEL_BYTES + 16) + 32)
    dz = (TILE_H + kernel_size - 1) * (TILE_W + kernel_size - 1) * PIXEL_BYTES
    if kernel == "conv_block_bwd_sm90_kernel":
        slabs, piece = -(-bn // 64), min(bn, 64)
        ring = (3 if bn == 256 else 4) * slabs * 64 * PIXEL_BYTES
        pitch = piece if found[4] == "true" else piece + 8
        rows = TILE_W * pitch * 4 + TILE_W * 2 * LOGITS_SUMS
        return 384, ring + 2 * dz + 8 * rows + 16
    size = 4 if arithmetic in ("tf32", "fp32") else 2
    warps_m, warps_n = {32: (4, 1), 64: (2, 2)}.get(bn, (2, 4))
    threads, pixels = 32 * warps_m * warps_n, warps_m * TILE_W
    stage = 16 // size * 4 * (-(-bn * size // 128) * 128)
    logits = "logits" in kernel
    ring = max((3 if bn > 128 else 4) * stage, pixels * (bn if logits else bn + 8) * 4)
    sums = TILE_H * TILE_W * (threads // pixels) * LOGITS_SUMS + 16
    return threads, dz_tiles * dz + ring + (sums if logits else 0)


def table(found: dict[str, dict[str, Usage]]) -> list[str]:
    """Markdown: the conv_block kernels one by one, of the others the most of all instances."""
    architectures = sorted({a for each in found.values() for a in each}, key=_number)
    names = ["kernel", "threads", "shared KiB", *(f"sm_{a}" for a in architectures)]
    lines = [f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
    groups: dict[str, list[str]] = {}
    for name in sorted(found, key=_order):
        groups.setdefault(name if name.startswith("conv_block") else name.split("<")[0], []).append(
            name
        )
    for group, members in groups.items():
        threads, shared = 256, max(u.shared for name in members for u in found[name].values())
        if group.startswith("conv_block"):
            threads, dynamic = dynamic_shared(group, kernel_size=3)
            shared += dynamic
        most = {
            a: max(found[name][a].registers for name in members if a in found[name])
            for a in architectures
            if any(a in found[name] for name in members)
        }
        cells = [f"`{group}`", threads, f"{shared / 1024:.0f}"]
        cells += [most.get(a, "") for a in architectures]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _number(architecture: str) -> int:
    return int(architecture.rstrip("a"))


def _order(name: str) -> tuple[str, str, int]:
    """By kernel, arithmetic and tile."""
    kernel, *rest = re.split("[<,>]", name)
    return kernel, rest[0] if rest else "", int(rest[1]) if kernel.startswith("conv") else 0


def main() -> int:
    """The table on standard output; 1 where there is nothing to look at."""
    if cuobjdump() is None or not ops.LIBRARY.exists() or not (found := usage()):
        print("registers: it needs cuobjdump and a library with CUDA operators", file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

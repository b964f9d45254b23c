"""Loads the compiled operators. The only file that names ``torch.ops.gpl_fast``.

`gpl_fast.stages` has their arguments. Every operator writes into buffers that the caller owns, so
that a workspace is used again without page faults; shapes, dtypes and layouts are checked in
``csrc/operators``.
"""

from __future__ import annotations

import functools
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from gpl_fast import environment, sources
from gpl_fast.cuda_build import driver_version, parse_cuda_build

LIBRARY = Path(__file__).resolve().parent / "libgpl_fast.so"

_MUTATING = (
    "softmax_pack_fwd",
    "label_conv_fwd",
    "topk_conv_fwd",
    "relu_fwd",
    "relu_diff_fwd",
    "relu_pool_fwd",
    "relu_pool_diff_fwd",
    "relu_pool_bwd",
    "relu_bwd",
    "softmax_bwd",
    "binary_ce_fwd",
    "binary_ce_bwd",
    "winograd_weight",
    "winograd",
    "direct_weight",
    "direct_conv",
    "populate",
    "conv_block_bwd",
    "conv_block_logits_bwd",
)
_REDUCING = ("diff_reduce_fwd", "unit_diff_fwd")  # their sums are new
_TEXTS = ("cpu_capability", "cpu_bfloat16", "cuda_build")
_SECTIONS = ((40, 48), (58, 60), (60, 62))  # e_shoff, e_shentsize, e_shnum of an ELF header
_NAMES = (*_MUTATING, *_REDUCING, *_TEXTS)


@functools.cache
def load() -> str | None:
    """Load the library once; the reason why not, or None.

    Raises:
        ValueError: a variable of the environment that the library reads holds an unknown word.
    """
    for name in ("GPL_FAST_CPU_CAPABILITY", "GPL_FAST_SM90A"):
        environment.value(name)
    if not LIBRARY.exists():
        if sys.platform != "linux":
            return f"there are no compiled operators for {platform.system()}"
        return f"the compiled operators are not built ({LIBRARY.name} is missing); {_way_out()}"
    try:
        _check_whole(LIBRARY)
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"the compiled operators do not load: {_first_cause(error)}; {_way_out()}"
    missing = [name for name in _NAMES if not hasattr(torch.ops.gpl_fast, name)]
    if missing:
        return (
            f"the compiled operators are of another version: {LIBRARY} has no "
            f"{', '.join(missing)}; {_way_out()}"
        )
    if _is_stale():
        warnings.warn(
            f"gpl_fast: {LIBRARY} was built from other sources than those in csrc beside it; "
            f"{_way_out()}",
            stacklevel=2,
        )
    for name in _MUTATING:
        torch.library.register_fake(f"gpl_fast::{name}", _mutating_fake)
    for name in _REDUCING:
        torch.library.register_fake(f"gpl_fast::{name}", _reducing_fake)
    return None


@functools.cache
def broken() -> str | None:
    """Why the library does not load although there is one, or None."""
    return load() if LIBRARY.exists() else None


def _check_whole(library: Path) -> None:
    """Raises: OSError for an ELF file without its end, where the loader would end the process."""
    with library.open("rb") as f:
        header = f.read(64)
    if header[:6] == b"\x7fELF\x02\x01":  # 64 bits, little-endian
        sections, size, count = (int.from_bytes(header[a:b], "little") for a, b in _SECTIONS)
        if library.stat().st_size < sections + size * count:
            raise OSError(f"{library} is cut off")


def _first_cause(error: BaseException) -> BaseException:
    """What the loader said, which torch wraps into an error of its own."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _source_tree() -> Path | None:
    """Where the package lies beside the sources of the library."""
    root = LIBRARY.parents[1]
    return root if (root / "csrc" / "operators").is_dir() else None


def _way_out() -> str:
    if (root := _source_tree()) is not None:
        return (
            f"build them in {root}: make build, or pip install --no-build-isolation --no-deps "
            "--force-reinstall -e ."
        )
    return f"reinstall gpl-fast for this system and torch {torch.__version__}"


def _is_stale() -> bool:
    root = _source_tree()
    return root is not None and sources.digest(root / "csrc") not in LIBRARY.read_bytes()


def cuda_obstacle(device: torch.device) -> str | None:
    """Why the library's CUDA operators cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they are for CUDA devices, not for {device.type!r}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if (reason := load()) is not None:
        return reason
    build = parse_cuda_build(torch.ops.gpl_fast.cuda_build())
    if build is None:
        return "the compiled operators were built without nvcc, for the CPU only"
    major, minor = torch.cuda.get_device_capability(device)
    if not build.serves(major, minor):
        return f"the compiled operators hold {build}, nothing for sm_{major}{minor}"
    return old_driver(device)


def old_driver(device: torch.device) -> str | None:
    """Why the driver cannot run the library's CUDA operators on the GPU `device`, or None."""
    build = None if load() else parse_cuda_build(torch.ops.gpl_fast.cuda_build())
    driver = driver_version()
    if build is None or driver is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    needed = build.needs_driver(major, minor)
    if driver >= needed:
        return None
    return (
        f"the driver knows CUDA up to {driver[0]}.{driver[1]}, but the compiled operators "
        f"({build}) need {needed[0]}.{needed[1]} for sm_{major}{minor}: update the driver, or "
        "build them with an older toolkit (CUDA_HOME)"
    )


def _mutating_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _reducing_fake(maps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return maps.new_empty(maps.shape[0], dtype=torch.float64)


def __getattr__(name: str) -> Any:
    """``ops.relu_bwd`` and so on: the operator itself (``OpOverload``)."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (reason := load()) is not None:
        raise RuntimeError(reason)
    operator = getattr(torch.ops.gpl_fast, name).default
    globals()[name] = operator
    return operator

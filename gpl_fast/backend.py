"""Which backend runs, and why not the other: every "no" is a sentence.

`reference` is plain PyTorch; `fast` needs the compiled operators on the CPU and Triton on a GPU.
The choice is made as a unit, at forward time, from the device, the dtype and the network.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch

from gpl_fast import environment, ops
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net.lossnet import LossNet

BACKENDS = ("auto", "fast", "reference")


class BackendUnavailable(RuntimeError):
    """`backend="fast"` where it cannot run; the message gives the reason."""


@dataclass(frozen=True)
class Choice:
    """A backend, and the sentence that explains the choice."""

    name: str
    reason: str


def requested_backend(backend: str) -> str:
    """`backend`, or for "auto" what ``GPL_FAST_BACKEND`` says.

    Raises:
        ValueError: an unknown word in either.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS}")
    return environment.value("GPL_FAST_BACKEND") or backend if backend == "auto" else backend


def fast_obstacle(device: torch.device, dtype: torch.dtype, net: LossNet | None) -> str | None:
    """Why the fast path cannot run here, or None."""
    if (why := _chain_obstacle(dtype, net)) is not None:
        return why
    if device.type == "cpu":
        return _library_obstacle()
    if device.type == "cuda":
        return _triton_obstacle(device)
    return f"there are no fast kernels for device type {device.type!r}"


def _chain_obstacle(dtype: torch.dtype, net: LossNet | None) -> str | None:
    """Why it can run nowhere."""
    if dtype == torch.float64:
        return "float64 is the reference's: pass float32, bfloat16 or float16"
    return None if net is None else net.chain_obstacle()


@constant_in_graphs
def _library_obstacle() -> str | None:
    return ops.load()


@constant_in_graphs
def _triton_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the GPU's kernels need Triton: pip install triton"
    if torch.version.hip is not None:
        return "the kernels have been proven for NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, {device} has {major}.{minor}"
    return None


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, net: LossNet | None = None
) -> Choice:
    """The backend that runs.

    Raises:
        BackendUnavailable: "fast" was asked for and cannot run.
        ValueError: an unknown word.
    """
    word = requested_backend(backend)
    if word == "reference":
        return Choice("reference", "it was asked for")
    obstacle = fast_obstacle(device, dtype, net)
    if obstacle is None:
        if device.type == "cuda" and (why := _broken_library() or _old_driver(device)) is not None:
            _warn_once(f"Triton's kernels run instead of the compiled ones: {why}")
        return Choice("fast", "everything it needs is there")
    if word == "fast":
        raise BackendUnavailable(f"backend='fast' cannot run: {obstacle}; use backend='auto'")
    # On a CPU many things are no surprise: float64, a network of modules, no library for it.
    if device.type == "cuda" or (device.type == "cpu" and obstacle == _broken_library()):
        _warn_once(f"the reference backend runs: {obstacle}")
    return Choice("reference", obstacle)


def choose_anywhere(backend: str, dtype: torch.dtype, net: LossNet) -> Choice:
    """The backend that would run where everything that the fast path needs is there.

    Raises:
        BackendUnavailable, ValueError: as `choose`.
    """
    if (word := requested_backend(backend)) == "reference":
        return Choice("reference", "it was asked for")
    if (obstacle := _chain_obstacle(dtype, net)) is None:
        return Choice("fast", "supposing everything it needs is there")
    if word == "fast":
        raise BackendUnavailable(f"backend='fast' cannot run: {obstacle}; use backend='auto'")
    return Choice("reference", obstacle)


@constant_in_graphs
def _broken_library() -> str | None:
    return ops.broken()


@constant_in_graphs
def _old_driver(device: torch.device) -> str | None:
    return ops.old_driver(device)


_warned: set[str] = set()  # what is said before the colon


@constant_in_graphs
def _warn_once(what: str) -> bool:
    kind = what.partition(":")[0]
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"gpl_fast: {what}", stacklevel=2)
    return True

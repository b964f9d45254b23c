"""Which backend runs, and why not the other: every "no" is a sentence.

`reference` is plain PyTorch; `fast` needs the compiled operators on the CPU and Triton on a GPU.
The choice is made as a unit, at forward time, from the device, the dtype and the network.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

from gpl_fast import ops
from gpl_fast.lossnet import LossNet, constant_in_graphs

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
    source, word = "backend", backend
    if backend == "auto" and "GPL_FAST_BACKEND" in os.environ:
        source, word = "GPL_FAST_BACKEND", os.environ["GPL_FAST_BACKEND"]
    if word not in BACKENDS:
        way_out = "" if source == "backend" else "; or unset the variable"
        raise ValueError(f"{source}: got {word!r}, expected one of {BACKENDS}{way_out}")
    return word


def fast_obstacle(device: torch.device, dtype: torch.dtype, net: LossNet | None) -> str | None:
    """Why the fast path cannot run here, or None."""
    if dtype == torch.float64:
        return "float64 is the reference's: pass float32, bfloat16 or float16"
    if net is not None and (why := net.chain_obstacle()) is not None:
        return why
    if device.type == "cpu":
        return _library_obstacle()
    if device.type == "cuda":
        return _triton_obstacle(device)
    return f"there are no fast kernels for device type {device.type!r}"


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
        return Choice("fast", "everything it needs is there")
    if word == "fast":
        raise BackendUnavailable(f"backend='fast' cannot run: {obstacle}; use backend='auto'")
    if device.type == "cuda":
        _warn_once(obstacle)
    return Choice("reference", obstacle)


_warned = False


@constant_in_graphs
def _warn_once(obstacle: str) -> bool:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"gpl_fast: the reference backend runs: {obstacle}", stacklevel=2)
    return True

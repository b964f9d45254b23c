"""`gpl-fast info`: versions, devices, each backend's state and reason, a check."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from typing import Any

import torch

import gpl_fast
from gpl_fast import backend as backends
from gpl_fast import environment, ops
from gpl_fast.cuda_build import parse_cuda_build
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools import measure

TARGETS = ("dense", "labels", "topk")  # of a check


def collect() -> dict[str, Any]:
    """Versions, devices, backends with reasons, and the default network's fingerprint."""
    net = LossNet.vgg(19)
    devices = ["cpu"]
    names = {"cpu": platform.processor() or platform.machine()}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append(f"cuda:{i}")
        names[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    states = {}
    for device in devices:
        obstacle = _said(backends.fast_obstacle, torch.device(device), torch.float32, net)
        states[device] = {
            "name": names[device],
            "fast": "available" if obstacle is None else f"unavailable: {obstacle}",
            "reference": "available",
        }
        if device != "cpu":
            states[device]["backward"] = _backward(torch.device(device))
    return {
        "gpl_fast": gpl_fast.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "operators": _operators(),
        "devices": states,
        "missing": _missing(),
        "environment": environment.states(),
        "unknown": environment.unknown(),
        "fingerprint": net.fingerprint(),
    }


def text(found: dict[str, Any]) -> str:
    """What `collect` found, and the rows of `check` under "check", for people."""
    lines = []
    for key, value in found.items():
        if key == "devices":
            for device, state in value.items():
                lines.append(f"{device:<12} {state['name']}")
                parts = [part for part in state if part != "name"]
                lines += [f"  {part:<10} {state[part]}" for part in parts]
        elif key == "operators":
            for part, words in value.items():
                name = part if part == "library" else f"  {part}"
                lines.append(f"{name:<12} {words}")
        elif key == "missing":
            lines += [f"{kind:<12} not usable: {why}" for kind, why in value.items()]
        elif key == "environment":
            lines.append("environment")
            for name, state in value.items():
                shown = "unset" if state["value"] is None else state["value"]
                lines.append(f"  {name:<24} {shown}{_hint(state)}")
        elif key == "unknown":
            for name, near in value.items():
                lines.append(f"  {name:<24} nothing reads it: did you mean {near}?")
        elif key == "check":
            for row in value:
                lines.append(
                    f"check        {row['device']} {row['backend']} {row['dtype']} "
                    f"{row['target']}: value off by {row['value_error']:.1e}, gradient cosine "
                    f"{row['grad_cosine']:.6f}: {'ok' if row['ok'] else 'WRONG'}"
                )
        else:
            lines.append(f"{key:<12} {value}")
    return "\n".join(lines)


def plain(found: Any) -> Any:
    """`found` as JSON can hold it: None for what is no finite number."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _hint(state: dict[str, Any]) -> str:
    if state["error"]:
        return f"  ERROR: {state['error']}"
    return f" ({state['expected']})" if state["value"] is None else ""


def _said(ask: Any, *args: Any) -> str | None:
    """What `ask` answers, or the error that it raises, of a variable of the environment."""
    try:
        answer: str | None = ask(*args)
    except ValueError as error:
        return str(error)
    return answer


def _backward(device: torch.device) -> str:
    """Who does the fast path's backward on a GPU."""
    why = _said(ops.cuda_obstacle, device)
    return "compiled operators" if why is None else f"Triton's kernels: {why}"


def _operators() -> dict[str, str]:
    """What the compiled library holds."""
    if (reason := _said(ops.load)) is not None:
        return {"library": f"unavailable: {reason}"}
    build = parse_cuda_build(ops.cuda_build())
    bfloat16 = {
        "none": "bfloat16 is computed in float32",
        "pairs": "bfloat16 in pairs (AVX512_BF16)",
        "matrix": "bfloat16 by matrices (AMX)",
    }[ops.cpu_bfloat16()]
    return {
        "library": str(ops.LIBRARY),
        "cpu": f"{ops.cpu_capability()} instructions, {bfloat16}",
        "cuda": str(build) if build else "none: it was built without nvcc",
    }


def _missing() -> dict[str, str]:
    """Kinds of device that are not there, and why."""
    if torch.version.cuda is None and torch.version.hip is None:
        return {"cuda": f"torch {torch.__version__} is a build without CUDA"}
    if not torch.cuda.is_available():
        return {"cuda": "torch finds no CUDA device, or no driver for it"}
    return {}


def check() -> list[dict[str, Any]]:
    """Every usable backend and dtype on every device against the float64 reference.

    Returns rows ``{"device", "backend", "dtype", "target", "value_error", "grad_cosine", "ok"}``.
    """
    truths = {kind: _step("reference", torch.float64, "cpu", kind) for kind in TARGETS}
    rows = []
    for device, state in collect()["devices"].items():
        names = ["reference", *(["fast"] if state["fast"] == "available" else [])]
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                for kind, truth in truths.items():
                    found = _step(name, dtype, device, kind)
                    rows.append(
                        {
                            "device": device,
                            "backend": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "target": kind,
                            **_compared(found, truth, dtype),
                        }
                    )
    return rows


def _step(
    backend: str, dtype: torch.dtype, device: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of a small case, as float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 19, 65, 66, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 19, 65, 66, generator=generator, dtype=torch.float64)
    x = logits.to(device=device, dtype=dtype).requires_grad_()
    target: Any = teacher.to(x)
    if kind == "labels":
        target = teacher.argmax(dim=1).to(device)
    elif kind == "topk":
        values, indices = torch.softmax(teacher, dim=1).topk(4, dim=1)
        target = gpl_fast.TopK(values.to(x), indices.to(device))
    value = gpl_fast.GenericPerceptualLoss(19, backend=backend)(x, target)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach().double().cpu(), grad.double().cpu()


def _compared(
    found: tuple[torch.Tensor, torch.Tensor],
    truth: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, Any]:
    error, cosine = measure.deviation(found, truth)
    # bfloat16 rounding picks other winners of max pooling: PyTorch itself is at 0.97 to 0.98 here.
    tolerance, least = (1e-3, 0.999) if dtype == torch.float32 else (5e-2, 0.95)
    ok = error <= tolerance and cosine >= least
    return {"value_error": error, "grad_cosine": cosine, "ok": ok}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

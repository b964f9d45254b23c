"""`gpl-fast info`: versions, devices, each backend's state and reason, a check."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import gpl_fast
from gpl_fast import backend as backends
from gpl_fast import ops
from gpl_fast.lossnet import LossNet


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
        obstacle = backends.fast_obstacle(torch.device(device), torch.float32, net)
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
        "fingerprint": net.fingerprint(),
    }


def _backward(device: torch.device) -> str:
    """Who does the fast path's backward on a GPU."""
    why = ops.cuda_obstacle(device)
    return "compiled operators" if why is None else f"Triton's kernels: {why}"


def _operators() -> dict[str, str]:
    """What the compiled library holds."""
    if (reason := ops.load()) is not None:
        return {"library": f"unavailable: {reason}"}
    build = ops.parse_cuda_build(ops.cuda_build())
    fast = ["float32", *ops.cpu_fast_dtypes().split()]
    return {
        "library": str(ops.LIBRARY),
        "cpu": f"{ops.cpu_capability()} instructions, fast in {' and '.join(fast)}",
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
    rows = []
    for device, state in collect()["devices"].items():
        names = ["reference", *(["fast"] if state["fast"] == "available" else [])]
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                for target in ("dense", "labels", "topk"):
                    rows.append(_check_one(device, name, dtype, target))
    return rows


def _check_one(device: str, name: str, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 19, 65, 66, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 19, 65, 66, generator=generator, dtype=torch.float64)
    labels = teacher.argmax(dim=1)
    topk = gpl_fast.TopK(*torch.softmax(teacher, dim=1).topk(4, dim=1))

    def run(backend: str, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        loss = gpl_fast.GenericPerceptualLoss(19, backend=backend)
        x = logits.to(device=device, dtype=dtype).requires_grad_()
        target: Any = {"dense": teacher.to(x), "labels": labels.to(device)}.get(kind)
        if kind == "topk":
            target = gpl_fast.TopK(topk.values.to(x), topk.indices.to(device))
        value = loss(x, target)
        (grad,) = torch.autograd.grad(value, x)
        return value.detach().double().cpu(), grad.double().cpu()

    value, grad = run(name, dtype, device)
    true_value, true_grad = run("reference", torch.float64, "cpu")
    error = float((value - true_value).abs() / true_value)
    cosine = float(torch.cosine_similarity(grad.flatten(), true_grad.flatten(), dim=0))
    # bfloat16 rounding picks other winners of max pooling: PyTorch itself is at 0.97 to 0.98 here.
    tolerance, least = (1e-3, 0.999) if dtype == torch.float32 else (5e-2, 0.95)
    return {
        "device": device,
        "backend": name,
        "dtype": str(dtype).removeprefix("torch."),
        "target": kind,
        "value_error": error,
        "grad_cosine": cosine,
        "ok": error <= tolerance and cosine >= least,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

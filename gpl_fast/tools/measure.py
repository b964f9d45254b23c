"""How a loss is measured: seconds of forward and backward, providers in turns; memory of one step.

`gpl-fast bench` and ``benchmarks/`` share this protocol.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpl_fast.targets import TopK
from gpl_fast.tools import resident

Loss = Callable[[Tensor, Any], Tensor]  # (logits (N, C, H, W), target) -> the value


def step(loss: Loss, logits: Tensor, target: Any) -> tuple[Tensor, ...]:
    """One forward and backward: the value and the gradient of `logits` (N, C, H, W)."""
    x = logits.detach().requires_grad_()
    value = loss(x, target)
    value.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return value.detach(), x.grad


def deviation(found: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """How far (value, gradient) are from the true ones: the value's relative error, and the cosine
    of the angle between the gradients. In float64.

    Not by torch.cosine_similarity, which takes every norm below 1e-8 for 1e-8: gradients of
    confident predictions are that small.
    """
    (value, grad), (true_value, true_grad) = ([t.double() for t in pair] for pair in (found, truth))
    cosine = (grad * true_grad).sum() / (grad.norm() * true_grad.norm())
    return float((value - true_value).abs() / true_value), float(cosine)


class Stopwatch:
    """Marks on a device's stream, or on the CPU's clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        """Now, on the stream."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Between marks; waits for the device."""
        if not self.cuda:
            return [b - a for a, b in pairwise(marks)]
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def timed_step(watch: Stopwatch, loss: Loss, logits: Tensor, target: Any) -> list[float]:
    """Seconds of forward and of backward; what they made is freed outside of them."""
    x = logits.detach().requires_grad_()
    marks = [watch.mark()]
    value = loss(x, target)
    marks.append(watch.mark())
    value.backward()  # type: ignore[no-untyped-call]
    marks.append(watch.mark())
    return watch.seconds(marks)


def interleave(
    steps: Mapping[str, Callable[[], list[float]]],
    rounds: int,
    *,
    seconds: float = 0.0,
    most: int = 40,
    warm_up: int = 1,
) -> dict[str, list[list[float]]]:
    """What each step says its parts took, in rounds A B C, A B C, …, after those of warm-up.

    Args:
        rounds: at least.
        seconds: rounds go on until they have taken this long together, so that short steps have
            more of them, but not for more than `most`.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(warm_up):
        for once in steps.values():
            once()
    made, end = 0, time.perf_counter() + seconds
    while made < rounds or (made < most and time.perf_counter() < end):
        for name, once in steps.items():
            found[name].append(once())
        made += 1
    return found


def summary(
    parts: Mapping[str, Sequence[Sequence[float]]], baseline: str
) -> dict[str, dict[str, Any]]:
    """Of each provider: rounds, median, 20th and 80th percentile of a step's seconds, medians of
    its forward and backward, and the speedup.

    The speedup is the baseline's shortest step over the provider's, as load on the machine makes
    steps longer, not all to the same degree, and never shorter; above 1 is faster. None without the
    baseline.
    """
    out: dict[str, dict[str, Any]] = {}
    whole = {name: [sum(step) for step in steps] for name, steps in parts.items()}
    for name, samples in whole.items():
        several = samples if len(samples) > 1 else 2 * samples
        low, _, _, high = statistics.quantiles(several, n=5, method="inclusive")
        speedup = None
        if baseline in whole:
            speedup = min(whole[baseline]) / min(samples)
        halves = [statistics.median(half) for half in zip(*parts[name], strict=True)]
        forward, backward = halves if len(halves) == 2 else (None, None)
        out[name] = {
            "rounds": len(samples),
            "seconds_median": statistics.median(samples),
            "seconds_p20": low,
            "seconds_p80": high,
            "forward_seconds": forward,
            "backward_seconds": backward,
            "speedup": speedup,
        }
    return out


def keep_pages(mapped: int = 0) -> bool:
    """Let glibc's allocator give nothing back to the system from here on, and have `mapped` bytes
    at once; False where that cannot be said.

    By default it unmaps what large tensors leave, and the next ones pay for page faults, as much as
    the system happens to ask.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    kept = bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))
    if kept and mapped:
        torch.empty(mapped, dtype=torch.uint8).zero_()
    return kept


def memory(
    loss: Loss, logits: Tensor, target: Any, weights: Callable[[], list[Tensor]]
) -> tuple[float | None, int]:
    """Of one step: MiB that it adds at its highest, the gradient included, and bytes that autograd
    keeps from forward to backward besides logits, target and `weights`, each storage once.

    The peak is PyTorch's allocator's on a GPU; on the CPU it is the resident set's high-water mark,
    for which nothing else should have run in the process: see `in_fresh_process`. None where the
    system does not tell.
    """
    kept: dict[int, int] = {}  # bytes by storage; while autograd keeps one, no other is there

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t

    before = resident.reset_peak(logits.is_cuda)
    x = logits.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(x, target)
    for t in (x, *target_tensors(target), *weights()):
        kept.pop(t.untyped_storage()._cdata, None)
    value.backward()  # type: ignore[no-untyped-call]
    after = (
        torch.cuda.max_memory_allocated() / 2**20
        if logits.is_cuda
        else resident.resident_mib("VmHWM")
    )
    peak = None if before is None or after is None else max(after - before, 0.0)
    return peak, sum(kept.values())


def target_tensors(target: Any) -> tuple[Tensor, ...]:
    """The tensors that a target consists of."""
    return (target.values, target.indices) if isinstance(target, TopK) else (target,)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a process that has imported torch and done nothing else.

    Raises:
        RuntimeError: the process ended without a result.
    """
    methods = multiprocessing.get_all_start_methods()
    # A fork of a process that holds nothing but its imports: those take seconds.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch", __name__])
        _start_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{function.__name__}: its process ended with {process.exitcode}"
        ) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()


def _start_server() -> None:
    """Ctrl-C reaches every process of a terminal: the one that asked answers, in one line."""
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        return  # where signals are not handled; the server starts by itself
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _send(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    found = function(*args)
    try:
        sender.send(found)
    except BrokenPipeError:  # the one that asked is gone
        os._exit(0)

"""The recipe of docs/gpu.md for a CUDA graph, as it stands there, and a graph of the CPU's.

The CPU's keeps each operator with its tensors while it captures, and replays these into the memory
that they had: what a recipe copies, makes anew or forgets shows as it would on a GPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def capture() -> Callable[..., Any]:
    """`capture` of the page."""
    (code,) = re.findall(r"```python\n(import torch\n.*?def capture.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["capture"]


def scaled_backward(out: Tensor, gradient: Tensor, scaler: Any) -> None:
    """The page's line for a `GradScaler`."""
    (code,) = re.findall(r"With a `GradScaler`: `(.*?)`", PAGE.read_text())
    exec(code, {"out": out, "gradient": gradient, "scaler": scaler})


class Graph:
    """Of the CPU."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def replay(self) -> None:
        """Each operator again, into the memory of its results."""
        with torch.no_grad():
            for func, args, kwargs, outs in self.kept:
                made = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for old, new in zip(outs, made, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.graph.kept.append((func, args, kwargs or {}, outs))
        return out


@contextlib.contextmanager
def on_the_cpu(said: list[str]) -> Iterator[None]:
    """`torch.cuda` has such graphs, and streams that say what they are asked for."""

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(on: Stream) -> Iterator[None]:
        said.append(f"on {on.name}")
        yield
        said.append("off")

    @contextlib.contextmanager
    def graph(of: Graph) -> Iterator[None]:
        said.append("capture")
        with _Recording(of):
            yield

    put = SimpleNamespace(
        Stream=Stream, stream=stream, current_stream=lambda: Stream("current"), CUDAGraph=Graph,
        graph=graph,
    )  # fmt: skip
    before = {name: getattr(torch.cuda, name) for name in vars(put)}
    for name, value in vars(put).items():
        setattr(torch.cuda, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.cuda, name, value)

"""Copies of weights, made once on a CUDA device and read from then on by any stream and graph.

They outlive the call that made them, its stream and its graph, and no user can see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._guards import active_fake_mode


@contextmanager
def made_once(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Around what makes them: afterwards they are there for every stream.

    Raises:
        RuntimeError: a CUDA graph is being captured. They would lie in its memory pool, which later
            captures and replays overwrite, and hold nothing before its first replay.
    """
    if device.type != "cuda" or active_fake_mode() is not None:
        yield
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured, but the loss' weights are not on {device} as "
                f"{dtype} yet: run the loss once before the capture (on a side stream, as "
                "torch.cuda.graph wants it), with the same kind of target, dtype and autocast"
            )
        yield
        torch.cuda.current_stream().synchronize()


def read_here(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors. Their memory is not used again, once they are freed, before the current
    stream has read them: the allocator knows of the stream only that made them."""
    if tensors and tensors[0].is_cuda and active_fake_mode() is None:
        stream = torch.cuda.current_stream(tensors[0].device)
        for t in tensors:
            t.record_stream(stream)
    return tensors


class Copies:
    """Tensors by name, which nobody writes to."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._readers: set[torch.cuda.Stream] = set()

    def read_here(self) -> dict[str, Tensor]:
        """All of them, as `read_here`: what the allocator knows of a stream it keeps until it has
        them back."""
        first = next(iter(self.tensors.values()), None)
        if first is not None and first.is_cuda and active_fake_mode() is None:
            stream = torch.cuda.current_stream(first.device)
            if stream not in self._readers:
                read_here(list(self.tensors.values()))
                self._readers.add(stream)
        return self.tensors

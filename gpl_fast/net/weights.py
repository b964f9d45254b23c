"""The weights of networks, in each dtype, on each device and in each layout that is read: made once
a process.

Networks of one key have the same structure and the same weights, so they share what is made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from gpl_fast import streams
from gpl_fast.net.steps import Chain


@dataclass(frozen=True)
class Layout:
    """Which packs the fast path reads of a chain, where, and in which dtype."""

    device: torch.device
    dtype: torch.dtype
    looked_up: bool  # the target comes as labels or lists: its first layer is a look-up
    blocks: bool  # one kernel does a whole step of the forward
    backward: tuple[str, ...]  # convolutions whose data gradient one kernel makes


def padded_channels(channels: int) -> int:
    """Channels of the maps in memory: oneDNN's and the GPU's kernels want round numbers."""
    return -(-channels // 32) * 32 if channels > 8 else 8


def rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`; in half precision the rounding error of a kernel's tap goes on to its
    next tap, so that their sum, which is all that flat regions see of them, is off by one error at
    most instead of by all of theirs (docs/numerics.md)."""
    if w.dim() != 4 or torch.finfo(dtype).bits >= torch.finfo(w.dtype).bits:
        return w.to(dtype)
    taps, out = w.flatten(2), torch.empty_like(w.flatten(2), dtype=dtype)
    error = torch.zeros_like(taps[..., 0])
    for i in range(taps.shape[2]):
        wanted = taps[..., i] + error
        out[..., i] = wanted
        error = wanted - out[..., i].float()
    return out.view_as(w)


def pack_weights(weights: Mapping[str, Tensor], chain: Chain, layout: Layout) -> dict[str, Tensor]:
    """A chain's weights as the walks read them, by name.

    ``w.*`` (C_out, C_in, K, K) channels_last, the first one's C_in padded; where one kernel does a
    whole step ``block.*`` (K² C_in, C_out) of the same; where one makes the data gradient
    ``bwd.*`` (K², C_out, C_in), taps flipped, padded to 64 and 8; ``b.*``, ``mean``, ``std`` in
    float32; the look-up tables of label and top-k targets: ``table`` (K², C, C_out), ``interior``
    (C, C_out) its sum over taps, ``rest_table`` (K², C_out) its sum over classes.

    Args:
        weights: by layer, float32, on the CPU: (C_out, C_in, K, K), biases (C_out,).
    """
    device, dtype = layout.device, layout.dtype
    first = "adapter" if chain.adapter else "" if chain.front else chain.steps[0].conv
    packs: dict[str, Tensor] = {}
    for name, held in weights.items():
        if name.endswith(".bias"):
            packs[f"b.{name.removesuffix('.bias')}"] = held.to(device)
            continue
        backward = w = rounded(held, dtype).to(device)
        if name in (first, "adapter"):
            extra = padded_channels(w.shape[1]) - w.shape[1]
            w = torch.nn.functional.pad(w, (0, 0, 0, 0, 0, extra))
        packs[f"w.{name}"] = w.contiguous(memory_format=torch.channels_last)
        if layout.blocks:
            packs[f"block.{name}"] = w.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        if name in layout.backward:
            packed = backward.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
            to_full = (0, -backward.shape[1] % 8, 0, -backward.shape[0] % 64)
            packs[f"bwd.{name}"] = torch.nn.functional.pad(packed, to_full).contiguous()
    for name, numbers in (("mean", chain.mean), ("std", chain.std)):
        if numbers is not None:
            packs[name] = torch.tensor(numbers, dtype=torch.float32, device=device)
    return packs | (_tables(weights, chain, layout) if layout.looked_up else {})


def _tables(weights: Mapping[str, Tensor], chain: Chain, layout: Layout) -> dict[str, Tensor]:
    if chain.adapter:
        table = rounded(weights["adapter"], layout.dtype)[:, :, 0, 0].t().unsqueeze(0)
    elif chain.front:
        table = torch.eye(chain.in_channels, device="cpu").unsqueeze(0)
    else:
        first = rounded(weights[chain.steps[0].conv], layout.dtype)
        table = first.permute(2, 3, 1, 0).flatten(0, 1)
    # The rounded rows, and sums of them: z must be the convolution by the weights that δ sees.
    table = table.to(layout.device, layout.dtype).contiguous()
    exact = table.float()
    return {"table": table, "interior": exact.sum(dim=0), "rest_table": exact.sum(dim=1)}


class Weights:
    """The weights of all networks of one key: float32 on the CPU, and what is made of them.

    Nobody writes to any of these tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], chain: Chain | str) -> None:
        self.tensors, self.chain = dict(tensors), chain
        self._casts: dict[tuple[torch.device, torch.dtype], streams.Copies] = {}
        self._packs: dict[Layout, streams.Copies] = {}

    def cast(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights by layer on `device` in `dtype`, made once.

        Raises:
            RuntimeError: they are not there yet, and a CUDA graph is being captured.
        """
        key = (device, dtype)
        if key not in self._casts:
            with torch.inference_mode(False), torch.no_grad(), streams.made_once(device, dtype):
                made = {name: rounded(w, dtype).to(device) for name, w in self.tensors.items()}
            for t in made.values():  # constants of a graph, whatever is dynamic in it
                t._dynamo_static_indices = set(range(t.dim()))  # type: ignore[attr-defined]
            if active_fake_mode() is not None:  # fake tensors must not outlive it
                return made
            # Of two threads, what the first has made.
            self._casts.setdefault(key, streams.Copies(made))
        return self._casts[key].read_here()

    def packs(self, layout: Layout) -> dict[str, Tensor]:
        """What `pack_weights` makes of them, made once.

        Raises:
            RuntimeError: these are no chain's, or as `cast`.
        """
        if layout not in self._packs:
            if isinstance(self.chain, str):
                raise RuntimeError(self.chain)
            made_once = streams.made_once(layout.device, layout.dtype)
            with torch.inference_mode(False), torch.no_grad(), made_once:
                made = pack_weights(self.tensors, self.chain, layout)
            if active_fake_mode() is not None:
                return made
            self._packs.setdefault(layout, streams.Copies(made))
        held = self._packs[layout]
        return held.read_here() if layout.device.type == "cuda" else held.tensors

    def cached_tensors(self) -> list[Tensor]:
        """All that was made of them, on any device."""
        made = (*self._casts.values(), *self._packs.values())
        return [t for copies in made for t in copies.tensors.values()]


_alive: WeakValueDictionary[str, Weights] = WeakValueDictionary()
_lock = threading.Lock()


def shared_weights(key: str, tensors: Mapping[str, Tensor], chain: Chain | str) -> Weights:
    """The weights of `key`; made of `tensors`, which are kept, where no network has them yet."""
    with _lock:
        found = _alive.get(key)
        if found is None:
            found = _alive[key] = Weights(tensors, chain)
        return found


def of(key: str) -> Weights:
    """The weights of the networks whose `LossNet.identity` is `key`.

    Raises:
        RuntimeError: there is no such network in this process.
    """
    found = _alive.get(key)
    if found is None:
        raise RuntimeError(
            f"gpl_fast: the network {key[:12]}… is not in this process: a compiled or exported "
            "program holds no weights; build the loss that it was made of before it runs (the same "
            "arguments, or LossNet.load), and keep it"
        )
    return found

"""Weights as the walks read them."""

from __future__ import annotations

import torch
from torch import Tensor

from gpl_fast.chain import data_gradient
from gpl_fast.chain.stages import has_blocks
from gpl_fast.net.lossnet import LossNet
from gpl_fast.plan import padded_channels


def pack_names(
    net: LossNet, device: torch.device, dtype: torch.dtype, looked_up: bool
) -> tuple[str, ...]:
    """Names of what `pack_weights` returns, in order."""
    names = []
    for name in net.weight_names:
        if name.endswith(".bias"):
            names.append(f"b.{name.removesuffix('.bias')}")
            continue
        names.append(f"w.{name}")
        if has_blocks(device):
            names.append(f"block.{name}")
        if _backward_by_kernel(net, name, device, dtype):
            names.append(f"bwd.{name}")
    names += ["mean", "std"] if net.mean is not None else []
    return (*names, "table", "interior", "rest_table") if looked_up else tuple(names)


def _backward_by_kernel(net: LossNet, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "adapter":
        return False
    layers = [layer for layer in net.layers if layer.kind in ("conv", "down")]
    layer = next(layer for layer in layers if layer.name == name)
    first = layer is layers[0] and "adapter" not in net.weight_names and net.mean is None
    stride = 2 if layer.kind == "down" else 1
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    return data_gradient.by_kernel(device, dtype, first, *sizes, stride)


def pack_weights(
    net: LossNet, device: torch.device, dtype: torch.dtype, looked_up: bool
) -> list[Tensor]:
    """Weights as the walks read them, by `pack_names`.

    ``w.*`` (C_out, C_in, K, K) channels_last, the first one's C_in padded; where one kernel does a
    whole step ``block.*`` (K² C_in, C_out) of the same; where one makes the data gradient
    ``bwd.*`` (K², C_out, C_in), taps flipped, padded to 64 and 8; ``b.*``, ``mean``, ``std`` in
    float32; the look-up tables of label and top-k targets: ``table`` (K², C, C_out), ``interior``
    (C, C_out) its sum over taps, ``rest_table`` (K², C_out) its sum over classes.
    """
    weights = net.weights_on(device, dtype)
    exact = net.weights_on(device, torch.float32)
    front = "adapter" in weights or net.mean is not None
    first = next(layer.name for layer in net.layers if layer.kind == "conv")
    packs: list[Tensor] = []
    for name, w in weights.items():
        if name.endswith(".bias"):
            packs.append(exact[name])
            continue
        backward = w
        if name == "adapter" or (name == first and not front):
            extra = padded_channels(w.shape[1]) - w.shape[1]
            w = torch.nn.functional.pad(w, (0, 0, 0, 0, 0, extra))
        packs.append(w.contiguous(memory_format=torch.channels_last))
        if has_blocks(device):
            packs.append(w.permute(2, 3, 1, 0).flatten(0, 2).contiguous())
        if _backward_by_kernel(net, name, device, dtype):
            packed = backward.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
            to_full = (0, -backward.shape[1] % 8, 0, -backward.shape[0] % 64)
            packs.append(torch.nn.functional.pad(packed, to_full).contiguous())
    packs += [
        torch.tensor(v, dtype=torch.float32, device=device)
        for v in (net.mean, net.std)
        if v is not None
    ]
    if looked_up:
        if front:
            rows = weights["adapter"][:, :, 0, 0] if "adapter" in weights else None
            eye = torch.eye(net.in_channels, dtype=torch.float32, device=device)
            table = (eye if rows is None else rows.t()).unsqueeze(0)
        else:
            table = weights[first].permute(2, 3, 1, 0).flatten(0, 1)
        # The rounded rows, and sums of them: z must be the convolution by the weights that δ sees.
        table = table.to(dtype).contiguous()
        packs += [table, table.float().sum(dim=0), table.float().sum(dim=1)]
    return packs

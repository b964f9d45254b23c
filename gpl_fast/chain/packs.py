"""Weights as the walks read them: which layout a network's packs have on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from gpl_fast.chain import data_gradient
from gpl_fast.chain.stages import has_blocks
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net import weights
from gpl_fast.net.lossnet import LossNet
from gpl_fast.net.steps import Chain
from gpl_fast.net.weights import Layout


def pack_names(
    net: LossNet, device: torch.device, dtype: torch.dtype, looked_up: bool
) -> tuple[str, ...]:
    """Names of what `pack_weights` returns, in order."""
    return _names(net.identity, device, dtype, looked_up)


def pack_weights(
    net: LossNet, device: torch.device, dtype: torch.dtype, looked_up: bool
) -> list[Tensor]:
    """Weights as the walks read them, by `pack_names`."""
    return _packs(net.identity, device, dtype, looked_up)


@constant_in_graphs
def _names(key: str, device: torch.device, dtype: torch.dtype, looked_up: bool) -> tuple[str, ...]:
    return tuple(_by_name(key, device, dtype, looked_up))


@constant_in_graphs
def _packs(key: str, device: torch.device, dtype: torch.dtype, looked_up: bool) -> list[Tensor]:
    return list(_by_name(key, device, dtype, looked_up).values())


def _by_name(
    key: str, device: torch.device, dtype: torch.dtype, looked_up: bool
) -> dict[str, Tensor]:
    held = weights.of(key)
    chain = held.chain
    assert isinstance(chain, Chain)
    backward = tuple(
        step.conv
        for i, step in enumerate(chain.steps)
        if data_gradient.by_kernel(
            device, dtype, i == 0 and not chain.front,
            step.in_channels, step.out_channels, step.kernel_size, step.stride,
        )
    )  # fmt: skip
    return held.packs(Layout(device, dtype, looked_up, has_blocks(device), backward))

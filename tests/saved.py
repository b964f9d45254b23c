"""The fast path's saved tensors, read and made by plain PyTorch (docs/math.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpl_fast import reference
from gpl_fast.fast import operator
from gpl_fast.fast.call import read
from gpl_fast.fast.plan import Plan
from gpl_fast.net.lossnet import LossNet

NODE = "_PerceptualTermsBackward"


def fast_node(value: Tensor):
    """The fast path's node in the graph of `value`."""
    queue = [value.grad_fn]
    for node in queue:
        if node.name().startswith(NODE):
            return node
        queue += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError(f"no {NODE} in the graph")


def left_by(value: Tensor) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of the call that made `value` and what it saved, by the contract's names."""
    node = fast_node(value)
    x, *rest = node.saved_tensors
    plan = operator._plan(read(node.call), x)
    saved = rest[len(rest) - len(plan.contract) :]
    return plan, dict(zip(plan.contract, saved, strict=True))


def log_sum_exp(x: Tensor, temperature: float = 1.0) -> Tensor:
    """`lse`, (N, C, H, W) -> (N, H, W) float64: max + T log Σ e^((x − max) / T), in x's units."""
    x = x.double()
    shift = x.amax(dim=1, keepdim=True)
    log_sum = ((x - shift) / temperature).logsumexp(dim=1, keepdim=True)
    return (shift + temperature * log_sum).squeeze(1)


# --------------------------------------------------------------------------------- packed arrays


def unpack_code(code: Tensor, channels: int) -> Tensor:
    """(N, h, w, ceil(C / 2)) -> (N, C, h, w): winner 0..3, 4 = none positive."""
    pairs = torch.stack([code & 15, code >> 4], dim=-1).flatten(-2)
    return pairs[..., :channels].permute(0, 3, 1, 2).long()


def pack_code(winner: Tensor) -> Tensor:
    """The inverse; half a byte without a channel is 0."""
    nhwc = F.pad(winner.permute(0, 2, 3, 1), (0, winner.shape[1] % 2)).to(torch.uint8)
    return nhwc[..., ::2] | nhwc[..., 1::2] << 4


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """(N, H, W, ceil(C / 8)) -> (N, C, H, W) bool."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8)) & 1
    return bits.flatten(-2)[..., :channels].permute(0, 3, 1, 2).bool()


def pack_mask(positive: Tensor) -> Tensor:
    """The inverse; bits without a channel are 0."""
    nhwc = F.pad(positive.permute(0, 2, 3, 1), (0, -positive.shape[1] % 8)).to(torch.uint8)
    bits = nhwc.unflatten(-1, (-1, 8)) << torch.arange(8)
    return bits.sum(dim=-1).to(torch.uint8)


def windows(z: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H // 2, W // 2, 4): the pooling windows in row-major order."""
    h, w = z.shape[2] // 2, z.shape[3] // 2
    cut = z[:, :, : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2))
    return cut.transpose(3, 4).flatten(4)


def winners(z: Tensor) -> Tensor:
    """Code of each window by PyTorch's own pooling; 4 where nothing is positive."""
    top, at = F.max_pool2d(z, 2, return_indices=True)
    rows, columns = at // z.shape[3] % 2, at % z.shape[3] % 2
    return torch.where(top > 0, 2 * rows + columns, 4)


# ------------------------------------------------------------------------------------ the network


@dataclass
class Walk:
    """The network by definition, in the dtype of what comes in.

    With `saved`, values are the definition's but gradients go through the windows' winners and the
    signs that were saved; `slack` is then how far a saved route's value is from the definition's,
    relative to the layer: rounding may swap two values that are equal but for rounding, no others.
    """

    plan: Plan
    net: LossNet
    saved: dict[str, Tensor] | None = None
    slack: float = 0.0
    made: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, y: Tensor) -> dict[str, Tensor]:
        """Outputs of the tapped layers; codes and masks by definition go to `made`."""
        out = {}
        for step in self.plan.steps:
            w = self.net.weights[step.conv].to(y.dtype)
            bias = self.net.weights.get(f"{step.conv}.bias")
            bias = None if bias is None else bias.to(y.dtype)
            z = F.conv2d(y, w, bias, step.stride, padding=step.kernel_size // 2)
            out[step.conv] = y = z
            if step.relu:
                out[step.relu] = y = self._relu(step, z)
            if step.pool_kind == "max":
                out[step.pool] = y = self._max_pool(step, z)
            elif step.pool:
                out[step.pool] = y = F.avg_pool2d(y, 2)
        return {tap: out[tap] for tap in self.plan.call.taps}

    def _relu(self, step, z: Tensor) -> Tensor:
        if self.plan.needs_mask(step):
            name = f"mask.{step.relu}"
            self.made[name] = pack_mask(z > 0)
            if self.saved is not None:
                return self._route(z.relu(), z * unpack_mask(self.saved[name], z.shape[1]), z)
        return z.relu()

    def _max_pool(self, step, z: Tensor) -> Tensor:
        name = f"code.{step.pool}"
        self.made[name] = pack_code(winners(z))
        y = F.max_pool2d(z.relu(), 2)
        if self.saved is None:
            return y
        code = unpack_code(self.saved[name], z.shape[1])
        won = windows(z).gather(4, code.clamp(max=3).unsqueeze(4)).squeeze(4)
        return self._route(y, won * (code < 4), z)

    def _route(self, y: Tensor, routed: Tensor, z: Tensor) -> Tensor:
        if y.numel():
            scale = float(z.detach().abs().max().clamp(min=1e-300))
            self.slack = max(self.slack, float((y - routed).detach().abs().max()) / scale)
        return routed + (y - routed).detach()


def network_input(plan: Plan, net: LossNet, x: Tensor, valid: Tensor | None) -> Tensor:
    """y' as it enters the first convolution."""
    y = reference.prediction_map(x, plan.call.activation, plan.call.temperature, valid)
    return net.network_input(y, valid)


def terms(
    plan: Plan, e_pred: dict[str, Tensor], e_target: dict[str, Tensor], channels: Any = None
) -> Tensor:
    """Feature and style distances of each image together, (N,); `e_target` may hold one image."""
    value, distance, channels = 0.0, plan.call.distance, channels or {}
    for tap, weight in plan.call.features:
        value = value + weight * reference.feature_distance(
            e_pred[tap], e_target[tap], distance, channels.get(tap)
        )
    for tap, weight in plan.call.styles:
        value = value + weight * reference.style_distance(e_pred[tap], e_target[tap], distance)
    return value

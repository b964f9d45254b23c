"""Which branch the walk carries beside the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.fast.call import Call
from gpl_fast.fast.grid import grid_bytes, grid_steps
from gpl_fast.fast.look_up import of_list, one_hot
from gpl_fast.stages import ACTIVATIONS, TritonStages

LOOKED_AT = ("valid", "dense", "elements", "labels", "topk_values", "topk_indices", "topk_rest")
# |δ|² / |y|² up to which prediction and target count as near.
NEAR = 1 / 32


def carried(
    call: Call,
    x: Tensor,
    target: Mapping[str, Tensor],
    room: int,
    stages: TritonStages | None = None,
) -> Tensor:
    """`carry_target` of all images, (N,): by the stage, or by many small operators once for as many
    images as `room`, in bytes, has place for."""
    n, _, h, w = x.shape
    if not call.branches:
        return x.new_zeros(n, dtype=torch.bool)
    if stages is not None:
        from_target = x.new_empty(n, dtype=torch.bool)
        stages.carry_target_fwd(
            x,
            activation=ACTIVATIONS[call.activation],
            target_activation=ACTIVATIONS[call.target_activation],
            temperature=call.temperature,
            step=grid_steps(h, w),
            near=NEAR,
            from_target=from_target,
            **{name: target[name] for name in LOOKED_AT if name in target},
        )
        return from_target
    step = max(1, room // max(1, grid_bytes(call, h, w)))
    parts = [
        carry_target(call, x, target, slice(n0, n0 + step))
        for n0 in range(0, max(x.shape[0], 1), step)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def carry_target(call: Call, x: Tensor, target: Mapping[str, Tensor], images: slice) -> Tensor:
    """(n,) bool: True = the walk carries (y, δ), False = (y', δ), with δ = y' − y.

    Both say the same but for rounding, which is relative to what is carried: winners and signs of
    the prediction are surest where it is carried itself. But where it is near a target that is
    constant in regions, the target's ties decide what δ becomes in a pool, and rounding y' would
    break them (docs/numerics.md). That is looked for on a grid of each image.

    Args:
        x: (N, C, H, W) prediction.
        target: as `Chunk`.
        images: of `x`.
    """
    x = x[images]
    n, c, h, w = x.shape
    if x.numel() == 0:
        return torch.zeros(n, dtype=torch.bool, device=x.device)
    rows, columns = (
        torch.arange(0, size, step, device=x.device)
        for size, step in zip((h, w), grid_steps(h, w), strict=True)
    )

    def grid(name: str, right: int = 0) -> Tensor | None:
        t = target.get(name)
        if t is None:
            return None
        # Nearest pixels of a dense target of another size.
        i = ((rows + 0.5) * (t.shape[-2] / h)).long()
        j = ((columns + 0.5) * (t.shape[-1] / w)).long() + right
        return t[images][..., i.unsqueeze(1), j.clamp(max=t.shape[-1] - 1)]

    valid = grid("valid")
    y_pred = reference.prediction_map(
        x[..., rows.unsqueeze(1), columns].float(), call.activation, call.temperature, valid
    )
    y = reference.zero_invalid(_map(call, grid, c), valid)
    elements = grid("elements")
    if elements is not None:
        y_pred, y = (reference.zero_ignored(t, elements) for t in (y_pred, y))
    difference, size = ((t.square().sum(dim=(1, 2, 3))) for t in (y_pred - y, y))
    equal = torch.ones_like(rows.unsqueeze(1) * columns, dtype=torch.bool).expand(n, -1, -1)
    for name in ("labels", "topk_values", "topk_indices", "dense"):
        here, beside = grid(name), grid(name, right=1)
        if here is not None and beside is not None:
            same = here == beside
            equal = equal & (same if name == "labels" else same.all(dim=1))
    constant = equal.float().mean(dim=(1, 2)) > 0.5
    return constant & (difference < NEAR * size)


def _map(call: Call, grid: Callable[[str], Tensor | None], channels: int) -> Tensor:
    """The target on the grid, (n, C, rows, columns) float32."""
    labels, values, indices = grid("labels"), grid("topk_values"), grid("topk_indices")
    if labels is not None:
        return one_hot(labels, channels)
    if values is not None:
        assert indices is not None
        return of_list(values, indices, grid("topk_rest"), channels)
    dense = grid("dense")
    assert dense is not None
    if dense.dtype == torch.uint8:
        return reference.multi_hot(dense, torch.float32)
    # A target that alone is taken as it is has no temperature.
    as_it_is = call.target_activation == "none" != call.activation
    temperature = 1.0 if as_it_is else call.temperature
    return reference.activate(dense.float(), call.target_activation, temperature)

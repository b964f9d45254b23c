"""Who computes each step of a plan, in words: the functions of `Plan.how`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import Way


class Runs(NamedTuple):
    """The functions that run a step, forward and backward."""

    step: str
    forward: str
    backward: str


def who_runs(plan: Plan) -> list[Runs]:
    """Of the logits first, then of each step up to the last tap."""
    return [_logits(plan), *(_step(plan, i) for i in range(len(plan.steps)))]


_PLACES = {("compiled", "cpu"): "csrc/cpu", ("compiled", "cuda"): "csrc/cuda"}


def _place(plan: Plan, half: str) -> str:
    """Where the stages of a half are."""
    return _place_of(plan, getattr(plan.policy, half))


def _place_of(plan: Plan, implementation: str) -> str:
    return _PLACES.get((implementation, plan.policy.device), "Triton")


def _logits(plan: Plan) -> Runs:
    forward = [f"softmax_pack_fwd ({_place(plan, 'forward')})"]
    softmax_bwd = plan.policy.softmax_bwd(plan.call.chain.in_channels)
    backward = [f"softmax_bwd ({_place_of(plan, softmax_bwd)})"]
    if plan.call.branches and not plan.on_cpu:
        forward.insert(0, f"carry_target_fwd ({_place(plan, 'forward')})")
    if plan.call.front:
        forward.append("adapter, mean, std (ATen)")
        backward.insert(0, "adapter, std (ATen)")
        if plan.call.looked_up:
            forward.insert(-1, _look_up(plan))
    elif plan.how[0].block_bwd:
        backward = []
    if plan.call.binary:
        backward.append(f"binary_ce_bwd ({_place(plan, 'backward')})")
        if plan.call.cross_entropy:
            forward.append(f"binary_ce_fwd ({_place(plan, 'forward')})")
    if plan.call.encode:
        backward = []
    return Runs("logits", ", ".join(forward), ", ".join(backward))


def _look_up(plan: Plan) -> str:
    name = "label_conv_fwd" if plan.call.kind == "labels" else "topk_conv_fwd"
    return f"{name} ({_place(plan, 'forward')})"


def _step(plan: Plan, i: int) -> Runs:
    step, how = plan.steps[i], plan.how[i]
    there, back = _place(plan, "forward"), _place(plan, "backward")
    if how.block:
        tf32 = how.prediction.dtype == torch.float32
        forward = [f"conv_block_fwd ({there}, {'TF32' if tf32 else _dtype(how.prediction)})"]
    else:
        forward = [_convolution(how.prediction)]
        if i == 0 and plan.call.looked_up and not plan.call.front:  # of u alone
            forward.append(_look_up(plan))
        elif not plan.call.plain and how.difference != how.prediction:
            forward = [f"{forward[0]} of y', {_convolution(how.difference)} of δ"]
        form = "fwd" if plan.call.plain else "diff_fwd"
        if step.relu and (not step.pool or step.relu in plan.call.taps):
            forward.append(f"relu_{form} ({there})")
        if step.pool:
            forward.append(f"relu_pool_{form} ({there})")
    by_block = how.block and bool(step.pool) and not plan.call.plain
    tapped = {step.conv, step.relu, step.pool} & {tap for tap, _ in plan.call.features}
    if tapped & plan.call.normalized:
        forward.append(f"unit_diff_fwd ({there})")
    elif not all(by_block and tap in plan.call.squared for tap in tapped):
        forward.append(f"diff_reduce_fwd ({there})")
    if plan.call.encode:
        return Runs(step.conv, ", ".join(forward), "")
    if how.block_bwd:
        whole = "conv_block_bwd" if i or plan.call.front else "conv_block_logits_bwd"
        return Runs(step.conv, ", ".join(forward), f"{whole} ({back})")
    backward = [_convolution(how.gradient)]
    if step.pool:
        backward.insert(0, f"relu_pool_bwd ({back})")
    elif step.relu:
        backward.insert(0, f"relu_bwd ({back})")
    return Runs(step.conv, ", ".join(forward), ", ".join(backward))


def _convolution(way: Way) -> str:
    if way.tile > 1:
        return f"winograd {way.tile} x {way.tile} (csrc/cpu, {_dtype(way)})"
    if way.tile == 1:
        return f"direct_conv (csrc/cpu, {_dtype(way)})"
    return f"convolution (ATen, {_dtype(way)})"


def _dtype(way: Way) -> str:
    return str(way.dtype).removeprefix("torch.")

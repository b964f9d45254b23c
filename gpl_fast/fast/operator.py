"""Two operators, and the autograd Function around them.

Saved between forward and backward (docs/math.md, section 4; `Geometry.saved` gives the shapes):

=========== ======================================= ============= ==================================
``x``       (N, C, H, W), the caller's own          caller's      softmax / sigmoid backward
``lse``     (N, H, W)                               float32       softmax backward recomputes y'
``code.b``  (N, H_b, W_b, ceil(C_b / 2)), 4 bits    uint8         max pool + ReLU backward
``mask.b``  (N, H, W, ceil(C / 8)), 1 bit           uint8         ReLU backward without a max pool
``diff.b``  (N, H_b, W_b, C_b)                      compute dtype seed of eq. (2): δ, or what the
                                                    (*)           criterion makes of it
``phi.t``   style taps: (N, H_t, W_t, C_t)          compute dtype Gram gradient
``gram.t``  style taps: G' − G, (N, C_t, C_t)       float32       Gram gradient
``ce_lse``  cross-entropy: (N, H, W)                float32       where its temperature differs
``labels``  cross-entropy: (N, H, W)                int16 / 32    cross-entropy's gradient
``valid``   (N, H, W)                               bool, float32 where pixels do not count, or
                                                                  have weights
``ce_mask`` cross-entropy: (N, H, W)                float32       weights, where not ``valid``'s
``multi…``  labels of elements: (N, C, H, W)        uint8         binary cross-entropy's gradient
=========== ======================================= ============= ==================================

(*) Of normalised features float32 in a float16 chain: it grows as one over their norm.

``lse`` is max + T log Σ e^((x − max) / T), in the logits' own units; y' = e^((x − lse) / T) over
its sum. The weights are constants behind the network's key, and no tensors of the operators.

Both walks are one operator each, opaque to torch.compile: they loop over chunks that are chosen
from the shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpl_fast import distance as distances
from gpl_fast import reference
from gpl_fast.fast import policy
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.call import Call, kept_of, read
from gpl_fast.fast.forward import Forward
from gpl_fast.fast.geometry import Geometry
from gpl_fast.fast.logits import empty_gradient
from gpl_fast.fast.plan import Plan, plan_of
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net import weights
from gpl_fast.precision import tf32_allowed

_LIBRARY: Any = torch.library.Library("gpl_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "perceptual_fwd(Tensor x, Tensor[] target, str call, bool keep) -> (Tensor, Tensor[])"
)
_LIBRARY.define(
    "perceptual_bwd(Tensor x, Tensor[] target, Tensor[] saved, Tensor g, str call) -> Tensor"
)


def perceptual_terms(
    x: Tensor, target: Mapping[str, Tensor], call: str, cross_entropy: bool
) -> Tensor:
    """(4, N) float32: feature term, style term, Σ of the pixels' cross-entropy, Σ of its weights.

    Of `Call.spatial` instead the distance of each pixel at each tap, its weight and mean over
    channels left to the caller: (N, Σ H_b W_b) float32, tap by tap.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, any strides.
        target: as `chunk.Chunk`, in the order of `Call.tensors`.
        call: of `describe`.
        cross_entropy: the word in it.

    Raises:
        NotImplementedError: inside a transform of `torch.func`, or forward-mode differentiation.
    """
    refuse_transforms(x)
    if torch.is_grad_enabled() and x.requires_grad:
        kept = kept_of(tuple(target), cross_entropy)
        terms: Tensor = _PerceptualTerms.apply(  # type: ignore[no-untyped-call]
            x, call, kept, *target.values()
        )
        return terms
    out: Tensor = torch.ops.gpl_fast.perceptual_fwd(x, list(target.values()), call, False)[0]
    return out


def encode(x: Tensor, target: Mapping[str, Tensor], call: str) -> list[Tensor]:
    """φ(target) at `Call.taps`, (N, C_b, H_b, W_b) each: the walk in its plain form.

    Args:
        x: (N, C, H, W): a dense target, or for a list of classes a tensor of the map's shape.
        target, call: as `perceptual_terms`.
    """
    refuse_transforms(x)
    features = torch.ops.gpl_fast.perceptual_fwd(x, list(target.values()), call, True)[1]
    return [e.permute(0, 3, 1, 2) for e in features]


@constant_in_graphs
def describe(network: str, device: torch.device, by: str | None, **static: Any) -> str:
    """The text of a `Call` of the network with this key: `static` are the other fields.

    Args:
        by: who decides; None: whoever does on `device`.
        static: ``distance`` as text.
    """
    return _describe(network, by or policy.current(device), **static)


@functools.lru_cache(maxsize=256)
def _describe(network: str, by: str, distance: str, **static: Any) -> str:
    chain, compared = weights.of(network).chain, distances.read(distance)
    assert not isinstance(chain, str)
    return Call(policy=by, network=network, chain=chain, distance=compared, **static).text


class _PerceptualTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: str, kept: tuple[tuple[int, str], ...], *target: Tensor
    ) -> Tensor:
        terms, saved = torch.ops.gpl_fast.perceptual_fwd(x, list(target), call, True)
        of_target = []
        for i, name in kept:
            small = label_dtype(x.shape[1]) if name == "ce_labels" else target[i].dtype
            of_target.append(target[i].to(small))
        ctx.save_for_backward(x, *of_target, *saved)
        ctx.call, ctx.kept = call, len(kept)
        if not torch.compiler.is_compiling():  # the network may be gone before the backward
            ctx.weights = weights.of(read(call).network)
        return terms  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        g = grads[0]
        if not torch.compiler.is_compiling():  # `is_grads_batched` is a vmap
            refuse_transforms(g)
        with torch.no_grad():
            dx = torch.ops.gpl_fast.perceptual_bwd(
                x, rest[: ctx.kept], rest[ctx.kept :], g, ctx.call
            )
        if torch.is_grad_enabled():  # by the prediction, and by the gradient that came in
            dx = reference.refuse_double_backward(dx, x, g)
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def refuse_transforms(x: Tensor) -> None:
    """Derivatives that the operators do not give would be 0 in silence.

    Raises:
        NotImplementedError: a transform of `torch.func` is active, or `x` has a tangent.
    """
    if not torch.compiler.is_compiling():
        what = reference.active_transform(x)
    elif forward_ad._current_level >= 0:  # read here, where torch.compile guards on it
        what = "forward-mode derivatives"
    else:
        what = _transform_while_tracing()
    if what is None:
        return
    raise NotImplementedError(
        f"gpl_fast: the fast path has no {what}; use backend='reference', which leaves them to "
        "PyTorch (or loss.backward() and torch.autograd.grad on the fast path)"
    )


@constant_in_graphs  # torch.compile guards on the stack of transforms
def _transform_while_tracing() -> str | None:
    return reference.active_transform(torch.empty(0, device="cpu"))


def label_dtype(channels: int) -> torch.dtype:
    """Of the labels that are kept: 2 bytes a pixel instead of 8."""
    return torch.int16 if channels <= 2**15 else torch.int32


# ------------------------------------------------------------------------------------ operators


def _plan(call: Call, x: Tensor) -> Plan:
    n, _, h, w = x.shape
    return plan_of(call, n, h, w, call.dtype != torch.float32 or tf32_allowed())


def _packs(call: Call, x: Tensor) -> Mapping[str, Tensor]:
    return weights.of(call.network).packs(_layout(call, x.device))


@functools.lru_cache(maxsize=256)
def _layout(call: Call, device: torch.device) -> weights.Layout:
    return policy.named(call.policy).layout(call, device)


def _perceptual_fwd(
    x: Tensor, target: list[Tensor], text: str, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    call = read(text)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        walk = Forward(_plan(call, x), x, call.named(target), _packs(call, x), keep)
        terms, saved = walk.run()
    return terms.float(), list(saved.values()) if keep else []


def _perceptual_fwd_fake(
    x: Tensor, target: list[Tensor], text: str, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    n, _, h, w = x.shape
    geometry = Geometry(read(text), n, h, w)
    shapes = geometry.saved().values() if keep else ()
    saved = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return x.new_empty(geometry.values_shape(), dtype=torch.float32), saved


def _perceptual_bwd(
    x: Tensor, target: list[Tensor], saved: list[Tensor], g: Tensor, text: str
) -> Tensor:
    call = read(text)
    plan = _plan(call, x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        # Hooks on saved tensors may bring them back with other strides.
        kept = dict(zip(call.kept, map(Tensor.contiguous, target), strict=True))
        kept = call.with_mask(kept) if call.weighed else kept
        named = dict(zip(plan.contract, map(Tensor.contiguous, saved), strict=True))
        return Backward(plan, x, kept, _packs(call, x), named, g).run()


def _perceptual_bwd_fake(
    x: Tensor, target: list[Tensor], saved: list[Tensor], g: Tensor, text: str
) -> Tensor:
    return empty_gradient(x)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("perceptual_fwd", _perceptual_fwd, _key)
    _LIBRARY.impl("perceptual_bwd", _perceptual_bwd, _key)
torch.library.register_fake("gpl_fast::perceptual_fwd", _perceptual_fwd_fake, lib=_LIBRARY)
torch.library.register_fake("gpl_fast::perceptual_bwd", _perceptual_bwd_fake, lib=_LIBRARY)

"""pytest-benchmark cases of the operators in gpl_fast/ops.py, at small shapes.

``python -m pytest benchmarks/test_operators.py``. Maps are NHWC; what an operator writes is checked
after it was timed, coarsely: the tests of correctness are in tests/.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpl_fast
from gpl_fast import ops
from gpl_fast.fast.policy import Way
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import ACTIVATIONS, POOLS

N, H, W = 1, 64, 64
CLASSES = (19, 150)
DTYPES = (torch.float32, torch.bfloat16)
SOFTMAX, MAX_POOL = ACTIVATIONS["softmax"], POOLS["max"]

pytestmark = [
    pytest.mark.skipif(ops.load() is not None, reason=str(ops.load())),
    pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"]),
]

PREDICTION = torch.zeros(N, dtype=torch.bool)  # the branch that every image carries


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that the operator has to fill."""
    return torch.full(shape, float("nan")).to(dtype)


@pytest.mark.parametrize("c", CLASSES)
def test_softmax_pack_fwd(benchmark, c, dtype):
    """Logits (N, C, H, W) and a dense target -> y', δ (N, H, W, C padded) and lse (N, H, W)."""
    x, target = torch.randn(2, N, c, H, W)
    padded = padded_channels(c)
    y, delta = nan(N, H, W, padded, dtype=dtype), nan(N, H, W, padded, dtype=dtype)
    lse = nan(N, H, W)
    strip = {"row0": 0, "rows": H, "core0": 0, "core_rows": H}
    benchmark(
        ops.softmax_pack_fwd, x, activation=SOFTMAX, target_activation=SOFTMAX, temperature=1.0,
        **strip, target=target, from_target=PREDICTION, y=y, delta=delta, lse=lse,
    )  # fmt: skip
    torch.testing.assert_close(lse, x.logsumexp(dim=1))
    wanted = x.softmax(dim=1) - target.softmax(dim=1)
    torch.testing.assert_close(
        delta[..., :c].permute(0, 3, 1, 2).float(), wanted, rtol=1e-2, atol=1e-5
    )


# Results to a side of a tile of Winograd's, in pairs of bfloat16 too, or by the definition.
@pytest.mark.parametrize("by", ["winograd2", "winograd4", "pairs2", "pairs4", "direct", "aten"])
@pytest.mark.parametrize("side", [16, 32, 64])  # 64, 256, 1024 tiles
@pytest.mark.parametrize("c", [64, 256])
def test_convolution(benchmark, c, side, by, dtype):
    """y (N, side, side, C) -> z (N, side, side, 2 C), 3 x 3; ours with the weight's transform."""
    if by not in ("winograd2", "winograd4", "aten") and dtype != torch.bfloat16:
        pytest.skip("of bfloat16 alone")
    y, w = torch.randn(N, side, side, c).to(dtype), torch.randn(2 * c, 3, 3, c)
    maps, weight = y.permute(0, 3, 1, 2), w.to(dtype).permute(0, 3, 1, 2)
    if by == "aten":
        benchmark(torch.conv2d, maps, weight, None, 1, 1)
        return
    z = nan(N, side, side, 2 * c)

    def winograd(w: Tensor, tile: int, u: Tensor) -> None:
        ops.winograd_weight(w, tile, False, u)
        ops.winograd(y, u, tile, 1, 0, z)

    def direct(rounded: Tensor, u: Tensor) -> None:
        ops.direct_weight(rounded, False, u)
        ops.direct_conv(y, u, 3, 1, z)

    if by in ("pairs2", "pairs4", "direct"):
        w = w.bfloat16()
    if by == "direct":
        benchmark(direct, w, torch.empty(Way(1, dtype).weight_elements(3, c, 2 * c), dtype=dtype))
    else:
        tile = int(by[-1])
        u = torch.empty(Way(tile, w.dtype).weight_elements(3, c, 2 * c), dtype=w.dtype)
        benchmark(winograd, w, tile, u)
    wanted = torch.conv2d(maps.float(), w.permute(0, 3, 1, 2).float(), padding=1)
    most = {"pairs2": 0.006, "pairs4": 0.02}.get(by, 1e-5)  # of rounding, norm-wise
    assert (z.permute(0, 3, 1, 2) - wanted).norm() <= most * wanted.norm()


@pytest.mark.parametrize("c", [64, 256])
def test_relu_pool_diff_fwd(benchmark, c, dtype):
    """z', δz (N, H, W, C) -> y'⁺, δ⁺ (N, H / 2, W / 2, C) and the winners' codes."""
    z, dz = torch.randn(2, N, H, W, c).to(dtype)
    y, delta = (nan(N, H // 2, W // 2, c, dtype=dtype) for _ in range(2))
    code = torch.empty(N, H // 2, W // 2, c // 2, dtype=torch.uint8)
    maps = {"dz": dz, "from_target": PREDICTION, "y": y, "delta": delta, "code": code}
    benchmark(ops.relu_pool_diff_fwd, z, pool=MAX_POOL, **maps)
    pooled = torch.nn.functional.max_pool2d(z.permute(0, 3, 1, 2).relu(), 2)
    torch.testing.assert_close(y.permute(0, 3, 1, 2), pooled)


@pytest.mark.parametrize("c", [64, 256])
def test_relu_pool_bwd(benchmark, c, dtype):
    """dy (N, H / 2, W / 2, C) -> dz (N, H, W, C): each value to its window's winner, or nowhere."""
    z, dz = torch.randn(N, H, W, c).to(dtype), nan(N, H, W, c, dtype=dtype)
    y = nan(N, H // 2, W // 2, c, dtype=dtype)
    code = torch.empty(N, H // 2, W // 2, c // 2, dtype=torch.uint8)
    ops.relu_pool_fwd(z, pool=MAX_POOL, y=y, code=code)
    dy = torch.randn(N, H // 2, W // 2, c).to(dtype)
    size = {"height": H, "width": W, "row0": 0}
    benchmark(ops.relu_pool_bwd, dy, code=code, pool=MAX_POOL, **size, dz=dz)
    torch.testing.assert_close(dz.float().sum(), (dy * (y > 0)).float().sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("c", CLASSES)
def test_label_conv_fwd(benchmark, c, dtype):
    """Labels (N, H, W) in blobs: their share of the first convolution, z' and δz (N, H, W, 64)."""
    labels = torch.randint(c, (N, H // 8, W // 8))
    labels = labels.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    weight = gpl_fast.LossNet.vgg(c).weights["conv1_1"]  # (64, C, 3, 3)
    table = weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()
    z = nan(N, H, W, weight.shape[0], dtype=dtype)
    taken, dz = torch.ones(N, H, W, dtype=torch.uint8), torch.zeros_like(z)
    tables = {"table": table.to(dtype), "interior": table.sum(dim=0)}
    benchmark(
        ops.label_conv_fwd, labels, **tables, from_target=PREDICTION, taken=taken, taken_row0=0,
        row0=0, z=z, dz=dz,
    )  # fmt: skip
    onehot = torch.nn.functional.one_hot(labels, c).permute(0, 3, 1, 2).float()
    wanted = torch.conv2d(onehot, weight, padding=1)
    torch.testing.assert_close(z.permute(0, 3, 1, 2).float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("c", CLASSES)
def test_softmax_bwd(benchmark, c, dtype):
    """dy (N, H, W, C padded), logits and lse -> dx (N, C, H, W)."""
    x = torch.randn(N, c, H, W)
    dy = torch.randn(N, H, W, padded_channels(c)).to(dtype)
    dx = nan(N, c, H, W)
    benchmark(
        ops.softmax_bwd, x, activation=SOFTMAX, temperature=1.0, row0=0, rows=H, dx=dx,
        lse=x.logsumexp(dim=1), dy=dy, scale=torch.ones(N),
    )  # fmt: skip
    torch.testing.assert_close(dx.sum(dim=1), torch.zeros(N, H, W), rtol=0, atol=1e-4)


@pytest.mark.parametrize("c", [64, 512])
def test_diff_reduce_fwd(benchmark, c, dtype):
    """δ (N, H, W, C) -> (N,) float64: Σ δ² of each image."""
    delta = torch.randn(N, H, W, c).to(dtype)
    sums = benchmark(ops.diff_reduce_fwd, delta)
    torch.testing.assert_close(sums, delta.double().square().sum(dim=(1, 2, 3)), rtol=1e-6, atol=0)

"""conv_block_bwd on the device, against float64 and by its other ways.

On sm_90 twice: "sm_90a" is the kernel of TMA and wgmma, "sm_80" that of cp.async, ldmatrix and
mma.sync, which GPL_FAST_SM90A=0 takes there. Both layouts are confirmed where these pass.
"""

from __future__ import annotations

import pytest
import torch
from operands import codes, huge, implementation, nan, to

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SOFTMAX, MAX, AVG, NO_POOL = 1, 0, 1, 2
SIZES = ((9, 19), (32, 48))


@pytest.fixture(params=["sm_90a", "sm_80"])
def architecture(request, device, monkeypatch):
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if request.param == "sm_90a" and not hopper:
        pytest.skip("it needs sm_90")
    if hopper:
        monkeypatch.setenv("GPL_FAST_SM90A", str(int(request.param == "sm_90a")))
    return request.param


def block_case(dtype, pool, c_in, c_out, k, size, n=2):
    """On the CPU: dy, code, the weight (C_out, C_in, K, K) and its pack."""
    h, w = size
    weight = (torch.randn(c_out, c_in, k, k) * (2 / (c_in * k * k)) ** 0.5).to(dtype)
    packed = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
    packed = torch.nn.functional.pad(packed, (0, -c_in % 8, 0, -c_out % 64)).contiguous()
    grid = (h, w) if pool == NO_POOL else (h // 2, w // 2)
    dy = torch.randn(n, *grid, c_out).to(dtype)
    masks = torch.randint(256, (n, h, w, (c_out + 7) // 8)).byte()
    return dy, codes(n, *grid, c_out) if pool == MAX else masks, weight, packed


def block_on(device, dy, code, packed, pool=MAX):
    """What a block of stride 1 is given, but where its gradient goes."""
    dy, code, w = to(device, (dy, code, packed))
    return {
        "dy": dy, "code": code, "w": w, "pool": pool, "stride": 1, "dy_row0": 0,
        "allow_tf32": False,
    }  # fmt: skip


def check(dx, dy, code, weight, pool):
    """err(dx, float64) <= 2 err(PyTorch in the same dtype, float64) + atol, PyTorch on the CPU."""
    n, h, w, _ = dx.shape
    dz = nan(n, h, w, dy.shape[3], dtype=dy.dtype)
    if pool == NO_POOL:
        ops.relu_bwd(dy, mask=code, dz=dz)
    else:
        ops.relu_pool_bwd(dy, code=code, pool=pool, height=h, width=w, row0=0, dz=dz)
    truth, plain = (
        torch.nn.functional.conv_transpose2d(
            dz.permute(0, 3, 1, 2).to(t), weight.to(t), padding=weight.shape[2] // 2
        )
        for t in (torch.float64, dy.dtype)
    )
    bound = 2 * (plain.double() - truth).abs().max() + 1e-5 * truth.abs().max()
    assert (dx.cpu().permute(0, 3, 1, 2).double() - truth).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
@pytest.mark.parametrize(
    ("c_in", "c_out", "k"), [(64, 128, 3), (19, 70, 5), (130, 192, 3), (1, 64, 7), (64, 64, 1)]
)
def test_small_conv_block_bwd(device, architecture, dtype, pool, c_in, c_out, k):
    run = implementation("compiled", "conv_block_bwd", device)
    for h, w in SIZES:
        dy, code, weight, packed = block_case(dtype, pool, c_in, c_out, k, (h, w))
        dx = nan(2, h, w, c_in, dtype=dtype).to(device)
        run(**block_on(device, dy, code, packed, pool), height=h, row0=0, dx=dx)
        check(dx, dy, code, weight, pool)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_main_layers(device, architecture, dtype):
    """The default network's channels, over many tiles; a strip of rows has the same bits."""
    run = implementation("compiled", "conv_block_bwd", device)
    channels, size = ((256, 512), (66, 129)) if device.type == "cuda" else ((72, 136), (20, 37))
    dy, code, weight, packed = block_case(dtype, MAX, *channels, 3, size, n=1)
    block = block_on(device, dy, code, packed) | {"height": size[0]}
    dx = nan(1, *size, channels[0], dtype=dtype).to(device)
    run(**block, row0=0, dx=dx)
    check(dx, dy, code, weight, MAX)
    strip = nan(1, 9, size[1], channels[0], dtype=dtype).to(device)
    run(**block, row0=5, dx=strip)
    assert torch.equal(strip, dx[:, 5:14])


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_small_tf32_is_taken_where_it_is_allowed(device, architecture, allow_tf32):
    run = implementation("compiled", "conv_block_bwd", device)
    dy, code, weight, packed = block_case(torch.float32, MAX, 70, 65, 3, (32, 48))
    dx = nan(2, 32, 48, 70).to(device)
    block = block_on(device, dy, code, packed) | {"height": 32, "row0": 0}
    run(**block | {"allow_tf32": allow_tf32}, dx=dx)
    if not allow_tf32:
        return check(dx, dy, code, weight, MAX)
    exact = torch.empty_like(dx)
    run(**block, dx=exact)
    assert 1e-5 < (dx - exact).abs().max() / exact.abs().max() < 2e-3


def logits_case(device, dtype, c, layout, size=(18, 40), c_out=64, n=2):
    """Arguments of conv_block_logits_bwd but the output: the block's, and softmax_bwd's."""
    h, w = size
    dy, code, _, packed = block_case(dtype, MAX, c, c_out, 3, size, n)
    labels, valid = torch.randint(-1, c, (n, h, w)), torch.rand(n, h, w) > 0.2
    scale, weight = torch.rand(n) + 0.5, torch.rand(c)
    labels, valid, scale, weight = to(device, (labels, valid, scale, weight))
    x = torch.empty(n, c, h, w, device=device, memory_format=layout).normal_(std=3)
    logits = {
        "x": x, "lse": x.logsumexp(1), "scale": scale, "valid": valid, "activation": SOFTMAX,
        "temperature": 1.0, "ce_labels": labels, "ce_scale": scale + 1, "class_weight": weight,
        "label_smoothing": 0.1, "row0": 0, "rows": h,
    }  # fmt: skip
    return block_on(device, dy, code, packed), logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3, 19, 150, 256, 257, 1003])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_small_conv_block_logits_bwd(device, architecture, layout, dtype, c):
    """As the block's gradient, then the softmax's, one after the other."""
    run = implementation("compiled", "conv_block_logits_bwd", device)
    block, logits = logits_case(device, dtype, c, layout)
    between = nan(2, 18, 40, c, dtype=dtype).to(device)
    implementation("compiled", "conv_block_bwd", device)(**block, height=18, row0=0, dx=between)
    want, got = (torch.full_like(logits["x"], float("nan")) for _ in range(2))
    implementation("compiled", "softmax_bwd", device)(**logits, dy=between, dx=want)
    run(**block, **logits, dx=got)
    torch.testing.assert_close(got, want, rtol=0.02, atol=ATOL[dtype])


@pytest.mark.parametrize("c", [19, 257])
def test_twenty_runs_of_conv_block_give_the_same_bits(device, architecture, c):
    times, size = (20, (66, 129)) if device.type == "cuda" else (2, (18, 20))
    block, logits = logits_case(device, torch.bfloat16, c, torch.contiguous_format, size)
    run = implementation("compiled", "conv_block_logits_bwd", device)
    first = torch.full_like(logits["x"], float("nan"))
    run(**block, **logits, dx=first)
    for _ in range(times):
        again = torch.full_like(first, float("nan"))
        run(**block, **logits, dx=again)
        assert torch.equal(again, first)


def test_opcheck_of_conv_block(cuda, architecture):
    block, logits = logits_case(cuda, torch.float32, 19, torch.contiguous_format)
    out = torch.zeros_like(logits["x"])
    torch.library.opcheck(ops.conv_block_logits_bwd, (), {**block, **logits, "dx": out})
    maps = {"height": 18, "row0": 0, "dx": torch.zeros(2, 18, 40, 19).to(cuda)}
    torch.library.opcheck(ops.conv_block_bwd, (), block | maps)


def test_conv_block_in_a_graph_and_on_a_side_stream(cuda, architecture):
    block, logits = logits_case(cuda, torch.bfloat16, 150, torch.contiguous_format)
    want = torch.full_like(logits["x"], float("nan"))
    ops.conv_block_logits_bwd(**block, **logits, dx=want)
    side, got = torch.cuda.Stream(), torch.full_like(want, float("nan"))
    late = torch.zeros_like(block["dy"])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(block["dy"])
        ops.conv_block_logits_bwd(**block | {"dy": late}, **logits, dx=got)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.conv_block_logits_bwd(**block, **logits, dx=got)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize("c", [150, 1203])
def test_conv_block_logits_beyond_2_31_elements(device, architecture, c):
    """The last image's gradient is what that image alone gives."""
    run = implementation("compiled", "conv_block_logits_bwd", device)
    n, size = huge(device, (60 if c == 150 else 8, (512, 512)), (2, (10, 18)), 30e9)
    layout = torch.contiguous_format
    block, logits = logits_case(device, torch.bfloat16, c, layout, size, n=n)
    got = torch.full_like(logits["x"], float("nan"))
    run(**block, **logits, dx=got)
    last = slice(n - 1, n)
    alone = torch.full_like(got[last], float("nan"))
    whole = ("w", "class_weight")
    one = {
        name: a[last] if isinstance(a, torch.Tensor) and name not in whole else a
        for name, a in (block | logits).items()
    }
    run(**one, dx=alone)
    assert torch.equal(got[last], alone)
    assert alone.isfinite().all()

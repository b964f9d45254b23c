"""What only a device has: streams, graphs, other devices, sizes beyond 2^31, many blocks at once.

What the stages compute there is tests/stages' with `--implementation gpu`.
"""

from __future__ import annotations

import pytest
import torch
from conv_block_backward import Block, Logits, nhwc, pack_weights
from definitions import BF16, FLOAT, HALF, MAX, SOFTMAX, codes, masks, poisoned_like

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

BLOCKS = ("conv_block_bwd", "conv_block_logits_bwd")
BACKWARD = ("relu_bwd", "relu_pool_bwd", "softmax_bwd", *BLOCKS)


@pytest.fixture(params=["sm_90a", "sm_80"])
def architecture(request, device, monkeypatch):
    """On sm_90 a block has two kernels: GPL_FAST_SM90A=0 takes the other."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if request.param == "sm_90a" and not hopper:
        pytest.skip("it needs sm_90")
    if hopper:
        monkeypatch.setenv("GPL_FAST_SM90A", str(int(request.param == "sm_90a")))
    return request.param


def operator(name, device):
    if device.type == "cuda" and (why := ops.cuda_obstacle(device)) is not None:
        pytest.fail(why)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gpl_fast::{name}", device.type.upper()):
        pytest.skip(f"{name} has no compiled kernel for {device.type}")
    return getattr(ops, name)


def to(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def case(name, device, dtype=BF16, size=(13, 27), n=2, c=19):
    """(first, other arguments, output) of a stage on a device."""
    h, w = size
    dy = torch.randn(n, h, w, c).to(dtype)
    if name == "relu_bwd":
        options = {"mask": masks(n, h, w, c), "dz": dy}
    elif name == "relu_pool_bwd":
        options = {"code": codes(n, h // 2, w // 2, c), "pool": MAX, "height": h, "width": w,
                   "row0": 0, "dz": dy}  # fmt: skip
        dy = dy[:, : h // 2, : w // 2].contiguous()
    elif name == "softmax_bwd":
        x = 3 * torch.randn(n, c, h, w)
        options = {"activation": SOFTMAX, "temperature": 1.0, "row0": 0, "rows": h, "dx": x,
                   "lse": x.logsumexp(1), "dy": dy, "scale": torch.rand(n) + 0.5}  # fmt: skip
        dy = x
    else:
        logits = Logits(Block(n=n, c_in=c, h=h, w=w, dtype=dtype), cross_entropy=True)
        options = logits.block.arguments() | {"dx": dy, "height": h, "row0": 0}
        if name == "conv_block_logits_bwd":
            del options["height"]
            options |= {
                "x": logits.x, "scale": logits.scale, "activation": SOFTMAX, "temperature": 1.0,
                "rows": h, "dx": logits.x, "lse": logits.x.logsumexp(1),
                "ce_labels": logits.labels, "ce_scale": logits.ce_scale,
            }  # fmt: skip
        dy = nhwc(logits.block.dy)
    out = "dx" if "dx" in options else "dz"
    options[out] = torch.full_like(options[out], float("nan"))
    options = {key: to(device, value) for key, value in options.items()}
    return dy.to(device), options, options[out]


@pytest.mark.parametrize("name", BACKWARD)
def test_small_opcheck(device, name):
    operator(name, device)
    first, options, _ = case(name, device, FLOAT)
    function = getattr(ops, name)
    torch.library.opcheck(function, (first,), options)


@pytest.mark.parametrize("name", BACKWARD)
def test_twenty_runs_give_the_same_bits(device, architecture, name):
    run = operator(name, device)
    first, options, out = case(name, device, size=(130, 257), c=70)
    run(first, **options)
    wanted = out.clone()
    for _ in range(20):
        out.fill_(float("nan"))
        run(first, **options)
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", BACKWARD)
def test_small_operators_run_on_the_current_stream(cuda, architecture, name):
    """Inputs that the side stream makes late are waited for, as on that stream alone."""
    run = operator(name, cuda)
    first, options, out = case(name, cuda)
    run(first, **options)
    wanted, late = out.clone(), torch.zeros_like(first)
    out.fill_(float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(first)
        run(late, **options)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", BACKWARD)
def test_small_operators_run_in_a_graph(cuda, architecture, name):
    run = operator(name, cuda)
    first, options, out = case(name, cuda, c=150)
    run(first, **options)
    wanted, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(first, **options)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", BACKWARD)
def test_operators_run_on_their_tensors_device(second_device, name):
    here, there = torch.device("cuda", 0), second_device
    run = operator(name, there)
    first, options, out = case(name, here)
    moved = {key: to(there, value) for key, value in options.items()}
    run(first, **options)
    run(first.to(there), **moved)  # the current device is another one
    assert torch.equal(moved["dx" if "dx" in moved else "dz"].to(here), out)


def test_small_tensors_of_two_devices_are_refused(cuda):
    first, options, _ = case("relu_bwd", cuda)
    options["mask"] = options["mask"].cpu()
    with pytest.raises(RuntimeError, match="mask must be on the device of dz, cuda:0, got cpu"):
        operator("relu_bwd", cuda)(first, **options)


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_main_layers(device, architecture, dtype):
    """The default network's channels, over many tiles; a strip of rows has the same bits."""
    run = operator("conv_block_bwd", device)
    block = Block(c_in=256, c_out=512, h=66, w=129, dtype=dtype)
    options = {key: to(device, value) for key, value in block.arguments().items()}
    dy = nhwc(block.dy).to(device)
    dx, strip = (torch.full((1, rows, 129, 256), float("nan")).to(dtype).to(device)
                 for rows in (66, 9))  # fmt: skip
    run(dy, **options, height=66, row0=0, dx=dx)
    block.check(dx.cpu().permute(0, 3, 1, 2))
    run(dy, **options, height=66, row0=5, dx=strip)
    assert torch.equal(strip, dx[:, 5:14])


# ------------------------------------------------------------------------------- beyond 2^31


def huge(device, big, small, bytes_needed):
    """`big` on a GPU with room for it, `small` on the CPU."""
    if device.type != "cuda":
        return small
    free = torch.cuda.mem_get_info(device)[0]
    if free < bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
    return big


def test_relu_bwd_beyond_2_31_elements(device):
    pixels, run = huge(device, 2**26 + 3, 300, 12e9), operator("relu_bwd", device)
    dy = torch.randn(1, 1, pixels, 40, device=device, dtype=BF16)
    mask = torch.randint(256, (1, 1, pixels, 5), device=device).byte()
    (dz,) = poisoned_like(dy)
    run(dy, mask=mask, dz=dz)
    tail = slice(pixels - 100, pixels)
    alone = torch.full_like(dy[:, :, tail], float("nan"))
    run(dy[:, :, tail].contiguous(), mask=mask[:, :, tail].contiguous(), dz=alone)
    assert torch.equal(dz[:, :, tail], alone)
    assert not dz.isnan().any()


def test_relu_pool_bwd_beyond_2_31_elements(device):
    n = huge(device, 140, 3, 12e9)
    size = 512 if n > 3 else 6
    dy = torch.randn(n, size // 2, size // 2, 64, device=device, dtype=BF16)
    code = torch.zeros(n, size // 2, size // 2, 32, dtype=torch.uint8, device=device)
    code[-1] = 0x31
    dz = torch.full((n, size, size, 64), float("nan"), device=device, dtype=BF16)
    operator("relu_pool_bwd", device)(
        dy, code=code, pool=MAX, height=size, width=size, row0=0, dz=dz
    )
    assert torch.equal(dz[-1, ::2, 1::2, ::2], dy[-1, ..., ::2])  # winner 1
    assert torch.equal(dz[-1, 1::2, 1::2, 1::2], dy[-1, ..., 1::2])  # winner 3
    assert torch.equal(dz[-2, ::2, ::2], dy[-2])
    assert not dz[-2:, 1::2, ::2].any()


@pytest.mark.parametrize("kind", ["nchw", "channels_last"])
def test_softmax_bwd_beyond_2_31_elements(device, kind):
    n, c, size = huge(device, (16, 1203, 512), (2, 200, 6), 36e9)
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    x = torch.empty(n, c, size, size, device=device, dtype=BF16, memory_format=layout).normal_()
    dy = torch.empty(n, size, size, c, device=device, dtype=BF16).normal_()
    lse = torch.stack([image.float().logsumexp(0) for image in x])
    scale, (dx,) = torch.rand(n, device=device), poisoned_like(x)
    how = {"activation": SOFTMAX, "temperature": 1.0, "row0": 0, "rows": size}
    run = operator("softmax_bwd", device)
    run(x, dx=dx, lse=lse, dy=dy, scale=scale, **how)
    (alone,) = poisoned_like(x[-1:])
    run(x[-1:], dx=alone, lse=lse[-1:], dy=dy[-1:], scale=scale[-1:], **how)
    assert torch.equal(dx[-1:], alone)
    y, d = x[-1].float().softmax(0), dy[-1].permute(2, 0, 1).float()
    wanted = scale[-1] * y * (d - (y * d).sum(0))
    torch.testing.assert_close(alone[0].float(), wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("classes", [150, 1203])
def test_conv_block_logits_beyond_2_31_elements(device, architecture, classes):
    """The last image's gradient is what that image alone gives."""
    run = operator("conv_block_logits_bwd", device)
    n, (h, w) = huge(device, (60 if classes == 150 else 8, (512, 512)), (2, (10, 18)), 30e9)
    block = Block(c_in=classes, h=2, w=2)  # its weight; maps of this size are made there
    x = torch.empty(n, classes, h, w, device=device).normal_(std=3)
    dy = torch.randn(n, h // 2, w // 2, 64, device=device).to(BF16)
    code = codes(1, h // 2, w // 2, 64).to(device).expand(n, -1, -1, -1).contiguous()
    options = {
        "w": pack_weights(block.weight).to(device), "pool": MAX, "stride": 1, "dy_row0": 0,
        "allow_tf32": False, "activation": SOFTMAX, "temperature": 1.0, "row0": 0, "rows": h,
        "lse": x.logsumexp(1), "scale": torch.rand(n, device=device) + 0.5, "code": code,
    }  # fmt: skip
    dx, last = torch.full_like(x, float("nan")), slice(n - 1, n)
    run(dy, x=x, dx=dx, **options)
    (alone,) = poisoned_like(x[last])
    cut = {key: options[key][last] for key in ("lse", "scale", "code")}
    run(dy[last], x=x[last], dx=alone, **options | cut)
    assert torch.equal(dx[last], alone)
    assert alone.isfinite().all()

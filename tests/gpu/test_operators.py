"""Every operator on the device against the CPU's, which tests/cpu holds against float64.

Routing and packed arrays are compared bit for bit, what is computed to twice the CPU's rounding.
"""

from __future__ import annotations

import functools

import pytest
import torch
from operands import codes, huge, implementation, nan, to

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BACKWARD = ("relu_bwd", "relu_pool_bwd", "softmax_bwd")
SOFTMAX, SIGMOID, MAX, AVG = 1, 2, 0, 1
NO_CE = dict.fromkeys(("ce_labels", "ce_lse", "ce_scale", "class_weight")) | {
    "label_smoothing": 0.0
}


def byte(*shape):
    return torch.full(shape, 255, dtype=torch.uint8)


def calls(dtype, n=2, h=13, w=27, c=19):
    """name -> (arguments, the names of the outputs among them)."""
    x, target = 3 * torch.randn(n, c, h, w), 3 * torch.randn(n, c, h, w)
    labels, valid = torch.randint(-1, c, (n, h, w)), torch.rand(n, h, w) > 0.2
    weight, scale, branch = torch.rand(c), torch.rand(n) + 0.5, torch.arange(n) % 2 == 1
    z, dz, dy = (torch.randn(n, h, w, c).to(dtype) for _ in range(3))
    small = torch.randn(n, h // 2, w // 2, c).to(dtype)
    mask = torch.randint(256, (n, h, w, (c + 7) // 8)).byte()
    pooled = functools.partial(nan, n, h // 2, w // 2, c, dtype=dtype)
    full = functools.partial(nan, n, h, w, c, dtype=dtype)
    code = functools.partial(byte, n, h // 2, w // 2, (c + 1) // 2)
    table = torch.randn(9, c, 24).to(dtype)
    q, taken = torch.randn(n, h, w, 24).to(dtype), (torch.rand(n, h, w) > 0.5).byte()
    look_up = {
        "table": table, "from_target": branch, "taken": taken, "taken_row0": 0, "row0": 0,
        "valid": valid, "z": torch.full_like(q, float("nan")), "dz": q,
    }  # fmt: skip
    values, indices = torch.rand(n, 3, h, w), torch.randint(c, (n, 3, h, w))
    ce = {"ce_labels": labels, "class_weight": weight, "label_smoothing": 0.1}
    lse, rows = x.logsumexp(1), {"row0": 0, "rows": h}
    last = x.contiguous(memory_format=torch.channels_last)
    poison = functools.partial(torch.full_like, fill_value=float("nan"))
    pack = functools.partial(nan, n, h + 2, w, c + 5, dtype=dtype)
    codes_of = codes(n, h // 2, w // 2, c)
    return {
        "softmax_pack_fwd": (
            {"x": x, "valid": valid, "target": target, "from_target": branch,
             "activation": SOFTMAX, "target_activation": SOFTMAX, "temperature": 1.0, **ce,
             "row0": -1, "rows": h + 2, "core0": 0, "core_rows": h, "y": pack(), "delta": pack(),
             "taken": None, "labels": None, "topk_values": None, "topk_indices": None,
             "topk_rest": None, "lse": nan(n, h, w), "ce_lse": None,
             "ce_rows": nan(n, h, 2, dtype=torch.float64)},
            ("y", "delta", "lse", "ce_rows"),
        ),
        "label_conv_fwd": (
            {"labels": labels, "interior": table.float().sum(0), **look_up}, ("z", "dz"),
        ),
        "topk_conv_fwd": (
            {"topk_values": values, "topk_indices": indices, "topk_rest": None,
             "rest_table": None, **look_up},
            ("z", "dz"),
        ),
        "relu_fwd": ({"z": z, "y": full(), "mask": torch.full_like(mask, 255)}, ("y", "mask")),
        "relu_diff_fwd": (
            {"z": z, "dz": dz, "from_target": branch, "y": full(), "delta": full(),
             "mask": torch.full_like(mask, 255)},
            ("y", "delta", "mask"),
        ),
        "relu_pool_fwd": ({"z": z, "pool": MAX, "y": pooled(), "code": code()}, ("y", "code")),
        "relu_pool_diff_fwd": (
            {"z": z, "dz": dz, "from_target": branch, "pool": MAX, "y": pooled(),
             "delta": pooled(), "code": code()},
            ("y", "delta", "code"),
        ),
        "relu_bwd": ({"dy": dy, "mask": mask, "dz": full()}, ("dz",)),
        "relu_pool_bwd": (
            {"dy": small, "code": codes_of, "pool": MAX, "height": h, "width": w, "row0": -3,
             "dz": nan(n, h + 5, w, c, dtype=dtype)},
            ("dz",),
        ),
        "relu_pool_bwd average": (
            {"dy": small, "code": mask, "pool": AVG, "height": h, "width": w, "row0": 0,
             "dz": full()},
            ("dz",),
        ),
        "softmax_bwd": (
            {"x": x, "lse": lse, "dy": dy, "scale": scale, "valid": valid, "activation": SOFTMAX,
             "temperature": 1.0, **ce, "ce_lse": None, "ce_scale": scale + 1, **rows,
             "dx": poison(x)},
            ("dx",),
        ),
        "softmax_bwd channels_last": (
            {"x": last.to(dtype), "lse": lse, "dy": dy, "scale": scale, "valid": None,
             "activation": SOFTMAX, "temperature": 2.0, **NO_CE, **rows,
             "dx": poison(last, dtype=dtype)},
            ("dx",),
        ),
        "softmax_bwd sigmoid": (
            {"x": x, "lse": None, "dy": dy, "scale": scale, "valid": valid,
             "activation": SIGMOID, "temperature": 1.5, **NO_CE, **rows, "dx": poison(x)},
            ("dx",),
        ),
    }  # fmt: skip


CALLS = sorted(calls(torch.float32))


def compare(name, got, want):
    got = got.cpu()
    if want.dtype == torch.uint8 or name.split()[0] in ("relu_bwd", "relu_pool_bwd"):
        assert torch.equal(got, want)
    elif want.dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        rtol = RTOL[want.dtype]
        torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["compiled", "triton"])
def test_small_operator_equals_the_cpu(device, kind, call, dtype):
    name = call.split()[0]
    run = implementation(kind, name, device)
    for sizes in ({}, {"c": 64}, {"n": 1, "h": 2, "w": 70, "c": 3}):
        arguments, outputs = calls(dtype, **sizes)[call]
        given = to(device, arguments)
        before = {k: a.clone() if isinstance(a, torch.Tensor) else a for k, a in given.items()}
        getattr(ops, name)(**arguments)
        run(**given)
        for argument, now in given.items():
            if argument in outputs:
                compare(call, now, arguments[argument])
            elif isinstance(now, torch.Tensor):
                assert torch.equal(now, before[argument])  # inputs are never written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["compiled", "triton"])
def test_small_diff_reduce(device, kind, dtype):
    run = implementation(kind, "diff_reduce_fwd", device)
    for shape in ((3, 1), (2, 9001), (1, 3, 5, 64)):
        delta = torch.randn(shape).to(dtype)
        truth = delta.double().square().flatten(1).sum(1)
        got = run(delta.to(device)).cpu().double()
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck(device, name):
    implementation("compiled", name, device)
    torch.library.opcheck(getattr(ops, name), (), to(device, calls(torch.float32)[name][0]))


@pytest.mark.parametrize("name", BACKWARD)
def test_twenty_runs_give_the_same_bits(device, name):
    run = implementation("compiled", name, device)
    arguments, (out,) = calls(torch.bfloat16, h=130, w=257)[name]
    given = to(device, arguments)
    run(**given)
    first = given[out].clone()
    for _ in range(20):
        given[out].fill_(float("nan"))
        run(**given)
        assert torch.equal(given[out], first)


@pytest.mark.parametrize("name", BACKWARD)
def test_small_operators_run_on_the_current_stream(cuda, name):
    """Inputs that the side stream makes late are waited for, as on that stream alone."""
    run = implementation("compiled", name, cuda)
    arguments, (out,) = calls(torch.float32)[name]
    getattr(ops, name)(**arguments)
    given = to(cuda, arguments)
    late = {k: a.clone() if isinstance(a, torch.Tensor) else a for k, a in given.items()}
    first = next(k for k, a in late.items() if isinstance(a, torch.Tensor))
    late[first].zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late[first].copy_(given[first])
        run(**late)
    torch.cuda.current_stream().wait_stream(side)
    compare(name, late[out], arguments[out])


@pytest.mark.parametrize("name", BACKWARD)
def test_operators_run_on_their_tensors_device(second_device, name):
    run = implementation("compiled", name, second_device)
    arguments, (out,) = calls(torch.float32)[name]
    getattr(ops, name)(**arguments)
    given = to(second_device, arguments)
    run(**given)  # the current device is another one
    compare(name, given[out], arguments[out])


def test_small_tensors_of_two_devices_are_refused(cuda):
    arguments, _ = calls(torch.float32)["relu_bwd"]
    dy, mask, dz = to(cuda, arguments).values()
    with pytest.raises(RuntimeError, match="mask must be on the device of dz, cuda:0, got cpu"):
        ops.relu_bwd(dy, mask=mask.cpu(), dz=dz)


# ------------------------------------------------------------------------------- beyond 2^31


def test_relu_bwd_beyond_2_31_elements(device):
    pixels = huge(device, 2**26 + 3, 300, 12e9)
    dy = torch.randn(1, 1, pixels, 40, device=device, dtype=torch.bfloat16)
    mask = torch.randint(256, (1, 1, pixels, 5), device=device).byte()
    dz = torch.full_like(dy, float("nan"))
    ops.relu_bwd(dy, mask=mask, dz=dz)
    tail = slice(pixels - 100, pixels)
    want = torch.full_like(dy[:, :, tail], float("nan"))
    ops.relu_bwd(dy[:, :, tail].contiguous(), mask=mask[:, :, tail].contiguous(), dz=want)
    assert torch.equal(dz[:, :, tail], want)
    assert not dz.isnan().any()


def test_relu_pool_bwd_beyond_2_31_elements(device):
    n = huge(device, 140, 3, 12e9)
    size = 512 if n > 3 else 6
    dy = torch.randn(n, size // 2, size // 2, 64, device=device, dtype=torch.bfloat16)
    code = torch.zeros(n, size // 2, size // 2, 32, dtype=torch.uint8, device=device)
    code[-1] = 0x31
    dz = torch.full((n, size, size, 64), float("nan"), device=device, dtype=torch.bfloat16)
    ops.relu_pool_bwd(dy, code=code, pool=MAX, height=size, width=size, row0=0, dz=dz)
    assert torch.equal(dz[-1, ::2, 1::2, ::2], dy[-1, ..., ::2])  # winner 1
    assert torch.equal(dz[-1, 1::2, 1::2, 1::2], dy[-1, ..., 1::2])  # winner 3
    assert torch.equal(dz[-2, ::2, ::2], dy[-2])
    assert not dz[-2:, 1::2, ::2].any()


@pytest.mark.parametrize("kind", ["nchw", "channels_last"])
def test_softmax_bwd_beyond_2_31_elements(device, kind):
    n, c, size = huge(device, (16, 1203, 512), (2, 200, 6), 36e9)
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    x = torch.empty(n, c, size, size, device=device, dtype=torch.bfloat16, memory_format=layout)
    dx = torch.full_like(x, float("nan"))
    dy = torch.empty(n, size, size, c, device=device, dtype=torch.bfloat16)
    x.normal_()
    dy.normal_()
    lse = torch.stack([image.float().logsumexp(0) for image in x])
    scale = torch.rand(n, device=device)
    whole = {"activation": SOFTMAX, "temperature": 1.0, "row0": 0, "rows": size}
    ops.softmax_bwd(x, lse=lse, dy=dy, scale=scale, dx=dx, **whole)
    alone = torch.full_like(x[-1:], float("nan"))
    ops.softmax_bwd(x[-1:], lse=lse[-1:], dy=dy[-1:], scale=scale[-1:], dx=alone, **whole)
    assert torch.equal(dx[-1:], alone)
    y, d = x[-1].float().softmax(0), dy[-1].permute(2, 0, 1).float()
    want = scale[-1] * y * (d - (y * d).sum(0))
    torch.testing.assert_close(alone[0].float(), want, rtol=2**-7, atol=1e-6)

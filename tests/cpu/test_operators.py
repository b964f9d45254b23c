"""The compiled operators as an interface: errors, schemas, builds for older CPUs, and `populate`.

What they compute is tests/stages'.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from definitions import BF16, FLOAT, HALF, SOFTMAX, odd_images, poisoned
from implementations import CPU_ALONE, STAGES, cpu

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
stages = cpu()[0]


# ----------------------------------------------------------------------------------------- errors


def pack(x, **options):
    n, c, h, w = x.shape
    how = {
        "activation": SOFTMAX, "target_activation": SOFTMAX, "temperature": 1.0, "row0": 0,
        "rows": h, "core0": 0, "core_rows": h, "from_target": odd_images(n),
        "y": poisoned(n, h, w, c), "lse": poisoned(n, h, w),
    }  # fmt: skip
    stages.softmax_pack_fwd(x, **how | options)


def look_up(z, taken_rows):
    """Rows 2.. of z look at rows 1.. of `taken`, which has fewer."""
    table = torch.randn(9, 3, 8)
    stages.label_conv_fwd(
        torch.zeros(1, 4 + z.shape[1], 4).long(), table=table, interior=table.sum(0),
        from_target=odd_images(1), taken=torch.zeros(1, taken_rows, 4).byte(), taken_row0=1,
        row0=2, z=z, dz=z.clone(),
    )  # fmt: skip


def winograd_weight(w, tile=2, u_dtype=FLOAT, size=6144):
    w = w.permute(0, 2, 3, 1).contiguous()
    stages.winograd_weight(w, tile=tile, transposed=False, u=poisoned(size, dtype=u_dtype))


def winograd(x, tile=2, pad_h=1, z_dtype=None, rows=4, u_dtype=FLOAT):
    z = poisoned(1, rows, 4, 8, dtype=z_dtype or x.dtype)
    u = poisoned((tile + 2) ** 2 * 8 * 32, dtype=u_dtype)
    stages.winograd(x, u=u, tile=tile, pad_h=pad_h, row0=0, z=z)


def direct_weight(w):
    u = poisoned(9 * 32 * 32, dtype=BF16)
    stages.direct_weight(w.permute(0, 2, 3, 1).contiguous(), transposed=False, u=u)


def direct_conv(x, kernel=3, pad_h=1):
    u = poisoned(9 * 32 * 32, dtype=BF16)
    stages.direct_conv(x, u=u, K=kernel, pad_h=pad_h, z=poisoned(1, 4, 4, 8))


ONES = torch.ones(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: stages.relu_fwd(z, y=z[:, :2].clone()), r"y must have the shape \[1, 4"),
        (lambda z: stages.relu_fwd(z.double(), y=z.double()), "float32, bfloat16 or float16"),
        (lambda z: stages.relu_fwd(z.transpose(1, 2), y=z), "z must be contiguous"),
        (lambda z: stages.relu_fwd(z, y=z, mask=z), "mask must have the shape"),
        (lambda z: stages.relu_diff_fwd(z, dz=z, from_target=odd_images(2), delta=z),
         "from_target must have"),
        (lambda z: stages.relu_pool_fwd(z, pool=2, y=z), "pool must be 0"),
        (lambda z: stages.relu_pool_fwd(z.half(), pool=0, y=z[:, :2, :2]),
         "z must have the dtype of"),
        (lambda z: pack(z, temperature=0.0), "temperature must be positive"),
        (lambda z: pack(z, labels=torch.zeros(1, 4, 8)), "labels must be Long"),
        (lambda z: pack(z, target=z[:, :1], delta=z), "target must have the shape"),
        (lambda z: pack(z, activation=7), "activation must be 0"),
        (lambda z: stages.unit_diff_fwd(z, criterion=0, eps=0.1, eps_inside=True, target=z,
                                        distances=z[..., 0]), "distances must be contiguous"),
        (lambda z: look_up(z, taken_rows=3), "taken must hold the rows of the image from 1"),
        (lambda z: ops.populate(z[..., :3]), "t must be dense in memory"),
        (lambda z: winograd_weight(torch.ones(8, 8, 5, 5)), r"w must be \[C_out, 3, 3, C_in\]"),
        (lambda z: winograd_weight(ONES), r"u must have the shape \[4096\]"),
        (lambda z: winograd_weight(ONES.half()), "w must be float32 or bfloat16"),
        (lambda z: winograd_weight(ONES, u_dtype=BF16, size=4096), "u must be float32 where w is"),
        (lambda z: winograd_weight(ONES, u_dtype=HALF), "u must be float32 or bfloat16"),
        (lambda z: winograd_weight(ONES, tile=3), "tile must be 2 or 4, got 3"),
        (lambda z: winograd(z.half(), u_dtype=BF16), "x must be float32 or bfloat16 where u is"),
        (lambda z: winograd(z, pad_h=2), "pad_h must be 0 or 1"),
        (lambda z: winograd(z, tile=3), "tile must be 2 or 4, got 3"),
        (lambda z: winograd(z.half(), z_dtype=BF16), "or float32, got BFloat16"),
        (lambda z: winograd(z, pad_h=0), r"z must have the shape \[1, 2, 4"),
        (lambda z: direct_weight(ONES[..., :2].bfloat16()), "with an odd K, got"),
        (lambda z: direct_weight(ONES), "w must be BFloat16"),
        (lambda z: direct_conv(z.half()), "x must be float32 or bfloat16"),
        (lambda z: direct_conv(z.bfloat16(), pad_h=2), "pad_h must be in 0 to 1"),
        (lambda z: direct_conv(z.bfloat16(), kernel=2), "K must be odd, got 2"),
    ],
)  # fmt: skip
def test_errors_say_what_is_expected(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(1, 4, 4, 8))


# ---------------------------------------------------------------------------------------- schemas


def opcheck_cases():
    """Of each operator: its first argument, the others."""
    x, dy = torch.randn(1, 3, 4, 6), torch.randn(1, 4, 6, 3)
    t, labels, lse = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 4, 6)), torch.randn(1, 4, 6)
    z, dz, half = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8), torch.randn(1, 2, 3, 8)
    code, mask = torch.zeros(1, 2, 3, 4).byte(), torch.zeros(1, 4, 6, 1).byte()
    table, one, branch = torch.randn(9, 3, 8), torch.ones(1), odd_images(1)
    weight = torch.rand(8)
    rows = torch.zeros(1, 4, 2, dtype=torch.float64)
    values, indices = torch.rand(1, 2, 4, 6), torch.randint(0, 3, (1, 2, 4, 6))
    into = {
        "from_target": branch, "taken": (labels == 1).byte(), "taken_row0": 0, "row0": 0,
        "z": z.clone(), "dz": dz.clone(),
    }  # fmt: skip
    return {
        "softmax_pack_fwd": (x, {
            "activation": 1, "target_activation": 1, "temperature": 2.0, "label_smoothing": 0.1,
            "row0": 0, "rows": 4, "core0": 0, "core_rows": 4, "target": t, "from_target": branch,
            "valid": labels.float(), "ce_mask": lse.abs(),
            "ce_labels": labels, "y": dy.clone(), "delta": dy.clone(), "lse": lse,
            "ce_lse": lse.clone(), "ce_rows": rows,
        }),
        "label_conv_fwd": (labels, {"table": table, "interior": table.sum(0), **into}),
        "topk_conv_fwd": (values, {
            "topk_indices": indices, "topk_rest": lse.abs(), "table": table,
            "rest_table": table.sum(1), **into,
        }),
        "relu_fwd": (z, {"y": z.clone(), "mask": mask}),
        "relu_diff_fwd": (z, {
            "dz": dz, "from_target": branch, "y": z.clone(), "delta": z.clone(), "mask": mask
        }),
        "relu_pool_fwd": (z, {"pool": 0, "y": half.clone(), "code": code}),
        "relu_pool_diff_fwd": (z, {
            "dz": dz, "from_target": branch, "pool": 1, "y": half.clone(), "delta": half.clone(),
            "code": mask,
        }),
        "diff_reduce_fwd": (half, {"criterion": 1, "weight": weight, "seed": half.clone()}),
        "unit_diff_fwd": (z, {
            "criterion": 0, "eps": 1e-10, "eps_inside": False, "target": dz,
            "weight": weight, "seed": z.clone(), "distances": lse.clone(),
        }),
        "relu_pool_bwd": (half, {
            "code": code, "pool": 0, "height": 4, "width": 6, "row0": 0, "dz": z.clone()
        }),
        "relu_bwd": (dz, {"mask": mask, "dz": z.clone()}),
        "softmax_bwd": (x, {
            "lse": x.logsumexp(1), "dy": dy, "scale": one, "activation": 1, "temperature": 1.0,
            "valid": labels.float(), "ce_mask": lse.abs(),
            "ce_labels": labels, "ce_scale": one, "row0": 0, "rows": 4, "dx": x.clone(),
        }),
        "binary_ce_fwd": (x, {
            "labels": x.gt(0).byte(), "row0": 0, "rows": 4, "ce_rows": torch.zeros(1, 4, 2).double()
        }),
        "binary_ce_bwd": (x, {
            "labels": x.gt(0).byte(), "ce_scale": one, "row0": 0, "rows": 4, "dx": x.clone(),
            "clear": True,
        }),
        "winograd_weight": (torch.randn(8, 3, 3, 8), {
            "tile": 2, "transposed": False, "u": torch.zeros(4096)
        }),
        "winograd": (z, {
            "u": torch.randn(4096), "tile": 2, "pad_h": 1, "row0": 0, "z": dz.clone()
        }),
        "direct_weight": (torch.randn(8, 3, 3, 8).bfloat16(), {
            "transposed": False, "u": torch.zeros(9216).bfloat16()
        }),
        "direct_conv": (z.bfloat16(), {
            "u": torch.randn(9216).bfloat16(), "K": 3, "pad_h": 1, "z": dz.clone()
        }),
        "populate": (dz.clone(), {}),
    }  # fmt: skip


@pytest.mark.parametrize("name", [*STAGES, *CPU_ALONE, "populate"])
def test_opcheck(name):
    (first, options), operator = opcheck_cases()[name], getattr(ops, name)
    torch.library.opcheck(operator, (first,), options)


def test_every_operator_has_a_test():
    """Those of a block's backward are CUDA's; texts say what the library is."""
    assert {*STAGES, *CPU_ALONE, "populate"} == set(opcheck_cases())
    of_cuda = {"conv_block_bwd", "conv_block_logits_bwd"}
    assert {*ops._MUTATING, *ops._REDUCING} == set(opcheck_cases()) | of_cuda


# --------------------------------------------------------------------------------- builds, memory


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_builds(capability):
    """The builds for older machines pass the same tests of values."""
    if os.environ.get("GPL_FAST_CPU_CAPABILITY") or ops.cpu_capability() == "default":
        pytest.skip("already a narrow build")
    chosen = "(19 or strips or nan or code or neighbourhood) and not dtype2"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/stages",
               "--ignore-glob=*conv_block*", "--ignore-glob=*large*", "--implementation", "cpu",
               "-k", chosen]  # fmt: skip
    environment = {**os.environ, "GPL_FAST_CPU_CAPABILITY": capability}
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
@pytest.mark.parametrize("shape", [(3, 19, 512, 513), (2, 8, 1024, 1024)])
def test_populate_leaves_no_page_faults(shape):
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("the system does not know MADV_POPULATE_WRITE")
    memory = torch.empty(shape)
    ops.populate(memory)
    before = faults()
    memory.fill_(1)
    assert faults() - before < memory.nbytes / 4096 / 100
    assert memory.sum() == memory.numel()
    ops.populate(memory)  # what is there stays
    assert memory.sum() == memory.numel()

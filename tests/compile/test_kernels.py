"""Every kernel of the package for every architecture: what its launchers would compile.

No spills, no float atomics, shared memory within the limit, few arguments; convolutions by the
architecture's tensor-core instruction with pipelined loads, and on sm_90 without a wait that is not
needed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import product

import pairwise
import pytest
import torch
from ahead_of_time import (
    CAPABILITIES,
    SPILLS_BY_CHOICE,
    Compiled,
    check,
    compiling_for,
    meta,
)
from torch import Tensor

from gpl_fast import kernels, tiles
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import POOLS, Listed

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
LABEL_DTYPE, BYTE = torch.int64, torch.uint8
N, H, W, CLASSES = 2, 512, 512, 150
LISTED = ("labels", "topk", "topk and rest")


def compiled_once(capability, launch) -> Compiled:
    with compiling_for(capability) as compiled:
        launch()
    (entry,) = compiled
    return entry


def but_for_occupancy(compiled: Compiled, form: str) -> Compiled:
    """Without the few bytes that the assembler moves out of a top-k list's loop to stay at 128
    registers or less (168 by some), where more programs fit: 255 are there for what must not spill.
    """
    most = 168 if SPILLS_BY_CHOICE else 128
    by_choice = compiled.registers <= most and compiled.spills <= 128
    return replace(compiled, spills=0) if form.startswith("topk") and by_choice else compiled


# --------------------------------------------------------------------------------- conv_block

FACTORS = {
    "capability": CAPABILITIES,
    "form": ("plain", "diff", *LISTED),
    "dtype": (BF16, HALF, FLOAT),
    "kernel": (1, 3, 5, 7),
    "pool": ("max", "avg", "none", "stride"),
    "c_in": (8, 152, 64),
    "c_out": (128, 64, 21),
    "bias": (False, True),
    "reduce": (False, True),
    "masked": (False, True),
}


def excluded(case: pairwise.Case) -> bool:
    """A list is of a first convolution, of stride 1; a plain map has nothing to reduce."""
    form, pool = case.get("form"), case.get("pool")
    return (
        (pool == "stride" and (form in LISTED or case.get("masked") is True))
        or (form == "plain" and case.get("reduce") is True)
        or (form in ("plain", "diff") and case.get("masked") is True)
    )


COVERING = pairwise.covering(FACTORS, excluded, lambda case: 0.0)


def mask(masked: bool | str) -> Tensor | None:
    """Of pixels, by "weights" of numbers; test_weighted_kernels.py asks for those."""
    return meta(N, H, W, dtype=FLOAT if masked == "weights" else torch.bool) if masked else None


def listed(form: str, dtype: torch.dtype, kernel: int, c_out: int, masked: bool | str):
    taps, grid = kernel**2, (N, H, W)
    table, taken = meta(taps, CLASSES, c_out, dtype=dtype), meta(*grid, dtype=BYTE)
    valid = mask(masked)
    if form == "labels":
        labels, interior = meta(*grid, dtype=LABEL_DTYPE), meta(CLASSES, c_out, dtype=FLOAT)
        return Listed(table, taken, 0, labels=labels, interior=interior, valid=valid)
    values, indices = meta(N, 8, H, W, dtype=FLOAT), meta(N, 8, H, W, dtype=LABEL_DTYPE)
    rest = form == "topk and rest"
    return Listed(
        table, taken, 0, values=values, indices=indices, valid=valid,
        rest=meta(*grid, dtype=FLOAT) if rest else None,
        rest_table=meta(taps, c_out, dtype=FLOAT) if rest else None,
    )  # fmt: skip


def tile_of(
    capability: int, form: str, dtype: torch.dtype, c_in: int, c_out: int, stride: int
) -> tiles.Tile:
    name, row = str(dtype).removeprefix("torch."), "listed" if form in LISTED else form
    return tiles.choose(capability, name, row, c_in, c_out, stride)


def conv_block(
    capability: int, *, form: str, dtype: torch.dtype, kernel: int = 3, pool: str = "max",
    c_in: int = 64, c_out: int = 128, bias: bool = False, reduce: bool = False,
    masked: bool | str = False, tile: tiles.Tile | None = None, allow_tf32: bool = True,
) -> None:  # fmt: skip
    """With the tile that the table has for the architecture, unless one is given."""
    stride = 2 if pool == "stride" else 1
    h, w = (H // stride, W // stride)
    out_h, out_w = (h // 2, w // 2) if pool in ("max", "avg") else (h, w)
    y = meta(N, out_h, out_w, c_out, dtype=dtype)
    code = (N, out_h, out_w, -(-c_out // 2)) if pool == "max" else (N, h, w, -(-c_out // 8))
    a = meta(N, H, W, c_in, dtype=dtype)
    tile = tile or tile_of(capability, form, dtype, c_in, c_out, stride)
    kernels.conv_block_fwd(
        a,
        weight=meta(kernel**2 * c_in, c_out, dtype=dtype),
        kernel_size=kernel, stride=stride, relu=True, pool=POOLS.get(pool, POOLS[""]),
        pad_h=kernel // 2, row0=0, image_rows=h, tile=tile,
        d=a if form == "diff" else None,
        bias=meta(c_out, dtype=FLOAT) if bias else None,
        from_target=None if form == "plain" else meta(N, dtype=torch.bool),
        target=listed(form, dtype, kernel, c_out, masked) if form in LISTED else None,
        y=None if reduce and form == "diff" else y, delta=None if form == "plain" else y,
        code=meta(*code, dtype=BYTE), reduce=reduce, allow_tf32=allow_tf32,
    )  # fmt: skip


def name(case: pairwise.Case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case.values())


def test_every_pair_occurs():
    met = set().union(*map(pairwise.pairs_of, COVERING))
    assert pairwise.all_pairs(FACTORS, excluded) <= met


def check_conv_block(capability: int, options: dict) -> Compiled:
    """Compile it, and all that is asked of one."""
    dtype, c_in, c_out = options["dtype"], options.get("c_in", 64), options.get("c_out", 128)
    stride, kernel = 1 + (options.get("pool") == "stride"), options.get("kernel", 3)
    tile = tile_of(capability, options["form"], dtype, c_in, c_out, stride)
    compiled = compiled_once(capability, lambda: conv_block(capability, **options))
    # Copies of 4 bytes are the smallest there are: rows of 21 halves begin in between.
    copied = c_out % 8 == 0 and (tile.descriptors or tiles.fences_copies() or tile.stages > 1)
    # And one step is no loop.
    pipelined = copied and kernel**2 * c_in > tile.block_k
    # At 128 registers or less, where more programs fit, the assembler moves a few bytes by choice.
    few = 128 if options["form"] == "topk and rest" else 16 if compiled.registers <= 128 else 0
    check(replace(compiled, spills=max(compiled.spills - few, 0)), pipelined=pipelined)
    assert compiled.arguments <= 20
    assert compiled.warps == tile.warps
    assert ("TMA load" in compiled.instructions) == tile.descriptors
    if capability == 90 and dtype != FLOAT and pipelined:
        branches = 2 if options["form"] == "diff" else 1
        assert compiled.slow(branches * tile.block_k // 16) == []
    return compiled


@pytest.mark.parametrize("case", COVERING, ids=name)
def test_conv_block(case):
    options = dict(case)
    check_conv_block(options.pop("capability"), options)


# The layers of the default network: the first of Cityscapes and of ADE20K, then the others.
LAYERS = {
    "form": ("diff", "plain", *LISTED),
    "layer": ((24, 64), (152, 64), (64, 128), (256, 512)),
    "pool": ("max", "avg", "none", "stride"),
    "dtype": (BF16, HALF),
    "reduce": (True, False),
    "bias": (False, True),
}


def no_layer(case: pairwise.Case) -> bool:
    """A list is of the first layer."""
    later = case.get("layer", (0, 0))[1] > 64
    return excluded(case) or (later and case.get("form") in LISTED)


@pytest.mark.parametrize("case", pairwise.covering(LAYERS, no_layer, lambda case: 0.0), ids=name)
def test_nothing_waits_on_sm_90(case):
    options = dict(case)
    c_in, c_out = options.pop("layer")
    check_conv_block(90, options | {"c_in": c_in, "c_out": c_out})


def launches_of_rows():
    """Each row of the table, by each architecture and form that takes it: uncut, with as many
    channels as the tile has and more, or where it is of odd ones."""
    found = {}
    for capability, dtype, form, c_out, stride in product(
        CAPABILITIES, ("bfloat16", "float16", "float32"), tiles.FORMS, (64, 512, 21), (1, 2)
    ):
        if stride == 1 or form == "diff":
            row = tiles.row_of(capability, dtype, form, 192, c_out, stride)
            case = capability, {"listed": "topk and rest"}.get(form, form), dtype, c_out, stride
            found.setdefault((capability, id(row), form == "listed"), case)
    return found


ROWS = launches_of_rows()


@pytest.mark.parametrize("case", ROWS.values(), ids=lambda case: "-".join(map(str, case)))
def test_rows_of_the_table(case):
    capability, form, dtype, c_out, stride = case
    options = {"form": form, "dtype": getattr(torch, dtype), "c_in": 192, "c_out": c_out}
    check_conv_block(capability, options | {"pool": "stride" if stride == 2 else "max"})


def test_every_row_is_run_somewhere():
    assert {row for _, row, _ in ROWS} == set(map(id, tiles.rows()))


@pytest.mark.parametrize("capability", [80, 86, 89])
def test_true_float32(capability):
    """Its products are not the tensor cores'. The walks leave it to ATen; from sm_90 on the tiles
    of TF32 spill.
    """
    options = {"form": "labels" if capability % 2 else "diff", "dtype": FLOAT}
    options |= {"allow_tf32": False}
    compiled = compiled_once(capability, lambda: conv_block(capability, **options))
    if SPILLS_BY_CHOICE:  # 608 bytes on sm_80: no walk launches it
        compiled = replace(compiled, spills=0)
    check(compiled, tensor_core=None, pipelined=False)


# -------------------------------------------------------------------------------- other stages


def logits(layout: str, dtype: torch.dtype, channels: int) -> Tensor:
    x = meta(N, channels, H, W, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


PACK = {
    "capability": CAPABILITIES,
    "kind": ("none", "dense", *LISTED),
    "layout": ("nchw", "channels_last"),
    "dtype": (FLOAT, BF16, HALF),
    "maps": (BF16, FLOAT, HALF),
    "channels": (1, 19, 150, 1203),
    "activation": (1, 2, 0),
    "cross_entropy": ("none", "shared", "own"),
    "masked": (False, True),
}


def no_extra(case: pairwise.Case) -> bool:
    """Softmax at temperature 1 shares its log-sum-exp with the cross-entropy."""
    return case.get("activation") in (0, 2) and case.get("cross_entropy") == "shared"


def softmax_pack(
    *, kind: str, layout: str, dtype: torch.dtype, maps: torch.dtype, channels: int,
    activation: int, cross_entropy: str, masked: bool | str,
) -> None:  # fmt: skip
    x, grid = logits(layout, dtype, channels), (N, H, W)
    y = meta(*grid, padded_channels(channels), dtype=maps)
    own = cross_entropy == "own"
    temperature = 2.0 if own else 1.0
    target = listed(kind, maps, 3, 64, masked) if kind in LISTED else None
    kernels.softmax_pack_fwd(
        x, activation=activation, target_activation=activation, temperature=temperature,
        label_smoothing=0.1 if own else 0.0, row0=0, rows=H, core0=0, core_rows=H,
        valid=mask(masked),
        target=x if kind == "dense" else None,
        from_target=meta(N, dtype=torch.bool) if kind == "dense" else None,
        labels=target.labels if target else None,
        topk_values=target.values if target else None,
        topk_indices=target.indices if target else None,
        topk_rest=target.rest if target else None,
        ce_labels=meta(*grid, dtype=LABEL_DTYPE) if cross_entropy != "none" else None,
        ce_mask=mask(masked) if masked == "weights" and cross_entropy != "none" else None,
        class_weight=meta(channels, dtype=FLOAT) if own else None,
        y=y, delta=y if kind == "dense" else None,
        taken=meta(*grid, dtype=BYTE) if target else None,
        lse=meta(*grid, dtype=FLOAT) if activation == 1 else None,
        ce_lse=meta(*grid, dtype=FLOAT) if cross_entropy != "none" else None,
        ce_rows=meta(N, H, 2, dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("case", pairwise.covering(PACK, no_extra, lambda case: 0.0), ids=name)
def test_softmax_pack(case):
    options = dict(case)
    capability = options.pop("capability")
    with compiling_for(capability) as compiled:
        softmax_pack(**options)  # and the sums of rows of a cross-entropy
    for each in compiled:
        check(but_for_occupancy(each, case["kind"]), tensor_core=None, pipelined=False)


BWD = {key: PACK[key] for key in PACK if key != "kind"}


def softmax_bwd(
    *, layout: str, dtype: torch.dtype, maps: torch.dtype, channels: int, activation: int,
    cross_entropy: str, masked: bool | str,
) -> None:  # fmt: skip
    x, grid, counted = logits(layout, dtype, channels), (N, H, W), cross_entropy != "none"
    own = cross_entropy == "own"
    kernels.softmax_bwd(
        x, activation=activation, temperature=2.0 if own else 1.0,
        label_smoothing=0.1 if own else 0.0, row0=0, rows=H, dx=x,
        lse=meta(*grid, dtype=FLOAT) if activation == 1 else None,
        dy=meta(*grid, padded_channels(channels), dtype=maps),
        scale=meta(N, dtype=FLOAT),
        valid=mask(masked),
        ce_labels=meta(*grid, dtype=LABEL_DTYPE) if counted else None,
        ce_mask=mask(masked) if masked == "weights" and counted else None,
        ce_lse=meta(*grid, dtype=FLOAT) if own else None,
        ce_scale=meta(N, dtype=FLOAT) if counted else None,
        class_weight=meta(channels, dtype=FLOAT) if own else None,
    )  # fmt: skip


@pytest.mark.parametrize("case", pairwise.covering(BWD, no_extra, lambda case: 0.0), ids=name)
def test_softmax_bwd(case):
    options = dict(case)
    capability = options.pop("capability")
    compiled = compiled_once(capability, lambda: softmax_bwd(**options))
    check(compiled, tensor_core=None, pipelined=False)


def small_stages(dtype: torch.dtype, c: int, weighted: bool = False) -> dict:
    """Launches of the elementwise stages, the look-ups and the reduction."""
    z, branch = meta(N, H, W, c, dtype=dtype), meta(N, dtype=torch.bool)
    y = meta(N, H // 2, W // 2, c, dtype=dtype)
    bits = meta(N, H, W, -(-c // 8), dtype=BYTE)
    code = {0: meta(N, H // 2, W // 2, -(-c // 2), dtype=BYTE), 1: bits}
    both = {"dz": z, "from_target": branch}
    stages = {
        "relu": lambda: kernels.relu_fwd(z, y=z, mask=bits),
        "relu_diff": lambda: kernels.relu_diff_fwd(z, **both, y=z, delta=z, mask=bits),
        "relu_bwd": lambda: kernels.relu_bwd(z, mask=bits, dz=z),
        "diff_reduce": lambda: kernels.diff_reduce_fwd(z),
    }
    weight, wide = meta(c, dtype=FLOAT), meta(N, H, W, c, dtype=FLOAT)
    seeds = {"l1": {"criterion": 1, "seed": z}, "l2 weighted": {"weight": weight, "seed": z}}
    for form, given in seeds.items():
        stages |= {
            f"seed {form}": lambda g=given: kernels.diff_reduce_fwd(z, **g),
            f"unit_diff {form}": lambda g=given: kernels.unit_diff_fwd(
                z, **{"criterion": 0, **g, "seed": wide}, eps=1e-10, eps_inside=False, target=z
            ),
        }  # fmt: skip
    stages["unit_diff float32 target"] = lambda: kernels.unit_diff_fwd(
        z, criterion=0, eps=1e-8, eps_inside=True, target=wide, weight=weight, seed=z
    )
    stages["unit_diff pixels"] = lambda: kernels.unit_diff_fwd(
        z, criterion=0, eps=1e-10, eps_inside=False, target=z, seed=wide,
        distances=meta(N, H, W, dtype=FLOAT),
    )  # fmt: skip
    for pool in (0, 1):
        made = {"pool": pool, "code": code[pool]}
        stages |= {
            f"pool {pool}": lambda m=made: kernels.relu_pool_fwd(z, **m, y=y),
            f"pool_diff {pool}": lambda m=made: kernels.relu_pool_diff_fwd(
                z, **both, **m, y=y, delta=y
            ),
            f"pool_bwd {pool}": lambda m=made: kernels.relu_pool_bwd(
                y, **m, height=H, width=W, row0=0, dz=z
            ),
        }
    for form in LISTED:
        t = listed(form, dtype, 3, c, "weights" if weighted else form != "labels")
        given = {"table": t.table, "from_target": branch, "taken": t.taken, "valid": t.valid}
        given |= {"taken_row0": 0, "row0": 0, "z": z, "dz": z}
        if form == "labels":
            stages[form] = lambda t=t, given=given: kernels.label_conv_fwd(
                t.labels, **given, interior=t.interior
            )
        else:
            stages[form] = lambda t=t, given=given: kernels.topk_conv_fwd(
                t.values, **given, topk_indices=t.indices, topk_rest=t.rest,
                rest_table=t.rest_table,
            )  # fmt: skip
    return stages


SMALL = {
    "capability": CAPABILITIES,
    "stage": tuple(small_stages(FLOAT, 8)),
    "dtype": (BF16, FLOAT, HALF),
    "c": (64, 21, 512),
}


@pytest.mark.parametrize(
    "case", pairwise.covering(SMALL, lambda case: False, lambda case: 0.0), ids=name
)
def test_other_stages(case):
    launch = small_stages(case["dtype"], case["c"])[case["stage"]]
    compiled = but_for_occupancy(compiled_once(case["capability"], launch), case["stage"])
    check(compiled, tensor_core=None, pipelined=False)


# ---------------------------------------------------------------------------------------- branch

LOOKS = {
    "capability": CAPABILITIES,
    "kind": ("dense", *LISTED),
    "activation": (1, 2, 0),
    "channels": (150, 19, 1203),
    "masked": (False, True),
}


@pytest.mark.parametrize(
    "case", pairwise.covering(LOOKS, lambda case: False, lambda case: 0.0), ids=name
)
def test_which_branch(case):
    kind, grid, c = case["kind"], (N, H, W), case["channels"]
    x = meta(N, c, H, W, dtype=FLOAT)
    target = {"dense": x} if kind == "dense" else {}
    if kind == "dense" and case["masked"]:  # of another size
        target = {"dense": meta(N, c, H // 2, W // 2, dtype=FLOAT)}
    if kind == "labels":
        target = {"labels": meta(*grid, dtype=LABEL_DTYPE)}
    elif kind != "dense":
        target = {"topk_values": meta(N, 8, H, W, dtype=FLOAT)}
        target |= {"topk_indices": meta(N, 8, H, W, dtype=LABEL_DTYPE)}
    if kind == "topk and rest":
        target["topk_rest"] = meta(*grid, dtype=FLOAT)
    if case["masked"]:
        target["valid"] = meta(*grid, dtype=torch.bool)
    with compiling_for(case["capability"]) as compiled:
        kernels.carry_target_fwd(
            x, activation=case["activation"], target_activation=case["activation"],
            temperature=1.0, step=(32, 8), near=1 / 32, from_target=meta(N, dtype=torch.bool),
            **target,
        )  # fmt: skip
    assert len(compiled) == 2
    for each in compiled:
        each = but_for_occupancy(each, case["kind"])
        check(each, tensor_core=None, pipelined=False)
        assert each.arguments <= 20


# --------------------------------------------------------------------------------------- corners

ONES = {
    "one column": (2, 512, 1, 150, 8, 64),
    "one row": (2, 1, 512, 150, 8, 64),
    "one of everything": (1, 1, 1, 1, 8, 1),
}  # N, H, W, classes, channels in and out


@pytest.mark.parametrize("shape", ONES)
def test_sizes_of_one_compile(shape, monkeypatch):
    """Triton makes constants of them, which have fewer methods than numbers; the interpreter does
    not."""
    n, h, w, classes, c_in, c_out = ONES[shape]
    for key, value in {"N": n, "H": h, "W": w, "CLASSES": classes}.items():
        monkeypatch.setattr(f"{__name__}.{key}", value)
    stages = small_stages(FLOAT, c_out)
    stages |= {
        f"conv_block {form} {pool}": lambda form=form, pool=pool: conv_block(
            90, form=form, dtype=BF16, pool=pool, c_in=c_in, c_out=c_out
        )
        for form, pool in (("diff", "max"), ("labels", "none"), ("topk and rest", "avg"))
    }
    maps = {"dtype": FLOAT, "maps": BF16, "channels": classes, "activation": 2, "masked": True}
    maps |= {"layout": "nchw", "cross_entropy": "own"}
    stages |= {
        f"pack {kind}": lambda kind=kind: softmax_pack(kind=kind, **maps)
        for kind in ("dense", "labels", "topk and rest")
    }
    stages["softmax_bwd"] = lambda: softmax_bwd(**maps)
    with compiling_for(90) as compiled:
        for launch in stages.values():
            launch()
    assert len(compiled) >= len(stages) - 4  # a pool of one row or column has no window
    assert not [hazard for each in compiled for hazard in each.hazards()]


def test_any_image_of_a_batch_takes_the_same_kernel(monkeypatch):
    """What has one element an image begins at any address; a kernel takes seconds to compile."""
    whole = meta
    first = 0

    def shifted(*shape, dtype):
        if len(shape) > 1:
            return whole(*shape, dtype=dtype)
        return whole(shape[0] + first, dtype=dtype)[first:]

    monkeypatch.setattr(f"{__name__}.meta", shifted)
    loaded, maps = {}, {"layout": "nchw", "dtype": FLOAT, "maps": BF16, "channels": 19}
    maps |= {"activation": 1, "cross_entropy": "shared", "masked": False}
    for first in (0, 3):
        with compiling_for(90):
            conv_block(90, form="diff", dtype=BF16)
            softmax_pack(kind="dense", **maps)
            softmax_bwd(**maps)
            small_stages(FLOAT, 8)["pool_diff 0"]()
        loaded[first] = [
            len(kernel.device_caches[90][0])
            for kernel in (
                sys.modules[kernels.conv_block_fwd.__module__]._conv_block_fwd_kernel,
                sys.modules[kernels.softmax_pack_fwd.__module__]._softmax_pack_fwd_kernel,
                sys.modules[kernels.softmax_bwd.__module__]._softmax_bwd_kernel,
                sys.modules[kernels.relu_pool_fwd.__module__]._relu_pool_fwd_kernel,
            )
        ]
    assert loaded[0] == loaded[3]
    assert min(loaded[0]) > 0


def loads_and_stores(compiled: Compiled) -> set[str]:
    return set(re.findall(r"\b(?:ld|st)\.global[\w.]*|cp\.async\.c[ag]", compiled.assembly))


def test_maps_are_read_and_written_in_whole_vectors():
    """Logits along a row and maps along their channels, for any number of classes: 16 bytes."""
    options = {"layout": "nchw", "dtype": FLOAT, "maps": BF16, "channels": 150, "activation": 1}
    options |= {"cross_entropy": "none", "masked": False}
    back = compiled_once(80, lambda: softmax_bwd(**options))
    assert not {"ld.global.b16", "st.global.b32"} & loads_and_stores(back)
    pack = compiled_once(80, lambda: softmax_pack(kind="dense", **options))
    assert not {"ld.global.b32", "st.global.b16"} & loads_and_stores(pack)


def test_the_first_layer_of_one_channel_is_pipelined():
    """8 channels are less than what Triton specialises on by itself."""
    compiled = compiled_once(80, lambda: conv_block(80, form="diff", dtype=BF16, c_in=8))
    check(compiled)
    assert "ld.global.b16" not in loads_and_stores(compiled)


# ------------------------------------------------------------------------------- for information


def test_an_amd_architecture():
    compiled = compiled_once("gfx942", lambda: conv_block(80, form="labels", dtype=BF16))
    # No tile is chosen for it, and Triton 3.6.0 spills 128 bytes of sm_80's.
    assert compiled.spills <= 128
    check(replace(compiled, spills=0), tensor_core="mfma")

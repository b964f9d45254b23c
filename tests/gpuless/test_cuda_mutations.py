"""Fault injection: each change of the kernels' text must make the test that it names fail."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import emulate
import operators
import pytest

# Minutes of compiling on a machine that has other work too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FLAGS = ("-O1", *emulate.MACHINE)
# Importing torch and what the tests need takes longer than most of them: once, then by fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pytest", "hypothesis", "gpl_fast"])
STAGES = "tests/stages/test_conv_block"
BLOCK, LOGITS = f"{STAGES}_bwd.py::test_", f"{STAGES}_logits_bwd.py::test_"
COUNTS = f"{STAGES}_counts.py::test_"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    test: str


DZ, TILE, BLOCKS = "conv_block/dz_tile", "conv_block/conv_tile", "conv_block/conv_block"
SM80, SM90 = "conv_block/conv_block_bwd", "conv_block/conv_block_bwd_sm90"
PIXEL, GRADIENT = "conv_block/logits_pixel", "logits_gradient"
SOFTMAX, CHANNELS = "softmax_bwd", "channel_tile"
SUMS = "tests/stages/test_softmax_bwd.py::test_"
BINARY = "tests/stages/test_binary_ce.py::test_"
FORWARD, HALO = "conv_block/conv_block_fwd_sm90", f"{STAGES}_halo.py::test_"
PUT = "in_place ? px.put_dy(n0 + c, dy(c))"
# fmt: off
MUTATIONS = [
    Mutation("no barrier in the ring", SM80, "    ptx::cp_async_wait<S::kStages - 2>();\n    __syncthreads();", "    ptx::cp_async_wait<S::kStages - 2>();", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("a lax wait for the ring", SM80, "cp_async_wait<S::kStages - 2>", "cp_async_wait<S::kStages - 1>", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("a shifted tap", DZ, "(phase - reach + first) / stride", "(phase - reach + first) / stride + 1", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("rows and columns of a tap swapped", SM80, "(t.rows.first + at.row * stride) * (int)a.conv.K", "(t.rows.first + at.column * stride) * (int)a.conv.K", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("left and right winners swapped", DZ, "1u << (8 * winner + e)", "1u << (8 * (winner ^ 1) + e)", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("no predicate at the left border", DZ, "j < 0 || ", "", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("no predicate at the right border", BLOCKS, "p.in_strip = p.w < a.conv.W && ", "p.in_strip = ", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("no swizzle of dZ", DZ, "((unit ^ (pixel & 7)) << 4)", "(unit << 4)", COUNTS + "no_bank_conflicts[cuda-80-dtype1]"),  # noqa: E501
    Mutation("no swizzle of the weights", TILE, "((unit ^ (S::kUnit == 8 ? row & 7 : (row & 3) << 1)) << 4)", "(unit << 4)", COUNTS + "no_bank_conflicts[cuda-80-dtype1]"),  # noqa: E501
    Mutation("no pitch of dx", BLOCKS, "kLogits ? C : C + 8", "kLogits ? C : C + 4", COUNTS + "no_bank_conflicts[cuda-80-dtype1]"),  # noqa: E501
    Mutation("no swizzle of the logits' dx", BLOCKS, " | (pixel >> 4 & 1);", ";", COUNTS + "no_bank_conflicts_of_logits[cuda-80-19-False]"),  # noqa: E501
    Mutation("the halves of dx not swapped", BLOCKS, "order ? second.v[e] : first.v[e]", "first.v[e]", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("a whole instead of a quarter", DZ, "scale(r, 0.25f)", "scale(r, 1.0f)", BLOCK + "sizes[cuda-80-1-size4]"),  # noqa: E501
    Mutation("the next chunk over this one", SM80, "(~at.chunk & 1)", "(at.chunk & 1)", BLOCK + "orders_agree_bit_for_bit[cuda-80-dtype0]"),  # noqa: E501
    Mutation("dx read before it is staged", SM80, "stage_rows<L>(warp, i, dx);\n    __syncthreads();", "stage_rows<L>(warp, i, dx);", BLOCK + "sizes[cuda-80-0-size4]"),  # noqa: E501
    Mutation("an old dZ for the next classes", SM80, "tile > 0 && one_chunk", "tile > 0", LOGITS + "orders_agree_bit_for_bit[cuda-80-257]"),  # noqa: E501
    Mutation("sums of one lane", BLOCKS, "for (int l = 1; l < lanes; ++l)", "for (int l = 1; l < 1; ++l)", LOGITS + "orders_agree_bit_for_bit[cuda-80-19]"),  # noqa: E501
    Mutation("sums of unrounded values", SM80, PUT, "in_place ? (px.put_dy(n0 + c, dy(c)), dy(c))", LOGITS + "sums_take_the_stored_gradient[cuda-80]"),  # noqa: E501
    Mutation("a mask that multiplies", PIXEL, "if (!valid_) g = 0.0f;", "g *= valid_;", LOGITS + "masked_pixels_may_hold_nan[cuda-80-19-1]"),  # noqa: E501
    Mutation("x / T alone", GRADIENT, "(x - lse) * rate", "x * rate - lse * rate", LOGITS + "any_temperature[cuda-80-0.3-19]"),  # noqa: E501
    Mutation("1 / T first", PIXEL, "a.scale[n] * weight}", "a.scale[n] * a.inv_t * weight}", LOGITS + "any_temperature[cuda-80-1e-30-19]"),  # noqa: E501
    Mutation("the label's neighbour", GRADIENT, "c == label ?", "c == label + 1 ?", LOGITS + "cross_entropy_and_masks[cuda-80-1-19]"),  # noqa: E501
    Mutation("the sums of one warp", SOFTMAX, "k < 1 << work_.log2_warps", "k < 1", SUMS + "shared_memory_of_every_gpu[cuda-150]"),  # noqa: E501
    Mutation("dy read before it is there", SOFTMAX, "    ptx::cp_async_wait<0>();\n", "", SUMS + "orders_agree_bit_for_bit[cuda-1300]"),  # noqa: E501
    Mutation("dy read before others have copied it", SOFTMAX, "<0>();\n    __syncthreads();", "<0>();", SUMS + "orders_agree_bit_for_bit[cuda-1300]"),  # noqa: E501
    Mutation("the next chunk of dy over this one", SOFTMAX, "if (step > first && step != chunks) __syncthreads();", "", SUMS + "orders_agree_bit_for_bit[cuda-1300]"),  # noqa: E501
    Mutation("sums read before others have them", SOFTMAX, "= sums_;\n      __syncthreads();", "= sums_;", SUMS + "orders_agree_bit_for_bit[cuda-1300]"),  # noqa: E501
    Mutation("pixels 128 bytes apart", CHANNELS, " + (pixel >> shift_)) * 16", ") * 16", SUMS + "no_bank_conflicts[cuda-dtype0-nchw]"),  # noqa: E501
    Mutation("the expected bytes of one slab", SM90, "bars.full + r.at, L::kStageBytes", "bars.full + r.at, kSlabBytes", BLOCK + "orders_agree_bit_for_bit[cuda-90-dtype0]"),  # noqa: E501
    Mutation("the wrong phase of the ring", SM90, "bars.empty + r.at, r.phase ^ 1", "bars.empty + r.at, r.phase", BLOCK + "sizes[cuda-90-0-size4]"),  # noqa: E501
    Mutation("no wait for the products", SM90, "ptx::wgmma_wait<0>();", "", BLOCK + "sizes[cuda-90-0-size4]"),  # noqa: E501
    Mutation("the wrong step along K", SM90, "b + q * 128", "b + q * 64", BLOCK + "sizes[cuda-90-0-size4]"),  # noqa: E501
    Mutation("too many expanders awaited", SM90, "dz_full + s, kExpanders", "dz_full + s, kExpanders + 1", BLOCK + "sizes[cuda-90-0-size4]"),  # noqa: E501
    Mutation("dx read before its warp has it", SM90, "  }\n  __syncwarp();\n}", "  }\n}", BLOCK + "sizes[cuda-90-0-size4]"),  # noqa: E501
    Mutation("the halo's bytes of one map", FORWARD, "bars.full + at, L::kStage)", "bars.full + at, L::kStage - L::kMap)", HALO + "orders_agree_bit_for_bit[cuda-90-64]"),  # noqa: E501
    Mutation("a stage filled before it was read", FORWARD, "int at = 0, phase = 1;", "int at = 0, phase = 0;", HALO + "against_float64[cuda-90-one row]"),  # noqa: E501
    Mutation("a stage given back while it is read", FORWARD, "bars.empty + (at ^ 1)", "bars.empty + at", HALO + "orders_agree_bit_for_bit[cuda-90-64]"),  # noqa: E501
    Mutation("a lax wait for the products before", FORWARD, "ptx::wgmma_wait<1>();", "", HALO + "against_float64[cuda-90-two tiles of 128]"),  # noqa: E501
    Mutation("no wait for the last products", FORWARD, "  ptx::wgmma_wait<0>();", "", HALO + "against_float64[cuda-90-64 channels]"),  # noqa: E501
    Mutation("columns of taps the other way around", FORWARD, "t.w0 + column - 1, h, t.n);\n      ptx::tma_load(stage + L::kMap", "t.w0 + 1 - column, h, t.n);\n      ptx::tma_load(stage + L::kMap", HALO + "against_float64[cuda-90-64 channels]"),  # noqa: E501
    Mutation("the same rows for each row of taps", FORWARD, "(row * kRowBytes + k * 32) >> 4", "(k * 32) >> 4", HALO + "against_float64[cuda-90-64 channels]"),  # noqa: E501
    Mutation("half a step along the channels of pixels", FORWARD, "k * 32) >> 4", "k * 16) >> 4", HALO + "against_float64[cuda-90-64 channels]"),  # noqa: E501
    Mutation("both warpgroups at the first channels", FORWARD, "(t.c0 + (L::kSplitsRows ? 0 : group * 64))", "(t.c0)", HALO + "against_float64[cuda-90-128 channels]"),  # noqa: E501
    Mutation("the other branch's winner", FORWARD, "best = p, code = i;", "best = o, code = i;", HALO + "the_same_z_gives_the_operators_bits[cuda-90-64-dtype0]"),  # noqa: E501
    Mutation("a later tie wins", FORWARD, "return value > best ||", "return value >= best ||", HALO + "the_same_z_gives_the_operators_bits[cuda-90-64-dtype0]"),  # noqa: E501
    Mutation("rows outside the image", FORWARD, "row >= 0 && row < a_.image_rows", "row < a_.image_rows", HALO + "strips_equal_the_whole[cuda-90-64]"),  # noqa: E501
    Mutation("what is put out read before it is there", FORWARD, "  ptx::barrier_sync(1, kHaloConsumers);\n", "", HALO + "orders_agree_bit_for_bit[cuda-90-64]"),  # noqa: E501
    Mutation("no pitch of what is put out", FORWARD, "kPitch = 64 * 2 + 16", "kPitch = 64 * 2", HALO + "no_bank_conflicts_and_no_product_twice[cuda-90-64]"),  # noqa: E501
    Mutation("sums of unrounded values of delta", FORWARD, "squares = fmaf(widen(delta), widen(delta), squares)", "squares = fmaf(w.delta, w.delta, squares)", HALO + "against_float64[cuda-90-64 channels]"),  # noqa: E501
    Mutation("what does not count is not cleared", "binary_ce", "if (a.clear) *dx = narrow<X>(0.0f);", "", BINARY + "what_does_not_count_is_left_or_cleared[cuda]"),  # noqa: E501
    Mutation("labels of positives as of negatives", "binary_ce", "label == 1, c", "label == 0, c", BINARY + "infinite_logits_have_gradients_of_zero_and_one[cuda]"),  # noqa: E501
    Mutation("labels read before they are there", "binary_ce", "      }\n    }\n    __syncthreads();", "      }\n    }", BINARY + "orders_of_the_gradient_agree_bit_for_bit[cuda]"),  # noqa: E501
    Mutation("the next labels over these", "binary_ce", "    }\n    __syncthreads();\n  }\n}", "    }\n  }\n}", BINARY + "orders_of_the_gradient_agree_bit_for_bit[cuda]"),  # noqa: E501
    Mutation("a strip's first row at the image's", "binary_ce", "h = a.strip.row0 + r, w", "h = r, w", BINARY + "strips_of_the_gradient[cuda]"),  # noqa: E501
]
# fmt: on

# Only bfloat16 and the tiles that the named tests meet, so that a mutation compiles in seconds.
FEWER = {
    "conv_block/conv_block_bwd.cu": [
        ("a.dtype == DType::kFloat16 ? launch_tile<Math::kFloat16>(a, stream)", "false ? false"),
        ("a.allow_tf32               ? launch_tile<Math::kTF32>(a, stream)", "false ? false"),
        ("launch_tile<Math::kFloat32>(a, stream);", "false;"),
        ("(a.C_in > 64 && launch<true, kMath, 160>(a, stream)) ||", ""),
        ("(a.C_in > 32 && launch<true, kMath, 64>(a, stream)) ||", ""),
    ],
    "conv_block/conv_block_bwd_sm90.cu": [
        ("if (a.dtype == DType::kFloat16) return launch_tile<__half>(a, stream);", ""),
        ("if (a.C_in <= 64) return launch<T, 64, true>(a, stream);", ""),
        ("return a.C_in <= 160 ? launch<T, 160, true>(a, stream) : ", "return "),
    ],
    "conv_block/conv_block_fwd_sm90.cu": [("launch_tile<__half>(a, (cudaStream_t)stream);", "")],
    "softmax_bwd.cu": [
        ("with_dtype(a.x_dtype, [&](auto x)", "[&](auto f) { f(0.0f); }([&](auto x)"),
        ("with_dtype(a.dy ? a.dtype : DType::kFloat32,", "[&](auto f) { f(0.0f); }("),
    ],
}


def reduced(folder: Path) -> Path:
    """A copy of csrc with fewer instances."""
    csrc = folder / "csrc"
    shutil.copytree(emulate.CSRC, csrc)
    for name, changes in FEWER.items():
        path = csrc / "cuda" / name
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text)
    return csrc


def mutated(csrc: Path, mutation: Mutation) -> None:
    path = csrc / "cuda" / f"{mutation.file}.cuh"
    text = path.read_text()
    assert mutation.old in text, mutation.name
    path.write_text(text.replace(mutation.old, mutation.new))


def outcome(folder: Path, objects: dict[str, Path], tests: list[str]) -> str:
    """Output of the tests on kernels, by their sources."""
    built = operators.linked([*objects.values()], folder / "libgpl_fast_emulated.so")
    process = FORKS.Process(target=run_tests, args=(built, tests, folder / "output"))
    process.start()
    process.join()
    return (folder / "output").read_text(errors="replace")


def run_tests(built: Path, tests: list[str], output: Path) -> None:
    """In a process of its own, which a mutation may crash."""
    with output.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ["GPL_FAST_TEST_OPERATORS"] = str(built)
    os.chdir(emulate.ROOT)
    pytest.main(["-p", "no:cacheprovider", "--timeout=120", "--implementation", "cuda", *tests])


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The kernels without mutation, and the output of the named tests on them."""
    folder = tmp_path_factory.mktemp("unchanged")
    made = emulate.kernels(FEWER, FLAGS, reduced(folder), folder)
    others = set(emulate.ELEMENTWISE) - set(FEWER)
    objects = {
        **dict(zip(FEWER, made, strict=True)),
        **{n: emulate.kernels([n])[0] for n in others},
    }
    return objects, outcome(folder, objects, sorted({m.test for m in MUTATIONS}))


@pytest.fixture(scope="module")
def outcomes(unchanged, tmp_path_factory):
    """The output of the named test, to come, of every mutation: they are made side by side."""

    def one(folder: Path, m: Mutation) -> str:
        csrc, objects = reduced(folder), dict(unchanged[0])
        mutated(csrc, m)
        # The named test tells which kernel has to be compiled again.
        again = emulate.CONVOLUTIONS["[cuda-90" in m.test]
        again = {SUMS: "softmax_bwd.cu", BINARY: "binary_ce.cu", HALO: emulate.FORWARD[0]}.get(
            f"{m.test.partition('::')[0]}::test_", again
        )
        (objects[again],) = emulate.kernels([again], FLAGS, csrc, folder)
        return outcome(folder, objects, [m.test])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {m.name: pool.submit(one, tmp_path_factory.mktemp("mutated"), m) for m in MUTATIONS}
        pool.shutdown(cancel_futures=True)


def test_named_tests_pass_without_mutation(unchanged):
    named = {m.test for m in MUTATIONS}
    assert f"{len(named)} passed" in unchanged[1], unchanged[1][-3000:]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_caught(outcomes, mutation):
    text = outcomes[mutation.name].result()
    assert f"FAILED {mutation.test}" in text or "Fatal Python error" in text, text[-3000:]

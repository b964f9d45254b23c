"""What nvcc made of the CUDA kernels in the library that is built: spills, registers, shared
memory, instructions, for every GPU."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpl_fast import ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import registers  # noqa: E402
from hazards import overwritten  # noqa: E402
from instructions import loops, parse, per_element  # noqa: E402

if registers.cuobjdump() is None:
    pytest.skip("cuobjdump is not there", allow_module_level=True)
if not ops.LIBRARY.exists() or not registers.usage():
    pytest.skip("the library that is built has no CUDA operators", allow_module_level=True)

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# KiB of shared memory that a block may have.
LIMIT = {"80": 163, "86": 99, "89": 99, "90a": 227, "100": 227, "120": 99}
OPCODES = ("HMMA", "LDSM", "LDGSTS", "HGMMA", "UTMALDG", "USETMAXREG", "WARPGROUP.DEPBAR", "FFMA",
           "LDL", "STL", "RED", "ATOM")  # fmt: skip
GENERAL, HOPPER = "conv_block_bwd_kernel", "conv_block_bwd_sm90_kernel"
FORWARD = "conv_block_fwd_sm90_kernel"
LOGITS, SOFTMAX = "conv_block_logits_bwd_kernel", "softmax_bwd_kernel"


def kernels(*prefixes: str) -> list[str]:
    return [name for name in registers.usage() if name.startswith(prefixes or ("",))]


@functools.cache
def sass(architecture: str) -> dict[str, str]:
    """Kernel -> its machine code."""
    command = [registers.cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(ops.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts = text.split("Function : ")[1:]
    names = "\n".join(text.split(maxsplit=1)[0] for text in texts)
    found = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    short = map(registers.short_name, found.stdout.splitlines())
    return dict(zip(short, texts, strict=True))


def instructions(architecture: str) -> dict[str, dict[str, int]]:
    """Kernel -> how often an instruction of each of `OPCODES` is in its machine code."""
    return {
        name: {opcode: text.count(f" {opcode}") for opcode in OPCODES}
        for name, text in sass(architecture).items()
    }


def test_every_kernel_is_there_for_every_gpu():
    build = ops.parse_cuda_build(ops.torch.ops.gpl_fast.cuda_build()) if not ops.load() else None
    assert build is not None
    if build.architectures != ARCHITECTURES:
        pytest.skip(f"the library was built for {build.architectures} only")
    assert len(kernels(GENERAL)) == 8
    assert len(kernels(LOGITS)) == 15
    assert len(kernels(HOPPER)) == 12
    assert len(kernels(FORWARD)) == 4
    assert len(kernels(SOFTMAX)) == 36
    for name, each in registers.usage().items():
        assert set(each) == ({"90a"} if "_sm90_" in name else set(ARCHITECTURES)), name


def test_no_spills():
    spilled = {
        (name, a)
        for name, each in registers.usage().items()
        for a, u in each.items()
        if u.stack or u.local
    }
    assert not spilled


def test_registers_fit_the_blocks():
    """Threads of a block times registers stay within the 64 Ki of a multiprocessor."""
    for name in kernels(GENERAL, LOGITS, HOPPER, FORWARD):
        threads, _ = registers.dynamic_shared(name, kernel_size=3)
        for architecture, u in registers.usage()[name].items():
            assert threads * (u.registers + -u.registers % 8) <= 64 * 1024, (name, architecture)
    # What setmaxnreg redistributes: 384 threads of 168 = 128 of 72 and 256 of 216, or 40 and 232.
    hopper = [u for name in kernels(HOPPER, FORWARD) for u in registers.usage()[name].values()]
    assert {u.registers for u in hopper} == {168}


def test_the_smallest_layouts_fit_shared_memory():
    """Of each arithmetic one tile of channels with one dZ tile, for kernels of 1 to 7."""
    for prefix in (GENERAL, LOGITS):
        for architecture, limit in LIMIT.items():
            least: dict[str, int] = {}
            for name in kernels(prefix):
                arithmetic = name.split("<")[1].split(",")[0]
                static = max(u.shared for u in registers.usage()[name].values())
                bytes_ = registers.dynamic_shared(name, kernel_size=7, dz_tiles=1)[1] + static
                least[arithmetic] = min(bytes_, least.get(arithmetic, bytes_))
            assert max(least.values()) <= limit * 1024, (prefix, architecture)
    for name in kernels(HOPPER, FORWARD):
        static = registers.usage()[name]["90a"].shared
        assert registers.dynamic_shared(name, kernel_size=7)[1] + static <= LIMIT["90a"] * 1024


def test_static_shared_memory_tells_the_kernels_of_sm_90a():
    """By it a launch knows that the library was built without sm_90a: there they are empty."""
    for name in kernels(HOPPER, FORWARD):
        for architecture, u in registers.usage()[name].items():
            assert (u.shared > 0) == (architecture == "90a"), (name, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_core_and_copy_instructions(architecture):
    found = instructions(architecture)
    if not found:
        pytest.skip(f"the library was not built for sm_{architecture}")
    for name in kernels(GENERAL, LOGITS):
        count = found[name]
        assert count["LDGSTS"] > 0, name
        if "<fp32" in name:
            assert count["FFMA"] > 0, name
            assert not count["HMMA"], name  # not TF32
        else:
            assert min(count["HMMA"], count["LDSM"]) > 0, name
    for name, count in found.items():
        assert not count["LDL"] + count["STL"], name
        assert not count["RED"] + count["ATOM"], name  # deterministic


def test_sm90a_has_wgmma_and_tma():
    found = instructions("90a")
    if not found:
        pytest.skip("the library was not built for sm_90a")
    for name in kernels(HOPPER):
        count = found[name]
        assert min(count["HGMMA"], count["UTMALDG"], count["LDSM"]) > 0, name
        assert count["USETMAXREG"] == 2, name
        # Four products, one wait: the compiler has not serialized them.
        assert count["HGMMA"] == 4 * count["WARPGROUP.DEPBAR"], name
        # Copies of the generic proxy would need a fence before wgmma reads them.
        assert not count["LDGSTS"], name


def test_no_operand_of_a_wgmma_in_flight_is_overwritten():
    found = sass("90a")
    if not found:
        pytest.skip("the library was not built for sm_90a")
    by_register = r" HGMMA\S* R\d+, R\d+, gdesc"
    for name in kernels(HOPPER):
        assert len(re.findall(by_register, found[name])) == 12, name
        assert not overwritten(found[name]), name
    # Without its waits it would be: the scan follows this code.
    assert overwritten(re.sub(r"WARPGROUP\.DEPBAR.*?;", "NOP;", found[kernels(HOPPER)[0]]))
    others = {name for name, text in found.items() if " HGMMA" in text} - {*kernels(HOPPER)}
    assert others == {*kernels(FORWARD)}


def test_the_halo_kernel_multiplies_from_shared_memory():
    """Of a stage three rows of taps, four steps of channels or two, two maps: one wait, which
    leaves the newest products in flight; no operand in registers, nothing serialized."""
    found = sass("90a")
    if not found:
        pytest.skip("the library was not built for sm_90a")
    for name in kernels(FORWARD):
        code = [text for _, text in sorted(parse(found[name]).items())]
        products = [i for i, text in enumerate(code) if text.startswith("HGMMA")]
        waits = [i for i, text in enumerate(code) if text.startswith("WARPGROUP.DEPBAR")]
        assert (len(products), len(waits)) == (36, 2), name
        assert products[-1] < waits[0], name
        assert all("gdesc" in code[i].split(",")[1] for i in products), name
        assert all(re.search(r"HGMMA\.64x128x16\.F32", code[i]) for i in products), name
        between = code[products[0] : waits[0]]
        assert not [t for t in between if re.match(r"(LDS|LDSM|STS|FADD|FMUL|BAR|SYNCS)", t)], name


# float32 logits, bf16 dy, C = 150: thread-instructions an element that were reached on sm_90.
MOST_INSTRUCTIONS = 45


def test_instructions_of_softmax_bwd(capsys):
    """Two warps share 32 pixels, of whose 19 units of 8 classes each has nine and a half; of the
    152 bytes · 2 of dy a lane copies as many pieces. Of the two steps of the outer loop, sums and
    gradient, each is one half of its body. Where a row begins plays no part: pixels are counted
    through the rows. A loop in a loop copies what is not aligned, and does not run."""
    code = sass("90a").get(f"{SOFTMAX}<fp32, bf16, softmax>")
    if code is None:
        pytest.skip("the library was not built for sm_90a")
    spans, share = loops(code), 19 / 2

    def trips(span: tuple[int, int]) -> float:
        text = " ".join(t for at, t in parse(code).items() if span[0] <= at <= span[1])
        if "BAR.SYNC" in text:
            return 1
        if any(span != other and span[0] <= other[0] and other[1] <= span[1] for other in spans):
            return 0
        return share if "LDGSTS" in text or "MUFU.EX2" in text else 2

    text = [trips(span) for span in spans]
    assert text.count(share) == 3, spans
    figure = per_element(code, text, threads=64, elements=32 * 150)
    with capsys.disabled():
        print(f"\nsoftmax_bwd (CUDA, sm_90a, C = 150): {figure:.1f} instructions an element")
    assert figure <= MOST_INSTRUCTIONS
    assert "MUFU.EX2" in code
    # No division in a loop: its reciprocal is MUFU.RCP.
    for first, last in [span for span, trip in zip(spans, text, strict=True) if trip != 1]:
        assert not [t for at, t in parse(code).items() if first <= at <= last and "MUFU.RCP" in t]


def test_the_table_has_every_kernel():
    table = "\n".join(registers.table(registers.usage()))
    for name in registers.usage():
        assert f"`{name if name.startswith('conv_block') else name.split('<')[0]}`" in table, name

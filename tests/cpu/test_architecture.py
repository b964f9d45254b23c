"""The arrows of docs/architecture.md and the limits of CONTRIBUTING.md, and that what watches them
(`architecture`) tells of each that is crossed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architecture import arrows, beyond, circles, questions, torch_headers

ROOT = Path(__file__).resolve().parents[2]


def read(folder: str, *endings: str) -> dict[Path, str]:
    paths = sorted(path for end in endings for path in (ROOT / folder).rglob(f"*.{end}"))
    return {path.relative_to(ROOT): path.read_text() for path in paths}


SOURCES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): text
    for path, text in read("gpl_fast", "py").items()
}


def test_no_arrow_goes_up_and_none_in_a_circle():
    assert (arrows(SOURCES), circles(SOURCES)) == ([], [])


def test_only_the_policy_asks_for_a_device():
    assert questions(SOURCES) == []


def test_the_cuda_kernels_include_nothing_of_torch():
    files = {str(path): text for path, text in read("csrc", "cu", "cuh", "h").items()}
    assert sum(path.startswith("csrc/cuda/") for path in files) > 5
    assert torch_headers(files) == []


def test_no_part_is_longer_than_it_may_be():
    limits = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Limits\n")[2]
    rows = re.findall(r"^\| `(gpl_fast/\S+)\.py` \| \w.* \|$", limits.partition("\n## ")[0], re.M)
    excepted = {path.replace("/", ".") for path in rows}
    assert {m: said for m, said in beyond(SOURCES).items() if m not in excepted} == {}
    assert excepted <= set(beyond(SOURCES))  # each is needed
    assert len(excepted) <= 5


HOUSE = {
    "gpl_fast": "if TYPE_CHECKING:\n    from gpl_fast.loss import Loss",
    "gpl_fast.loss": "from gpl_fast import targets\nfrom gpl_fast.fast.plan import Plan",
    "gpl_fast.fast": "", "gpl_fast.fast.plan": "from gpl_fast.net import LossNet",
    "gpl_fast.fast.policy": "import torch\narch = torch.cuda.get_device_capability()",
    "gpl_fast.net": "from gpl_fast.net.lossnet import LossNet",
    "gpl_fast.net.lossnet": "from gpl_fast import reference",
    "gpl_fast.targets": "from gpl_fast.targets.topk import TopK", "gpl_fast.targets.topk": "",
    "gpl_fast.reference": "import math\nimport torch\nfrom torch.nn import functional",
    "gpl_fast.kernels": "", "gpl_fast.tools": "", "gpl_fast.tools.bench": "import gpl_fast",
    "gpl_fast.demo": "from gpl_fast.tools import bench", "gpl_fast.ops": "",
}  # fmt: skip


def test_a_house_that_stands():
    assert [arrows(HOUSE), circles(HOUSE), questions(HOUSE), beyond(HOUSE)] == [[], [], [], {}]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("net.lossnet", "from gpl_fast.fast.plan import Plan"),
        ("net.lossnet", "def f():\n    from gpl_fast import fast"),
        ("targets.topk", "import gpl_fast.fast.plan"),
        ("kernels", "def f():\n    import_module('gpl_fast.fast.plan')"),
        ("kernels", "if TYPE_CHECKING:\n    from gpl_fast.fast.plan import Plan"),
        ("reference", "from gpl_fast import ops"),
        ("reference", "def f():\n    import numpy"),
        ("loss", "from gpl_fast.tools import bench"),
        ("ops", "import gpl_fast.tools.bench"),
    ],
)
def test_an_arrow_that_may_not_be(module, line):
    module = f"gpl_fast.{module}"
    assert any(found.startswith(f"{module} -> ") for found in arrows({**HOUSE, module: line}))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("reference", "def f():\n    from gpl_fast.net.lossnet import LossNet"),
        ("targets.topk", "from gpl_fast import loss"),
        ("ops", "import gpl_fast.targets.topk"),  # runs the package too
        ("net.lossnet", "from gpl_fast import LossNet"),
    ],
)
def test_a_circle(module, line):
    more = {"gpl_fast.targets": "from gpl_fast.targets import topk\nfrom gpl_fast import ops"}
    assert circles({**HOUSE, **more, f"gpl_fast.{module}": line})


@pytest.mark.parametrize("line", [
    "capable = torch.cuda.get_device_capability(x.device)", "if x.is_cuda:\n    pass",
    "memory = torch.cuda.get_device_properties(0).total_memory", "a = x.device.type == 'cpu'",
    "here = torch.cuda.is_available()", "torch.cuda.current_device()",
])  # fmt: skip
def test_a_question_about_a_device(line):
    for module in ("gpl_fast.fast.plan", "gpl_fast.kernels"):
        assert questions({**HOUSE, module: line})
    assert not questions({**HOUSE, "gpl_fast.fast.policy": line})


def test_a_header_of_torch():
    files = {"csrc/cuda/a.cu": '#include "../b.h"', "csrc/b.h": "#  include <ATen/ATen.h>"}
    assert torch_headers(files) == ["csrc/b.h: ATen/ATen.h"]
    assert torch_headers({"csrc/cuda/a.cu": "#include <torch/all.h>"})
    assert not torch_headers({**files, "csrc/cuda/a.cu": "#include <cuda.h>"})


BODY = "\n    x = 1"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("x = 1\n" * 251, "x = 1\n" * 250),
        ("class A:" + 200 * BODY, "class A:" + 199 * BODY),
        ("def f():" + 60 * BODY, "def f():" + 59 * BODY),
        ("@triton.jit\ndef f():" + 150 * BODY, "@triton.jit\ndef f():" + 149 * BODY),
        ("def f(a, b, c, d, e, f, g, h, i): ...", "def f(a, b, c, d, e, f, g, h, *, i): ..."),
    ],
)
def test_what_is_longer_than_it_may_be(text, allowed):
    assert beyond({"gpl_fast.a": text})
    assert not beyond({"gpl_fast.a": allowed})

"""The documentation site: its blocks run, and what is built needs nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


PAGES = (
    "index", "targets", "losses", "weight", "networks", "precision", "compiling", "memory",
    "reproducibility", "../README",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    found = names.get("values") or [names["value"]]
    assert all(value.isfinite() and value > 0 for value in found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in out.rglob("*.html")}


def test_nothing_is_fetched_at_view_time(site):
    for name, text in site.items():
        loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", text)
        assert loaded, name
        for tag in loaded:
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (name, tag)


def test_mathematics_is_mathml(site):
    assert site["math.html"].count("<math") > 100
    for name, text in site.items():
        body = re.search(r"<article.*?</article>", text, re.S)
        shown = re.sub(r"<(pre|code)\b.*?</\1>", "", body[0] if body else "", flags=re.S)
        assert "$" not in re.sub(r"<[^>]+>", "", shown), name

"""The blocks of docs/frameworks run, as by someone who has copied a page into an empty folder."""

from __future__ import annotations

import re

import pytest
from run import ROOT

PAGES = sorted((ROOT / "docs" / "frameworks").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    if page.stem != "index":
        assert blocks
    namespace = {"__name__": "copied"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_are_linked(page):
    linked = re.findall(r"\]\(\.\./\.\./examples/(\w+\.\w+)\)", page.read_text())
    assert all((ROOT / "examples" / name).exists() for name in linked)
    assert linked or page.stem == "index"


def test_every_example_is_in_the_table():
    table = (ROOT / "examples" / "README.md").read_text()
    linked = re.findall(r"\]\((\w+\.py)\)", table)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_recipes_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert path.read_text().count("\n") <= 120, path.name

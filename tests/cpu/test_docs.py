"""README, docs and benchmarks: links lead somewhere, pages that code names exist, sizes hold."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # code has calls
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *patterns]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.exists()]


def test_pages_that_code_names_exist():
    for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "Makefile"):
        for name in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text()):
            assert (ROOT / name).exists(), f"{path}: {name}"


def test_the_architecture_page_has_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.\w+)`", page)}
    files = {path.name for path in tracked("gpl_fast/*.py", "csrc/*")}
    assert files - named <= {"__init__.py", "__main__.py"}


def test_the_index_has_every_page():
    listed = set((ROOT / "docs" / "index.md").read_text().split())
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages | {"frameworks/*"} <= listed


def test_sizes_are_kept():
    readme = (ROOT / "README.md").read_bytes()
    assert readme.count(b"\n") <= 150
    assert len(readme) <= 9000
    benchmarks = tracked("benchmarks")
    assert sum(path.stat().st_size for path in benchmarks) <= 250_000

    def lines(paths):
        return sum(path.read_text().count("\n") for path in paths if path.suffix == ".py")

    assert 3 * lines(benchmarks) < lines(tracked("gpl_fast"))

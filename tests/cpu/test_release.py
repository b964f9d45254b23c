"""What a release holds: one version everywhere, forms, pins, metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import gpl_fast

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_one_version_and_date():
    first = re.search(r"^## \[([^]]+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert first.groups() == (gpl_fast.__version__, str(cited["date-released"]))
    assert cited["version"] == gpl_fast.__version__
    assert cited["license"] == PROJECT["license"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_forms_ask_for_what_is_needed(form):
    said = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert said["blank_issues_enabled"] is False
        return
    assert set(said) == {"name", "description", "labels", "body"}
    assert len({field["id"] for field in said["body"]}) == len(said["body"])
    info = [field for field in said["body"] if "info --json" in field["attributes"]["label"]]
    assert [field["validations"]["required"] for field in info] == [True]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_extra_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonical(line.partition("==")[0]) for line in lines if "==" in line}
    for extra, names in PROJECT["optional-dependencies"].items():
        for name in names:
            assert canonical(re.match(r"[\w.-]+", name)[0]) in pins, (extra, name)


def test_pythons_are_those_that_are_said():
    said = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert f">={said[0]}" == PROJECT["requires-python"]
    page = (ROOT / "docs" / "versions.md").read_text()
    assert re.findall(r"^\| Python (3\.\d+)", page, re.M) == said

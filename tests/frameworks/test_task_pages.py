"""The pages of tasks, run as they stand; and the table of the examples."""

import re

import pytest
from run import ROOT


@pytest.mark.parametrize("page", ["depth", "instances", "distillation", "deep_supervision"])
def test_the_block_of_a_page_runs_in_an_empty_folder(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "frameworks" / f"{page}.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    outputs = names.get("outputs") or [names.get("pred", names.get("logits"))]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in outputs)


def test_every_example_is_in_the_table():
    table = (ROOT / "examples" / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+\.py)` \|", table, re.MULTILINE)
    assert {p.name for p in (ROOT / "examples").glob("*.py")} <= set(listed)
    assert len(listed) == len(set(listed))

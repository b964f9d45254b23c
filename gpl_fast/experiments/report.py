"""The report of the demo and of the experiments: report.json for programs, report.png for a look,
report.html with both."""

from __future__ import annotations

import base64
import html
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import gpl_fast
from gpl_fast.experiments.frame import Table

_PACKAGES = ("scikit-learn", "scikit-image", "numpy", "matplotlib")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1917; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d6d3d1; text-align: right }
th:first-child, td:first-child { text-align: left }
tr.mean { font-weight: 600 } img { max-width: 100% } .verdict { font-size: 1.1rem }
"""


def environment() -> dict[str, str | int]:
    """Versions and machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpl_fast": gpl_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def html_table(table: Table, emphasised: str | None = None) -> str:
    """A table; rows whose second cell is `emphasised` stand out."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    body = "\n".join(
        f'<tr class="{"mean" if row[1:2] == [emphasised] else "one"}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in map(list, table.rows)
    )
    title = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def page(
    title: str,
    heading: str,
    verdict: str,
    tables: Sequence[str],
    protocol: Sequence[str],
    closing: str,
    png: bytes | None,
) -> str:
    """One self-contained page; `tables` are of `html_table`, all else is text."""
    points = "\n".join(f"<li>{html.escape(line)}</li>" for line in protocol)
    machine = ", ".join(f"{name} {value}" for name, value in environment().items())
    picture = ""
    if png is not None:
        code = base64.b64encode(png).decode("ascii")
        picture = f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{code}"></p>'
    between = "\n".join(tables)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{html.escape(heading)}</h1>
<p class="verdict">{html.escape(verdict)}</p>
{between}
{picture}
<h2>Protocol</h2><ul>
{points}
</ul>
<p>{html.escape(closing)}
{html.escape(machine)}.</p>
</body></html>
"""


def write(out: Path, data: Mapping[str, Any], figure: Figure | None, **of_page: Any) -> list[Path]:
    """report.json, report.png (if there is a figure) and report.html in ``out``, which is made if
    it is not there; `of_page` are the arguments of `page`."""
    out.mkdir(parents=True, exist_ok=True)
    text, picture, html_page = (out / f"report.{kind}" for kind in ("json", "png", "html"))
    text.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(picture, dpi=110, bbox_inches="tight")
    png = picture.read_bytes() if figure is not None else None
    html_page.write_text(page(**of_page, png=png), encoding="utf-8")
    return [text, *([picture] if figure is not None else []), html_page]

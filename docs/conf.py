"""The documentation site: `make docs` builds it into build/site."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import gpl_fast  # noqa: E402

project = "gpl-fast"
release = gpl_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = f"gpl-fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Shape", "Source"]

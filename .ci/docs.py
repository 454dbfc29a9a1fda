# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sphinx's configuration for the site of .ci/docs. Nothing in it needs the network."""

from __future__ import annotations

from pathlib import Path

project = "Diskwright"
copyright = "2026 The Diskwright authors"  # the name is Sphinx's
extensions = ["myst_parser", "sphinx_antsibull_ext"]
include_patterns = ["index.md", "*.md", "docs/**", "pylib/README.md", "roles/*/README.md"]
exclude_patterns = ["docs/reference/environment_variables.rst"]
html_theme = "alabaster"
html_theme_options = {"description": "Virtual machine disk images, with no QEMU on the machine", "page_width": "1100px"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchfield.html"]}
myst_heading_anchors = 4
suppress_warnings = ["ref.ref"]  # the reference points into Ansible's own manual

# The way in: everything there is, in the order in which one reads it.
here = Path(__file__).parent
FIRST = ("tutorial", "cookbook", "from-qemu-img", "safety", "collection", "graph", "filters", "serving", "qmp", "io", "differences", "tracing", "benchmarks")
ORDER = {name: number for number, name in enumerate(FIRST)}
guides = sorted(
    (path.relative_to(here).with_suffix("").as_posix() for path in here.glob("docs/*.md")),
    key=lambda page: (ORDER.get(page.rpartition("/")[2], len(FIRST)), page),
)
protocols = sorted(path.relative_to(here).with_suffix("").as_posix() for path in here.glob("docs/protocols/*.md"))
formats = sorted((path.relative_to(here).with_suffix("").as_posix() for path in here.glob("docs/formats/*.md")), key=lambda page: page.replace("README", "!"))
roles = sorted(path.relative_to(here).with_suffix("").as_posix() for path in here.glob("roles/*/README.md"))
reference = ["docs/reference/index"] if (here / "docs/reference/index.rst").exists() else []
pages = ["README", "pylib/README", *guides, *formats, *protocols, *reference, *roles, "CHANGELOG", "CONTRIBUTING", "CODE_OF_CONDUCT"]
contents = "\n".join(["# Diskwright", "", "```{toctree}", ":maxdepth: 2", "", *pages, "```", ""])
(here / "index.md").write_text(contents, encoding="utf-8")

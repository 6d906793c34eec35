"""Sphinx's settings."""

from __future__ import annotations

from mergelab.version import __version__

project = "mergelab"
author = "The mergelab authors"
copyright = "The mergelab authors"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = [".doctrees"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = [
    "myst.header",  # pages that skip from # to ###
    "ref.python",  # a type in a signature whose short name two rooms have
]
highlight_language = "none"
nitpicky = False
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 70

html_theme = "furo"
html_title = f"mergelab {version}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

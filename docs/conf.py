"""How Sphinx builds the site: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fsteer_lens

project = "fsteer_lens"
author = "fsteer_lens contributors"
copyright = author
release = version = fsteer_lens.__version__

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon",
    "site_math", "site_notebooks", "site_plotly", "site_replay", "site_signatures",
]  # fmt: skip

# --- pages: what a code host renders as well
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook's markdown cells are read one by one

# --- notebooks: their stored outputs, run by `make notebooks` and not again here
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the default asks a CDN

# --- reference: docstrings are Google's form, with a name of the code between single backticks
default_role = "literal"
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them, and `*batch` in a list is markup
napoleon_use_param = False  # names that share a description stay together
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 80

html_theme = "furo"
html_title = "fsteer_lens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sphinx = False

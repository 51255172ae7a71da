"""Sphinx configuration: `make docs` builds the site, with warnings as errors."""

import os
import shutil
from pathlib import Path

from nlsq_dask import __version__

HERE = Path(__file__).parent

project = "nlsq_dask"
author = "The nlsq_dask developers"
version = release = __version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}
html_title = "nlsq_dask"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# The notebooks are kept without outputs, so a site that shows these has to run them.
nb_execution_mode = os.environ.get("DOCS_EXECUTE", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_typehints = "none"  # numpydoc says what types are, in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

# Sphinx reads sources below this folder alone.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks")
for notebook in (HERE / "notebooks").glob("*.ipynb"):
    # There, the pictures of this folder are in the folder above.
    notebook.write_text(notebook.read_text().replace("](../docs/", "](../"))

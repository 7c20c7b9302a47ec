"""How the documentation site is built: `make docs`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from negcache_core import __version__

project = "negcache"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "api_pages",
    "mathml",
    "plain_docstrings",
    "public_names",
]
exclude_patterns = ["_build", "reference/examples"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub has them
nitpicky = True
# Types of other libraries are named, not linked: the site is built without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(?!negcache_).*"),
    ("py:.*", r"negcache_core\.(?:arrays|cache|retrieval|losses|sharding|handlers)\..*"),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 72
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = "negcache"
html_static_path = ["_static"]
html_css_files = ["site.css", "reference.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

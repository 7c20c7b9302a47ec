"""How the documentation site is built: `make docs`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
# The tutorial's kernel is this Python, whatever others the user has registered. It draws no bars.
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from negcache_core import __version__

project = "negcache"
release = version = __version__
# The folder that publish.py will put this site into.
version_folder = os.environ.get("SITE_VERSION", version)
extensions = [
    "myst_nb",  # and through it myst_parser
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
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove-warn"  # what the tutorial says beside its figures is a warning here
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
templates_path = ["_templates"]
# Only the workflow that publishes the site knows where its sources are.
repository = "/".join(os.environ.get(f"GITHUB_{key}", "") for key in ("SERVER_URL", "REPOSITORY"))
html_context = {"version_folder": version_folder, "repository": repository.strip("/")}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/versions.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_title = "negcache"
html_static_path = ["_static"]
html_css_files = ["site.css", "reference.css"]
html_js_files = ["open_pictures.js"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "github-light-high-contrast"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

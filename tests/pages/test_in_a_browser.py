"""The built site in a browser: on a desk and on a phone, in light and dark, all of it can be read.

`make browser` installs the browser and `make docs` builds the site. Where one of them is missing,
these tests are skipped, or fail if PAGES_MUST_BE_RENDERED is set, as it is in CI.
"""

import os
import runpy
from pathlib import Path

import pytest
from in_a_browser import BROWSER, DRIVER, browser, faults_of, leave_for

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
MISSING = [
    *([] if BROWSER and DRIVER else ["browser (make browser)"]),
    *([] if (SITE / "index.html").exists() else ["built site (make docs)"]),
]
TOLD = f"the pages were not rendered: there is no {', and no '.join(MISSING)}"
if MISSING and not os.environ.get("PAGES_MUST_BE_RENDERED"):
    pytest.skip(TOLD, allow_module_level=True)

PLANTED = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>
body { margin: 0 }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }
</style>
<article>%s</article>"""
BOX = (
    "<img alt='{alt}' src=\"data:image/svg+xml,"
    "<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'>"
    "<rect width='90' height='90' fill='white'/><rect width='9' height='9' fill='{ink}'/></svg>\">"
)
LINE = "x" * 200


@pytest.fixture(scope="module")
def driver():
    assert not MISSING, TOLD
    with browser() as started:
        yield started


# A fault of each kind; at which width or in which theme it is found, and how often: there are two
# widths and two themes.
@pytest.mark.parametrize(
    ("body", "where", "fault", "times"),
    [
        ("<p>Nothing is wrong, <b>here</b>.", "", "", 0),
        (f"<div style='overflow-x: auto'>{LINE}</div>", "", "", 0),
        ("<table style='width: 2000px'><td>wide</table>", "px", "px too wide: table", 4),
        (f"<div style='overflow: hidden; width: 300px'>{LINE}</div>", "px", "cut at 300", 4),
        (f"<pre style='overflow-x: auto'>{LINE}</pre>", "1280 px", "a line of code of 200", 2),
        ("<p style='color: #999'>grey on white", "light", "contrast of 2.8", 2),
        ("<p style='color: #000'>black on black", "dark", "contrast of 1.1", 2),
        ("<p style='opacity: 0.4'>pale", "px", "contrast of", 4),
        ("<img alt='a box' src='missing.png'>", "px", "a picture that is not there", 2),
        (BOX.format(alt="", ink="black"), "px", "a picture that no words", 2),
        (BOX.format(alt="a box", ink="black"), "dark", "a picture stands out", 1),
        (BOX.format(alt="a box", ink="snow"), "px", "a picture of contrast 1.0", 2),
    ],
)
def test_what_is_wrong_is_found(driver, tmp_path, body, where, fault, times):
    page = tmp_path / "planted.html"
    page.write_text(PLANTED % body)
    found = faults_of(driver, page)
    assert sum(where in line and fault in line for line in found) == times, found
    assert times or not found


def test_every_page_can_be_read_everywhere(driver):
    # Listings of sources, _modules, are set like all code, and many.
    pages = [page for page in sorted(SITE.rglob("*.html")) if "_modules" not in page.parts]
    assert len(pages) > 30
    found = [fault for page in pages for fault in faults_of(driver, page)]
    assert not found, "\n".join(found)


def test_another_version_can_be_chosen(driver, tmp_path):
    publish = runpy.run_path(str(ROOT / "docs" / "publish.py"))["publish"]
    publish(SITE, tmp_path, "v0.0.1")
    publish(SITE, tmp_path, "dev")
    here = tmp_path / "dev" / "reference" / "index.html"
    there = tmp_path / "v0.0.1" / "reference" / "index.html"
    shown, reached = leave_for(driver, here, "v0.0.1")
    assert shown[-2:] == ["v0.0.1", "dev"]
    assert reached == there.as_uri()
    there.unlink()
    assert leave_for(driver, here, "v0.0.1")[1] == (tmp_path / "v0.0.1" / "index.html").as_uri()


def test_a_version_alone_offers_no_choice(driver):
    driver.get((SITE / "index.html").as_uri())
    assert not driver.find_element("id", "versions").is_enabled()

"""A browser without a window, and what it finds wrong with pages."""

import contextlib
import os
import shutil
from pathlib import Path
from unittest import mock

from selenium import webdriver
from selenium.webdriver.support.ui import Select, WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MEASURE = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
DESK, PHONE = 1280, 390  # px
# Nothing moves between two themes; what is behind tabs and folded away is shown.
OPEN = """
const style = document.createElement("style");
style.textContent = `
  * { transition: none !important }
  .sd-tab-content { display: block !important }`;
document.head.append(style);
document.querySelectorAll("details").forEach((folded) => (folded.open = true));
"""
ARGUMENTS = (
    "headless=new",
    "no-sandbox",  # root may not have it
    "disable-dev-shm-usage",  # a container's is small
    "hide-scrollbars",
    "allow-file-access-from-files",  # pictures are looked into
)


@contextlib.contextmanager
def browser():
    """Start Chromium, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ARGUMENTS:
        options.add_argument(f"--{argument}")
    # The driver is on this machine, to which no proxy leads.
    with mock.patch.dict(
        os.environ, no_proxy="localhost,127.0.0.1", NO_PROXY="localhost,127.0.0.1"
    ):
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def faults_of(driver, page):
    """Return what is wrong with a page at each width and in each theme, as lines of text."""
    driver.get(page.as_uri())
    driver.execute_script(OPEN)
    faults = []
    for width in (DESK, PHONE):
        for theme in ("light", "dark"):
            _show(driver, width, theme)
            # Code that fits on a desk scrolls on a phone.
            found = driver.execute_script(MEASURE, width == DESK)
            faults += [f"{page.name}, {width} px, {theme}: {fault}" for fault in found]
    return faults


def leave_for(driver, page, version):
    """Choose another version on a page; return those that were offered, and where that led."""
    _show(driver, DESK, "light")
    driver.get(page.as_uri())
    versions = Select(driver.find_element("id", "versions"))
    offered = [option.text for option in versions.options]
    versions.select_by_visible_text(version)
    WebDriverWait(driver, 20).until(lambda driver: driver.current_url != page.as_uri())
    return offered, driver.current_url


def _show(driver, width, theme):
    """Give the window a width, and the reader's system a theme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

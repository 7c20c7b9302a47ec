"""A browser without a window, and what it finds wrong with pages in it."""

import contextlib
import io
import shutil
from pathlib import Path

from matplotlib.image import imread

from selenium import webdriver
from selenium.webdriver.common.by import By

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")  # Debian's names
MEASURE = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
# Code that fits on a desk scrolls on a phone.
DESK, PHONE = 1280, 390
STILL = "const s = document.createElement('style'); s.textContent = '* {transition: none !important}';"


@contextlib.contextmanager
def browser():
    """Start Chromium, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # Root may not have the sandbox; a container's /dev/shm is small.
    for each in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", "allow-file-access-from-files"):
        options.add_argument(f"--{each}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def faults_of(driver, page):
    """Return what is wrong with a page, at each width and in each theme."""
    show(driver, DESK, "light")
    driver.get(page.as_uri())
    driver.execute_script(f"{STILL} document.head.append(s)")
    faults = []
    for width in (DESK, PHONE):
        for theme in ("light", "dark"):
            show(driver, width, theme)
            found = driver.execute_script(MEASURE, width == DESK)
            if width == DESK:
                found += pictures(driver, theme)
            faults += [f"{page.name}, {width} px, {theme}: {fault}" for fault in found]
    return faults


def show(driver, width, theme):
    """Give the window a width, and the reader's system a theme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def pictures(driver, theme):
    """Yield what is wrong with the pictures: their ground is to be about as bright as the page's."""
    for picture in driver.find_elements(By.CSS_SELECTOR, "article img"):
        pixels = imread(io.BytesIO(picture.screenshot_as_png))[:, :, :3]
        brightness = float(sorted(pixels.mean(axis=2).ravel())[pixels.shape[0] * pixels.shape[1] // 2])
        if (brightness < 0.5) != (theme == "dark"):
            yield f"a picture of brightness {brightness:.2f}: {picture.get_attribute('src')}"

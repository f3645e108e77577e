"""Take the README's two pictures of the cockpit: JupyterLab in Chromium, as in the browser test; minutes on 2 cores.

    python tools/cockpit_pictures.py

A narrow FastDCGAN plays 450 iterations on 6,400 digits (results/cockpit/healthy.png); then the scenario *collapse* is
chosen and plays until samples are nearly alike (results/cockpit/collapse.png). Needs an emoji
font, such as Debian's fonts-noto-color-emoji.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_cockpit_browser as browser  # noqa: E402

OUT, HEIGHT = ROOT / "results" / "cockpit", 900


def take(page: Page, name: str) -> None:
    """Save the upper part of the cockpit."""
    page.wait_for_timeout(1000)
    box = page.locator(".jp-OutputArea-output").last.bounding_box()
    page.screenshot(path=OUT / name, clip=box | {"height": min(HEIGHT, box["height"])})
    print(f"{name}: {(OUT / name).stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Play, take a picture, break it, take another."""
    OUT.mkdir(parents=True, exist_ok=True)
    browser.CELLS[0] = browser.CELLS[0].replace("[:3200]", "[:6400]").replace("ngf=16", "ngf=32")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        lab = browser.Lab(Path(folder), ROOT)
        try:
            context = browser.open_browser(driver, str(Path(folder) / "profile"), height=1400)
            page = context.pages[0]
            lab.open(page)
            lab.value("cockpit.play(450)")
            lab.wait_for(lambda: not lab.value("cockpit.playing"), 900, "450 iterations")
            lab.says("paused")
            take(page, "healthy.png")
            page.get_by_label("scenario").select_option("collapse")
            lab.click("Play")
            lab.wait_for(lambda: lab.value("gan.history.last()['diversity']") < 0.3, 300, "a collapse")
            lab.click("Pause")
            lab.says("paused")
            take(page, "collapse.png")
            context.close()
        finally:
            lab.close()


if __name__ == "__main__":
    main()

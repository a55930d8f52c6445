#!/usr/bin/env python3
"""Pictures of the page: of a hive with a past (stage.py), or of one that runs.

    python tests/pictures.py FOLDER                  # 2, 20 and 500 nodes, all views
    python tests/pictures.py FOLDER --link LINK      # what `hive web` printed

Written are FOLDER/NODES-VIEW-WIDTH-SCHEME.png, or FOLDER/VIEW-SCHEME.png of a running hive.
Needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import free_port
from playwright.sync_api import Browser, Page, sync_playwright

Sizes = dict[int, dict[str, int]]
SIZES = {1280: {"width": 1280, "height": 800}, 390: {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")
OF_FEW = {1280: {"width": 1280, "height": 560}}  # the README's: three nodes fill it


class Gallery:
    """The page of a hive with a past, of so many nodes."""

    def __init__(self, chromium: Browser, number: int) -> None:
        self.chromium = chromium
        stage = Path(__file__).with_name("stage.py")
        command = [sys.executable, str(stage), str(number), str(free_port())]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.link = self.process.stdout.readline().split()[-1]

    def open(self, view: str, **how: Any) -> Page:
        return open_page(self.chromium, self.link, view, **how)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def open_page(chromium: Browser, link: str, view: str, **how: Any) -> Page:
    context = chromium.new_context(**{"viewport": SIZES[1280], **how})
    page = context.new_page()
    page.goto(f"{link}#{view}")
    page.wait_for_selector("#cards li", state="attached")
    page.wait_for_function("() => Object.keys(hour.nodes).length > 0")
    return page


def show(page: Page, view: str) -> None:
    """Bring up a view, or what opens above it."""
    page.evaluate(f"location.hash = '{'messages' if view == 'thread' else view}'")
    page.wait_for_timeout(300)
    if view == "thread":
        page.locator("#log a", has_text="command").nth(3).click()
        page.wait_for_selector("#talk[open]")
        page.wait_for_timeout(400)


def pictures(
    chromium: Browser, link: str, views: tuple[str, ...], sizes: Sizes = SIZES
) -> Iterator[tuple[str, bytes]]:
    """Each view in each size and scheme, with a name that says so."""
    for width, viewport in sizes.items():
        for scheme in SCHEMES:
            scale = 1 if width > 600 else 2
            how = {"viewport": viewport, "color_scheme": scheme, "device_scale_factor": scale}
            page = open_page(chromium, link, "now", **how)
            for view in views:
                show(page, view)
                yield f"{view}-{width}-{scheme}", page.screenshot()
                page.keyboard.press("Escape")
            page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--link", help="the page of a hive that runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        raise SystemExit("Chromium is missing (apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        if args.link:
            for name, picture in pictures(chromium, args.link, ("now",), OF_FEW):
                (args.folder / f"{name.replace('-1280', '')}.png").write_bytes(picture)
        for number in () if args.link else (2, 20, 500):
            gallery = Gallery(chromium, number)
            views = (
                ("now", "messages", "thread", "waiting", "map") if number == 20 else ("now", "map")
            )
            for name, picture in pictures(chromium, gallery.link, views):
                (args.folder / f"{number}-{name}.png").write_bytes(picture)
            gallery.close()
        chromium.close()


if __name__ == "__main__":
    main()

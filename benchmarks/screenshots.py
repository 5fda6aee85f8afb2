"""Pictures of a report's page in headless Chromium: on a desk, on a phone, in the dark, in print.

Left out: other browsers.
Run: python benchmarks/screenshots.py logs/report.html docs/report (needs '.[dev]' and Chromium)
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import die, need, parse  # noqa: E402  (after the path)

VIEWS = {  # name: the window, and what is seen of the page
    "desk": ({"viewport": {"width": 1180, "height": 1120}}, "#answers"),
    "phone": ({"viewport": {"width": 390, "height": 1240}}, "#columns"),
    "dark": ({"viewport": {"width": 1180, "height": 890}, "color_scheme": "dark"}, "body"),
    "print": ({"viewport": {"width": 760, "height": 1075}}, "body")}


@dataclass
class Args:
    page: tyro.conf.Positional[str] = "logs/report.html"  # what report.py wrote
    output: tyro.conf.Positional[str] = "docs/report"  # the pictures' names begin so
    colour: str = "ratio"  # of the tokens


def picture(browser, args, name, window, place):
    context = browser.new_context(**window)
    tab = context.new_page()
    tab.emulate_media(media="print" if name == "print" else "screen")
    tab.goto(Path(args.page).resolve().as_uri())
    if name != "print":
        tab.locator("#colours label", has_text=args.colour).click()
    if name in ("desk", "phone"):
        tab.locator("#card-0-0 .token").nth(2).click()
    top = "node => window.scrollTo(0, node.getBoundingClientRect().top + scrollY - 8)"
    tab.locator(place).first.evaluate(top)
    path = f"{args.output}_{name}.png"
    tab.screenshot(path=path)
    small = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # a third of the size
    small.save(path, optimize=True)
    context.close()


def main(args):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        die("no Chromium on the PATH: apt-get install chromium")
    if not Path(args.page).is_file():
        die(f"no page at {args.page}: python report.py logs/grpo.csv logs/ppo.csv --output {args.page}")
    with need("playwright.sync_api", "dev").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            picture(browser, args, name, *view)
            print(f"{args.output}_{name}.png")


if __name__ == "__main__":
    main(parse(Args))

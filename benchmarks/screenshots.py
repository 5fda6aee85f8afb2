"""Pictures of a report's page in headless Chromium: on a desk, on a phone, in the dark, in print.

--views llm is one picture, for the page of a chat model's run: the answers and a clicked token.
Left out: other browsers.
Run: python benchmarks/screenshots.py logs/report.html docs/report (needs '.[dev]' and Chromium)
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import AtLeast, die, need, parse  # noqa: E402  (after the path)

VIEWS = {  # name: the window, what is seen of the page, and the answer of which a token is clicked
    # the right answer of "llm" stands beside those before training
    "desk": ({"viewport": {"width": 1180, "height": 1120}}, "#answers", "#card-0-0"),
    "phone": ({"viewport": {"width": 390, "height": 1240}}, "#columns", "#card-0-0"),
    "dark": ({"viewport": {"width": 1180, "height": 890}, "color_scheme": "dark"}, "body", ""),
    "print": ({"viewport": {"width": 760, "height": 1075}}, "body", ""),
    "llm": ({"viewport": {"width": 1180, "height": 890}}, "#answers", "#card-1-0")}


@dataclass
class Args:
    page: tyro.conf.Positional[str] = "logs/report.html"  # what report.py wrote
    output: tyro.conf.Positional[str] = "docs/report"  # the pictures' names begin so
    views: tuple[Literal[tuple(VIEWS)], ...] = ("desk", "phone", "dark", "print")  # which pictures
    prompt: Annotated[int, AtLeast(1)] = 1  # the answers are to this one
    token: Annotated[int, AtLeast(1)] = 3  # of an answer, is clicked
    colour: Literal["advantage", "ratio", "KL to π₀", "entropy", "change"] = "ratio"  # of the tokens


def nth(found, name, args):
    number, there = getattr(args, name), found.count()
    if number > there:
        die(f"--{name} {number}: {args.page} has {there} there")
    return found.nth(number - 1)


def picture(browser, args, name, window, place, card):
    context = browser.new_context(**window)
    tab = context.new_page()
    tab.emulate_media(media="print" if name == "print" else "screen")
    tab.goto(Path(args.page).resolve().as_uri())
    if name != "print":
        tab.locator("#colours label", has_text=args.colour).click()
        nth(tab.locator("#prompts label"), "prompt", args).click()
    if card:
        nth(tab.locator(f"{card} .token"), "token", args).click()
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
        for name in args.views:
            picture(browser, args, name, *VIEWS[name])
            print(f"{args.output}_{name}.png")


if __name__ == "__main__":
    main(parse(Args))

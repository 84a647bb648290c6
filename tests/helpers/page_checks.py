"""What a page must not do in a browser, and must let a keyboard do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browser import Browser

WIDTHS = (1280, 360)
# low, so that pictures of the window are quick
HEIGHT = 400
# Tab stops of a page at most, so that a trap ends
MOST_STOPS = 500
# what a keyboard must reach; boxes that scroll, too
PREPARE = """
(() => {
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const boxes = [...document.body.querySelectorAll("*")].filter(
    e => scrolls(e) && e.scrollWidth > e.clientWidth);
  const interactive = document.querySelectorAll(`a[href], button, input, select, textarea, summary,
    iframe, [onclick], [role=button], [role=tab], [contenteditable], [tabindex]`);
  const say = e => e.outerHTML.split("\\n")[0].slice(0, 70);
  window.check = {
    say, scrolls,
    inside: e => e && (scrolls(e) || check.inside(e.parentElement)),
    elements: [...new Set([...boxes, ...interactive])].filter(e => e.checkVisibility()),
  };
  return boxes.filter(e => e.tabIndex < 0 || !e.getAttribute("aria-label")).map(say);
})()
"""
STOP = """
(() => {
  const e = document.activeElement, box = e.getBoundingClientRect();
  const seen = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
  return {index: check.elements.indexOf(e), words: check.say(e), seen, body: e === document.body,
    summary: e.tagName === "SUMMARY", pressed: e.matches("button, [role=button], [onclick]")};
})()
"""
IMAGES = """
[...document.querySelectorAll("img, svg, [role=img]")].filter(image =>
  !(image.getAttribute("alt") ?? image.getAttribute("aria-label") ?? "").trim()
  || (image.tagName === "IMG" && !(image.complete && image.naturalWidth > 0))).map(check.say)
"""
HEADINGS = """
[...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(h => [+h.tagName[1], h.textContent])
"""
# what sticks out of the page, and is in no box that scrolls
STICKING = """
(() => {
  const width = document.documentElement.clientWidth;
  const out = [...document.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > width + 1 || box.left < -1) && !check.inside(e.parentElement);
  }).map(check.say);
  return document.documentElement.scrollWidth > width ? ["the page scrolls", ...out] : out;
})()
"""
# texts that a box cuts off
CUT = """
[...document.body.querySelectorAll("*")].filter(e => getComputedStyle(e).overflowX === "hidden"
  && (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)).map(check.say)
"""
LINKS = """[...document.querySelectorAll("a[href^='#']")].map(a => a.getAttribute("href"))"""
OPEN = """document.querySelectorAll("details").forEach(d => d.open = true)"""
# tasks of the page that come after its load
REST = "new Promise(done => setTimeout(done, 50))"


def problems(browser: Browser, page: Path, widths: Sequence[int] = WIDTHS) -> list[str]:
    """Everything that is wrong with a page at these widths, in words."""
    wrong: list[str] = []
    for width in widths:
        browser.visit(page, width, HEIGHT)
        unreachable = browser.evaluate(PREPARE)
        of_width = [f"a box that scrolls has no tabindex or label: {e}" for e in unreachable]
        of_width += _of_content(browser)
        of_width += _of_keyboard(browser)
        browser.evaluate(OPEN)
        of_width += _of_content(browser) + _of_links(browser)
        browser.send("Runtime.evaluate", expression=REST, awaitPromise=True)
        of_width += _of_events(browser.events, page)
        wrong += [f"{width} pixels: {one}" for one in dict.fromkeys(of_width)]
    return wrong


def _of_content(browser: Browser) -> list[str]:
    """Images, headings and widths."""
    wrong = [f"an image is broken or has no words: {e}" for e in browser.evaluate(IMAGES)]
    level, first = 0, True
    for depth, words in browser.evaluate(HEADINGS):
        if depth > level + 1 or (depth == 1) != first or not words.strip():
            wrong.append(f"heading {depth} after {level}: {words!r}")
        level, first = depth, False
    wrong += [f"sticks out: {e}" for e in browser.evaluate(STICKING)]
    return wrong + [f"cut off: {e}" for e in browser.evaluate(CUT)]


def _of_keyboard(browser: Browser) -> list[str]:
    """Tab through the page; try what Enter and Space do at each stop."""
    wrong, reached = [], set()
    for _ in range(MOST_STOPS):
        browser.press("Tab")
        stop = browser.evaluate(STOP)
        if stop["body"] or stop["index"] in reached:
            break
        reached.add(stop["index"])
        wrong += [f"{what}: {stop['words']}" for what in _of_stop(browser, stop)]
        if stop["summary"]:
            # what is in it comes next
            browser.evaluate(f"{OPEN}; check.elements.length")
    names = browser.evaluate("check.elements.map(check.say)")
    return wrong + [f"Tab does not reach {e}" for i, e in enumerate(names) if i not in reached]


def _of_stop(browser: Browser, stop: dict[str, Any]) -> list[str]:
    wrong = [] if stop["seen"] else ["focused outside of the window"]
    with_focus = browser.picture()
    browser.evaluate("check.focused = document.activeElement; check.focused.blur()")
    if browser.picture() == with_focus:
        wrong.append("focus cannot be seen")
    browser.evaluate("check.focused.focus()")
    if stop["summary"]:
        is_open = "check.focused.parentElement.open"
        before = browser.evaluate(is_open)
        for key, expected in (("Enter", not before), ("Space", before)):
            browser.press(key)
            if browser.evaluate(is_open) != expected:
                wrong.append(f"{key} does nothing")
    elif stop["pressed"]:
        browser.evaluate(
            "check.clicks = 0; check.focused.addEventListener('click', e => check.clicks++)"
        )
        for count, key in enumerate(("Enter", "Space"), start=1):
            browser.press(key)
            if browser.evaluate("check.clicks") != count:
                wrong.append(f"{key} does nothing")
    return wrong


def _of_links(browser: Browser) -> list[str]:
    """Enter on a link within the page leads to its target."""
    wrong = []
    for i, address in enumerate(browser.evaluate(LINKS)):
        browser.evaluate(f"""document.querySelectorAll("a[href^='#']")[{i}].focus()""")
        browser.press("Enter")
        there = f"""
            (() => {{ const target = document.getElementById({address[1:]!r});
              const box = target && target.getBoundingClientRect();
              return target && location.hash === {address!r} && box.top >= -1
                && box.top < innerHeight; }})()"""
        if not browser.evaluate(there):
            wrong.append(f"the link {address} leads nowhere")
    return wrong


def _of_events(events: list[dict[str, Any]], page: Path) -> list[str]:
    """Messages, exceptions, dialogs, and requests for anything but the file."""
    wrong = []
    for event in events:
        method, told = event["method"], event["params"]
        if method == "Runtime.consoleAPICalled":
            words = " ".join(str(a.get("value", a.get("description"))) for a in told["args"])
            wrong.append(f"console.{told['type']}: {words}")
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            words = details.get("exception", {}).get("description") or details["text"]
            wrong.append(f"exception: {words.splitlines()[0]}")
        elif method == "Log.entryAdded":
            wrong.append(f"{told['entry']['level']} of the browser: {told['entry']['text']}")
        elif method == "Page.javascriptDialogOpening":
            wrong.append(f"dialog: {told['message']}")
        elif method == "Network.requestWillBeSent":
            address = told["request"]["url"].partition("#")[0]
            if address != page.resolve().as_uri() and not address.startswith("data:"):
                wrong.append(f"request: {address}")
    return wrong

"""Check the built site: `python docs/site/check.py out/site`. No page loads a file of another host."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
"""Elements that fetch a file when a page is opened, and the attribute that names it."""
ELSEWHERE = re.compile(r"^(?:[a-z]+:)?//", re.I)
IN_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)", re.I)


class Loads(HTMLParser):
    """The files of other hosts that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADS.get(tag, "")) or ""
        if ELSEWHERE.match(address) and given.get("rel") != "canonical":
            self.found.append(f"<{tag}> {address}")
        self.found += IN_CSS.findall(given.get("style") or "")


def loaded_from_elsewhere(site: Path) -> dict[str, list[str]]:
    """Pages and style sheets of the site that load something from another host, with the addresses."""
    found: dict[str, list[str]] = {}
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = Loads()
            page.feed(path.read_text(encoding="utf-8"))
            addresses = page.found
        elif path.suffix == ".css":
            addresses = IN_CSS.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        if addresses:
            found[str(path.relative_to(site))] = addresses
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    wrong = loaded_from_elsewhere(where)
    for name, addresses in wrong.items():
        print(f"{where / name}: loads {', '.join(addresses)} from another host")
    pages = len(list(where.rglob("*.html")))
    print(f"{where}/index.html: {pages} pages, {len(wrong)} of them load something from another host")
    sys.exit(bool(wrong) or not pages)

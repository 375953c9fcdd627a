"""Check the built site: `python docs/site/check.py out/site`. No page loads a file that is missing
or of another host."""

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
    """The files that a page loads and should not: of other hosts, or missing in its folder."""

    def __init__(self, page: Path, site: Path) -> None:
        super().__init__()
        self.folder, self.site = page.parent, site
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADS.get(tag, "")) or ""
        if given.get("rel") == "canonical" or address.startswith(("data:", "#")):
            address = ""
        place = self.site / address[1:] if address.startswith("/") else self.folder / address
        if ELSEWHERE.match(address) or not place.with_name(place.name.split("?")[0]).exists():
            self.found.append(f"<{tag}> {address}")
        self.found += IN_CSS.findall(given.get("style") or "")


def wrongly_loaded(site: Path) -> dict[str, list[str]]:
    """Pages and style sheets of the site that load a file of another host or a missing one, with the addresses."""
    found: dict[str, list[str]] = {}
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = Loads(path, site)
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
    wrong = wrongly_loaded(where)
    for name, addresses in wrong.items():
        print(f"{where / name}: loads {', '.join(addresses)}, of another host or missing")
    pages = len(list(where.rglob("*.html")))
    print(f"{where}/index.html: {pages} pages, {len(wrong)} that load a file of another host or a missing one")
    sys.exit(bool(wrong) or not pages)

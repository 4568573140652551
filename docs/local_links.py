"""Find links between built pages whose file or anchor does not exist.

Reads only HTML, and does not depend on Sphinx. External links are not followed.
"""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pathlib import Path


class Page(HTMLParser):
    """The links of a page, and its anchors.

    >>> page = Page('<a href="other.html#top">other</a> <h1 id="here">Here</h1> <img srcset="a.png, b.png 2x">')
    >>> sorted(page.links), page.anchors
    (['a.png', 'b.png', 'other.html#top'], {'here'})
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002  of any tag
        """Collect links and anchors from the attributes."""
        values = {name: value for name, value in attrs if value is not None}
        self.links |= {values[name] for name in ("href", "src") if name in values}
        self.links |= {source.split()[0] for source in values.get("srcset", "").split(",") if source.strip()}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}


def broken_links(folder: Path) -> list[tuple[str, str]]:
    """All broken links between the pages in a folder, as (page, link)."""
    pages = {
        path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))
    }
    return [
        (path.relative_to(folder.resolve()).as_posix(), link)
        for path, page in pages.items()
        for link in sorted(page.links)
        if not _leads_somewhere(path, link, pages)
    ]


def _leads_somewhere(page: Path, link: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return False
    # "#" and "#top" mean the top of any page.
    anchor = unquote(parts.fragment)
    return anchor in {"", "top"} or target not in pages or anchor in pages[target].anchors

"""Links between the built pages: docs/local_links.py, which the build of the documentation runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

broken_links = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "local_links.py"))["broken_links"]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "page.html").write_text('<h1 id="a b">Deep</h1> <a href="../index.html">up</a>')
    (tmp_path / "drawing.svg").write_text("<svg></svg>")
    return tmp_path


@pytest.mark.parametrize(
    "link",
    [
        "deep/page.html",
        "deep/page.html#a%20b",
        "#here",
        "#",
        "drawing.svg",
        "drawing.svg#layer",
        "index.html?highlight=hessian#here",
        "https://example.org/nowhere",
        "mailto:someone@example.org",
        "data:image/png;base64,AAAA",
    ],
)
def test_link_that_leads_somewhere(built: Path, link: str) -> None:
    (built / "index.html").write_text(f'<p id="here"></p> <a href="{link}">link</a>')
    assert broken_links(built) == []


@pytest.mark.parametrize(
    "link", ["missing.html", "deep/page.html#b", "#there", "deep", "../index.html", "page.html"]
)
@pytest.mark.parametrize("tag", ['<a href="{}">', '<img src="{}">', '<img srcset="drawing.svg, {} 2x">'])
def test_link_that_leads_nowhere(built: Path, tag: str, link: str) -> None:
    (built / "index.html").write_text('<p id="here"></p>' + tag.format(link))
    assert broken_links(built) == [("index.html", link)]


def test_page_of_a_broken_link_is_named_from_the_folder(built: Path) -> None:
    assert broken_links(built) == [("deep/page.html", "../index.html")]

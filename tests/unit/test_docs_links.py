"""Links between pages lead to a file and a heading that are there; so do those of comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# docs/page.md, "Heading", in a comment of any length: a line may end within it.
_QUOTED = re.compile(r'(docs/[a-z0-9-]+\.md)(?:,\s+(?:(?://|#)\s*)?"([^"]+)")?')


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_FOLDERS = ("headgate", "kernels", "launcher", "router", "shard", "tests")


def _sources() -> Iterator[Path]:
    yield ROOT / "Makefile"
    for folder in _FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp"):
                yield path


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading's text."""
    text = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def _headings(page: Path) -> dict[str, str]:
    """By anchor."""
    text = _FENCED.sub("", page.read_text())
    return {_anchor(line): line for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def _links(page: Path) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page(page: Path) -> None:
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in _headings(target), f"{link}: there is no such heading"


def test_pages_that_comments_name() -> None:
    found = 0
    for source in _sources():
        if source == Path(__file__).resolve():
            continue
        for name, heading in _QUOTED.findall(source.read_text()):
            found += 1
            page = ROOT / name
            assert page.exists(), f"{source}: there is no {name}"
            wanted = " ".join(re.sub(r"\n\s*(//|#)", " ", heading).split())
            if wanted:
                assert wanted in _headings(page).values(), f"{source}: {name} has no {wanted!r}"
    assert found > 20

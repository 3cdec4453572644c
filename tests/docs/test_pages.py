"""The pages hold together: links lead somewhere, files that they name exist, generated ones are the newest."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import configuration
from tests.docs.blocks import ROOT

DOCS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
PAGES = [*(f"docs/{name}" for name in DOCS), "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launchers/README.md"]
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
NAMED = re.compile(r"`((?:(?:asyncdapo|benchmarks|configs|launchers|stubs)/[\w./-]+)|examples/[\w/]+\.\w+)`")
OF_THE_PAST = ("docs/log.md", "docs/decisions.md")
"""They name what was there on a date."""
README_LINES = 150


def text_of(path: Path) -> str:
    """Without its code blocks."""
    return FENCED.sub("", path.read_text())


def anchors_of(path: Path) -> Iterator[str]:
    """As MkDocs and GitHub make them of headings."""
    for heading in HEADING.findall(text_of(path)):
        yield re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: str) -> None:
    path = ROOT / page
    for link in LINK.findall(text_of(path)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{page}: {link}: there is no such file"
        assert target.parent == ROOT / "docs" or not page.startswith("docs/"), f"{page}: {link} leads out of the site"
        assert not anchor or anchor in anchors_of(target), f"{page}: {link}: there is no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_THE_PAST])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = NAMED.findall((ROOT / page).read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_tour_names_most_of_the_files_that_a_newcomer_needs() -> None:
    assert len(set(NAMED.findall((ROOT / "docs" / "architecture.md").read_text()))) > 50


def test_the_readme_fits_three_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_page_of_all_keys_is_the_newest() -> None:
    assert configuration.PATH.read_text() == configuration.page(), f"write it anew: {configuration.COMMAND}"


def test_every_page_is_in_the_navigation_and_in_the_list_of_pages() -> None:
    listed = re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == DOCS
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert sorted({*linked, "index.md"} & set(DOCS)) == DOCS


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="the extra `docs` is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "architecture" / "index.html").is_file()

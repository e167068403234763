"""The documents as pages: each is in the site's navigation, and its links are right there and in the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

PAGES = sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))
DOCUMENTS = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")] + PAGES
LIST = re.compile(r"\s*(?:[-*]|\d+\.) ")


def prose(document: Path) -> str:
    """The text of a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """Those of its headings that the repository's view and the site's Markdown make alike."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(document), re.M):
        kept = re.sub(r"[^\w\s-]", "", heading.strip().lower())
        on_the_site = re.sub(r"[-\s]+", "-", kept).strip("-")
        if kept.replace(" ", "-") == on_the_site:
            found.add(on_the_site)
    return found


def links(document: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    return [link for link in found if not link.startswith(("http://", "https://"))]


def names_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for part in (nav.values() if isinstance(nav, dict) else nav) for name in names_in(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = names_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == [path.name for path in PAGES]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_and_anchors_resolve(document: Path) -> None:
    wrong = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (ROOT / document.parent / path).resolve() if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target.relative_to(ROOT))):
            wrong.append(link)
        elif document in PAGES and not target.is_relative_to(ROOT / "docs"):
            wrong.append(f"{link}: the site holds docs/ alone; write the path without a link")
    assert wrong == []


@pytest.mark.parametrize("document", PAGES, ids=str)
def test_lists_and_tables_begin_after_an_empty_line(document: Path) -> None:
    """Else the site's Markdown takes them as text of the paragraph above."""
    wrong, before = [], ""
    for line in prose(document).splitlines():
        goes_on = before.startswith(" ") or LIST.match(before)
        if before and ((LIST.match(line) and not goes_on) or (line.startswith("|") and not before.startswith("|"))):
            wrong.append(line)
        before = line
    assert wrong == []


def test_hosted_files_are_read_and_the_bug_form_asks_what_is_there() -> None:
    read = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/*/*.yml")}
    assert {"ci", "wheels", "bug", "feature"} <= set(read) and yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert any("python -m mmkernels" in part["attributes"]["label"] for part in read["bug"]["body"])
    assert read["ci"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.12", "3.14"]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.skipif(not shutil.which("mkdocs", path=str(Path(sys.executable).parent)), reason="extra docs: `make docs`")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    words = [mkdocs, "build", "--strict", "--site-dir", tmp_path]  # --quiet would count no warning
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(r'(?:src|rel="stylesheet" href)="([^"]+)"', page.read_text())
        assert [name for name in loaded if name.startswith(("http", "//"))] == [], page.name

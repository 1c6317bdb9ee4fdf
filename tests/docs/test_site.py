"""The site builds without a warning, from nothing but its own files, and each kind of mistake in a
page fails the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers.pages import links_of, name_of, pages, spans_of
from tests.helpers.paths import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("sphinx", reason="needs Sphinx: pip install 'zaya-train[docs]'")


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, into another folder."""
    recipe = (REPOSITORY / "Makefile").read_text()
    command = re.search(r"\$\(BIN\)/python (-m sphinx .*) docs build/docs\n", recipe)
    assert command is not None
    words = [sys.executable, *command[1].split(), str(source), str(output)]
    return subprocess.run(words, cwd=source.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY / "docs", output)
    assert done.returncode == 0, done.stderr
    return output


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    sources = {name_of(page)[len("docs/") : -len(".md")] for page in pages(history=True)
               if name_of(page).startswith("docs/")}  # fmt: skip
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert sources <= built
    start = (site / "index.html").read_text()
    first_level = {name for name in sources if "/" not in name and name != "index"}
    assert {name for name in first_level if f'href="{name}.html"' not in start} == set()


def test_a_browser_fetches_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are the site's own files; links may lead outside."""
    outside = []
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(https?:)?//", text)
        found += re.findall(r"<link(?![^>]*rel=\"canonical\")[^>]*href=\"(https?:)?//", text)
        found += re.findall(r"(?:@import|url\()\s*[\"']?(https?:)?//", text)
        if found:
            outside.append(path.name)
    assert outside == []


def test_search_works_from_a_folder_and_pages_fit_a_phone(site: Path) -> None:
    """The index is a script, which a page of file:// may load; a JSON file it may not."""
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(") and "balanc" in index
    assert 'name="viewport" content="width=device-width' in (site / "muon.html").read_text()


PLANTED = {
    "a link to a page that is not there": ("[x](nowhere.md)", "nowhere.md"),
    "a link to a heading that is not there": ("[x](second.md#nothing)", "'nothing'"),
    "a link to a heading of its own": ("[x](#none-here)", "none-here"),
    "a link to a file that is not there": ("[x](../zaya_train/nothing.py)", "nothing.py"),
    "a picture that is not there": ("![x](nothing.svg)", "nothing.svg"),
    "a page that no table of contents names": ("", "third.md"),
}


def small_site(root: Path, text: str) -> Path:
    source = root / "docs"
    source.mkdir()
    shutil.copy(REPOSITORY / "docs" / "conf.py", source)
    (source / "index.md").write_text("# One\n\n```{toctree}\nsecond\n```\n" + text + "\n")
    (source / "second.md").write_text("# Two\n\n## Part\n\n$x^2$ [part](second.md#part)\n")
    return source


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A site with every planted fault at once; the builder names all of them."""
    root = tmp_path_factory.mktemp("faulty")
    source = small_site(root, "\n\n".join(text for text, _ in PLANTED.values()))
    (source / "third.md").write_text("# Three\n")
    return build(source, root / "site")


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_fails_the_build(
    fault: str, faulty: subprocess.CompletedProcess[str]
) -> None:
    named = PLANTED[fault][1]
    assert faulty.returncode != 0
    assert [line for line in faulty.stderr.splitlines() if "WARNING" in line and named in line]


def test_formulas_become_mathml(tmp_path: Path) -> None:
    done = build(small_site(tmp_path, "$$a_{ij}$$"), tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "<msup>" in (tmp_path / "site" / "second.html").read_text()
    assert (
        '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">'
        in (tmp_path / "site" / "index.html").read_text()
    )


def test_no_command_of_a_formula_is_left_as_it_was(site: Path) -> None:
    """latex2mathml passes on what it does not know."""
    odd = {p.name for p in site.rglob("*.html") if re.search(r"<m\w+>\\", p.read_text("utf-8"))}
    assert odd == set()


def missing_links(page: Path, text: str) -> list[str]:
    """Links of a page outside the site that lead to no file."""
    return [
        f"{name_of(page)}:{line}: {target}"
        for line, target in links_of(text)
        if "://" not in target and not (page.parent / target.partition("#")[0]).exists()
    ]


def test_links_of_pages_outside_the_site_lead_to_files() -> None:
    outside = [page for page in pages(history=True) if page.parent == REPOSITORY]
    assert [fault for page in outside for fault in missing_links(page, page.read_text())] == []
    assert missing_links(REPOSITORY / "README.md", "[x](docs/no.md)") == ["README.md:1: docs/no.md"]


_ROOTS = "zaya_train|zaya_kernels|kernels|tests|configs|launch|docker|docs|.ci"
MADE = {"configs/cluster/mysite.yaml", "configs/model/mine.yaml", "kernels/bench/results.csv"}
"""What a reader's own commands make."""
_PATH = re.compile(rf"(?:{_ROOTS})/[\w./-]+|test_\w+\.py(?:::\w+)?")


def missing_paths(text: str) -> list[str]:
    """Code spans that name a file, folder or test of the project that is not there."""
    found = []
    for line, span in spans_of(text):
        name, _, test = span.partition("::")
        named = _PATH.fullmatch(name) and name not in MADE
        if named and not _is_there(name.rstrip("/"), test):
            found.append(f"{line}: {span}")
    return found


def _is_there(name: str, test: str) -> bool:
    places = [REPOSITORY / name, REPOSITORY / "kernels" / name]
    if "/" not in name:
        places += REPOSITORY.glob(f"tests/*/{name}")
    if name.startswith("docs/decisions/0"):
        places += REPOSITORY.glob(f"{name}*")
    found = [place for place in places if place.exists()]
    return any(not test or f"def {test}(" in place.read_text() for place in found)


def test_paths_of_code_named_in_the_pages_exist() -> None:
    faults = [
        f"{name_of(page)}:{fault}" for page in pages() for fault in missing_paths(page.read_text())
    ]
    assert faults == []


@pytest.mark.parametrize(
    "span", ["zaya_train/no.py", "test_no.py", "tests/docs/test_site.py::test_no", "configs/no"]
)
def test_a_planted_path_is_found(span: str) -> None:
    assert missing_paths(f"See `{span}`.") == [f"1: {span}"]

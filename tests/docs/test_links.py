"""Every link of a page leads somewhere, and every file that a page names is there."""

import re
import tomllib

import pytest

from markdown import PAGES, ROOT, anchors, links, paths

RESULTS = ROOT / 'benchmarks' / 'results' / 'README.md'


@pytest.mark.parametrize('page', [*PAGES, RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        if re.match(r'https?://', link):
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    for name in paths(page.read_text()):  # configs/eval.py is the official one; NAME is to be filled in.
        assert (ROOT / name).exists() or name == 'configs/eval.py' or '/NAME' in name, name


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_every_page_is_in_the_index():
    index = (ROOT / 'docs' / 'README.md').read_text()
    assert {page.name for page in (ROOT / 'docs').glob('*.md')} - {'README.md'} <= set(links(index))


def test_citation_and_package_agree():
    version = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']
    assert f'version: {version}\n' in (ROOT / 'CITATION.cff').read_text()
    assert f'## {version}' in (ROOT / 'CHANGELOG.md').read_text()

"""Code blocks, links and headings of Markdown pages."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
_BLOCK = re.compile(r'^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$', re.M | re.S)
_LINK = re.compile(r'!?\[[^\]]*\]\(([^)\s]+)\)')
_PATH = re.compile(r'`((?:benchmarks|byol_func|configs|docs|tests)/[\w./]*)(?::\w+)?`')


class Block(NamedTuple):
    """A fenced block; `reason` is why it is not run, '' where it is."""

    language: str
    code: str
    reason: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(m['language'], m['code'], m['reason'] or '') for m in _BLOCK.finditer(text)]


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments."""
    joined = code.replace('\\\n', ' ')
    return [
        shlex.split(part, comments=True) for line in joined.splitlines() for part in line.split('&&') if part.strip()
    ]


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub('', text)


def links(text: str) -> list[str]:
    """The targets of all links and pictures."""
    return _LINK.findall(without_blocks(text))


def paths(text: str) -> list[str]:
    """Files and folders of this repository that are named in code spans."""
    return _PATH.findall(without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r'^#+ (.+)$', without_blocks(text), re.M)
    plain = (re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings)
    return {heading.replace(' ', '-') for heading in plain}

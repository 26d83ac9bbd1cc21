"""Messages agree with their numbers: '1 image', not '1 images'."""

import ast
import pathlib
import re

import pytest

from byol_func.errors import counted
from cli import ROOT

_NOUNS = (
    'classes|embeddings|epochs|examples|features|files|folders|GPUs|hours|images|labels|others|pairs|processes|replicas'
    '|runs|seeds|steps|threads|trees|workers'
)
_PLURAL = rf'( held-out| more| training)? ({_NOUNS})\b(?!/)'  # images/s is a unit.


def test_one_is_singular():
    assert [counted(n, 'image') for n in (0, 1, 2)] == ['0 images', '1 image', '2 images']
    assert [counted(n, 'process') for n in (1, 2)] == ['1 process', '2 processes']
    assert [counted(2, noun) for noun in ('batch', 'index', 'epoch')] == ['2 batches', '2 indexes', '2 epochs']
    assert [counted(n, 'epoch', 'g') for n in (0.5, 1.0, 1.5)] == ['0.5 epochs', '1 epoch', '1.5 epochs']
    assert counted(1234567, 'step', ',') == '1,234,567 steps'


def _plurals(source: str) -> list[str]:
    """The plural nouns that a source writes behind a number, whatever the number is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts = ['\0' if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values]
            found += [match[0] for match in re.finditer(f'\0{_PLURAL}', ''.join(texts))]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [match[0] for match in re.finditer(f'%[dg]{_PLURAL}', node.value)]
    return found


@pytest.mark.parametrize('path', sorted((ROOT / 'byol_func').rglob('*.py')), ids=lambda path: path.stem)
def test_nouns_behind_numbers_are_counted(path: pathlib.Path):
    assert not _plurals(path.read_text()), 'use errors.counted'


def test_such_a_noun_is_found():
    assert _plurals("f'{n} images'") and _plurals("f'{n:,} training images'") and _plurals("'%d steps'")
    assert not _plurals("f'{n:.1f} images/s'") and not _plurals("'seeds %d to %d'")

"""A file is whole or not there, and one function sees to it."""

import os

import pytest

from byol_func.runtime import atomic
from cli import ROOT


@pytest.mark.parametrize('options', [{}, {'shared': True}, {'durable': True}], ids=str)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, options):
    path = tmp_path / 'new folder' / 'file'
    with atomic.replacing(path, **options) as temporary:
        temporary.write_text('old')
    with pytest.raises(ZeroDivisionError), atomic.replacing(path, **options) as temporary:
        temporary.write_text('half of the n')
        assert path.read_text() == 'old'
        _ = 1 / 0
    assert path.read_text() == 'old'
    assert os.listdir(path.parent) == ['file']


def test_two_writers_of_a_shared_file(tmp_path):
    path = tmp_path / 'file'
    with atomic.replacing(path, shared=True) as first, atomic.replacing(path, shared=True) as second:
        first.write_text('first')
        second.write_text('second')
    assert path.read_text() == 'first', 'the last to end'
    assert os.listdir(tmp_path) == ['file']


def test_parts_come_one_after_the_other(tmp_path):
    atomic.write_bytes(tmp_path / 'file', b'a', memoryview(b'bc'), durable=True)
    assert (tmp_path / 'file').read_bytes() == b'abc'


def test_nobody_else_renames_files_into_place():
    for path in sorted((ROOT / 'byol_func').rglob('*.py')):
        text = path.read_text()
        if path.name != 'atomic.py':
            assert 'os.replace(' not in text and ".tmp'" not in text.replace("_*.tmp'", ''), path

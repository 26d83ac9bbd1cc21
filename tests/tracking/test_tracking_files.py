"""What tracking reads and writes of files."""

import contextlib
import os
import sqlite3

from byol_func.errors import redact
from byol_func.tracking.client import artifact_location, check_uri
from byol_func.tracking.tail import MetricsTail
from runs import error_of


def test_tail_reads_whole_lines_once(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    tail = MetricsTail(path, ('pretrain',))
    assert tail.read() == []
    path.write_text('{"mode": "pretrain", "step": 0, "loss": 2.0, "note": "x"}\n{"mode": "eval", "step": 0}\n{"mo')
    assert tail.read() == [(0, {'pretrain/loss': 2.0})]
    assert tail.read() == []
    with open(path, 'a') as file:
        file.write('de": "pretrain_x", "step": 1, "a/b(c)": 1}\nno json\n')
    assert tail.read() == [(1, {'pretrain_x/a/b_c_': 1.0})]
    other = tmp_path / 'other'
    other.write_text('{"mode": "pretrain", "step": 7, "loss": 3.0}\n')
    other.replace(path)
    assert tail.read() == [(7, {'pretrain/loss': 3.0})]


def test_tail_of_a_long_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(f'{{"mode": "pretrain", "step": {i}, "loss": 0}}\n' for i in range(5000)))
    tail, steps = MetricsTail(path, ('pretrain',)), []
    while records := tail.read():
        steps += [record.step for record in records]
    assert steps == list(range(5000))


def test_passwords_are_not_written_down():
    assert redact('--uri=https://me:secret@host:5000/x') == '--uri=https://host:5000/x'
    assert redact("'--uri=http://me:se@cr:et@host/x' and so@on") == "'--uri=http://host/x' and so@on"
    for without in ('sqlite:////tmp/a@b.db', 'http://host:5000/x', 'folder/a@b'):
        assert redact(without) == without
        check_uri(without)
    for unclear in ('http://me:se/cret@host', 'http://me:se cret@host', 'postgresql://me:secret@host/a@b'):
        assert 'secret' not in error_of(check_uri, unclear)


def test_a_database_that_cannot_be_opened_is_refused_at_once(tmp_path):
    (tmp_path / 'notes.db').write_text('no database')
    (tmp_path / 'folder').mkdir()
    for path, reason in (
        ('missing/x.db', 'there is no folder'),
        ('notes.db/x.db', 'there is no folder'),
        ('notes.db', 'the file is no sqlite database'),
        ('folder', 'it is no file'),
    ):
        for scheme in ('sqlite', 'sqlite+pysqlite'):
            uri = f'{scheme}:///{tmp_path}/{path}'
            message = error_of(check_uri, uri)
            assert message.startswith(f'--mlflow_tracking_uri={uri}: {reason}')
    if os.path.isdir('/proc/sys'):  # Nobody can write there, not even root.
        assert 'cannot write there' in error_of(check_uri, 'sqlite:////proc/x.db')
    (tmp_path / 'empty.db').touch()
    with contextlib.closing(sqlite3.connect(tmp_path / 'real.db')) as connection:
        connection.execute('create table t (x)')
    for name in ('empty.db', 'real.db', 'new.db', 'new.db?timeout=9'):
        check_uri(f'sqlite:///{tmp_path}/{name}')
    for uri in ('sqlite://', 'sqlite:///:memory:', f'{tmp_path}/missing/folder'):
        check_uri(uri)
    assert not (tmp_path / 'new.db').exists()


def test_where_the_files_of_an_experiment_go(tmp_path):
    assert artifact_location(f'sqlite:///{tmp_path}/a b/x.db') == (tmp_path / 'a b/mlruns').as_uri()
    assert artifact_location('http://host:5000') is None and artifact_location('folder') is None

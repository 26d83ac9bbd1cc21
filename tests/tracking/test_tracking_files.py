"""What tracking reads and writes of files."""

from byol_func.errors import redact
from byol_func.tracking.client import check_uri
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

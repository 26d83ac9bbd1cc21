"""The tables of results are those of the files, and a run is added with one command."""

import json

import pytest

from benchmarks import gallery, results_table
from markdown import ROOT


def test_tables_are_those_of_the_files():
    assert (results_table.RESULTS / 'README.md').read_text() == results_table.results_page(), (
        'run python benchmarks/results_table.py'
    )
    readme = (ROOT / 'README.md').read_text()
    assert readme == results_table.fill_readme(readme), 'run python benchmarks/results_table.py'


def test_docstrings_of_the_gallery_say_what_was_measured():
    found = json.loads((gallery.RESULTS / 'gallery.json').read_text())
    assert (gallery.RESULTS / 'gallery.txt').read_text() == gallery.table(found)
    for name in set(gallery.names()) - {'BYOL', *gallery.PROBES}:
        text = (gallery.RULES / f'{name}.py').read_text()
        assert gallery.sentence(found, name) in text, 'run python benchmarks/gallery.py --write'


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setattr(results_table, 'RESULTS', tmp_path / 'results')
    (tmp_path / 'results').mkdir()
    return tmp_path / 'results'


SUMMARY = {
    'mode': 'pretrain',
    'dataset': 'folder',
    'eval_split': 'test',
    'encoder': 'ResNet10',
    'seed': [0, 1],
    'steps': 100,
    'epochs': 2.0,
    'batch_size': 10,
    'images_per_second': 1.0,
    'seconds': 30.0,
    'device': 'cpu (2 threads)',
    'torch_version': '2.14.1+cpu',
    'command': 'python launch.py --config=configs/folder.py --config.dataset.root=/home/me/pictures',
    'test/linear_top1': 0.5,
    'over_seeds': {'test/linear_top1': {'mean': 0.5, 'std': 0.01, 'values': [0.49, 0.51]}},
}


def test_a_run_is_added(results, tmp_path):
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / 'config.json').write_text(json.dumps({'dataset': {'root': '/home/me/pictures'}}))
    (workdir / 'summary.json').write_text(json.dumps(SUMMARY))
    (workdir / 'summary.knn.json').write_text(json.dumps({'mode': 'knn', 'eval_split': 'test', 'test/knn_top1': 0.25}))
    (workdir / 'seed_1').mkdir()
    (workdir / 'seed_1' / 'metrics.jsonl').write_text('{}\n')
    (tmp_path / 'log').write_text(f'Everything is in {workdir}.\n')
    results_table.add(workdir, 'pictures', tmp_path / 'log', data='My pictures', note='A note.')
    (row,) = (results_table.full_row(name, one) for name, one in results_table.read_results().items())
    assert row['data'] == 'My pictures' and row['note'] == 'A note.'
    assert row['linear'] == '50.0 ± 1.0' and row['k-NN'] == '25.0' and row['seeds'] == '2'
    assert row['training'] == '33 min'  # 2 x 100 steps of 10 images at one a second: the run was resumed.
    written = ''.join(path.read_text() for path in (results / 'pictures').iterdir())
    assert '/home/me' not in written and str(tmp_path) not in written
    assert (results / 'pictures' / 'metrics_seed_1.jsonl').exists()
    assert '| My pictures |' in results_table.results_page()


def test_the_closing_table_is_found(results):
    (results / 'one').mkdir()
    (results / 'one' / 'log.txt').write_text('line\n\ndigits  top-1 %\n----\nlinear  88.1\n\nEverything is in runs.\n')
    assert results_table.closing_table('one') == 'digits  top-1 %\n----\nlinear  88.1'

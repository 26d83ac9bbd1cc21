"""`python -m byol_func.report.compare`: tables and one picture of several runs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from byol_func.errors import UserError
from byol_func.report import compare
from cli import ROOT, Outcome, run_module, succeed, tiny_digits


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
    """Three workdirs: two seeds, another learning rate, and another seed of the latter."""
    folder = tmp_path_factory.mktemp('runs')
    for name, overrides in (
        ('two', dict(num_seeds=2)),
        ('fast', dict(lr_schedule__base_learning_rate=4.0)),
        ('fast_again', dict(lr_schedule__base_learning_rate=4.0, random_seed=7)),
    ):
        succeed(*tiny_digits(**overrides), f'--workdir={folder}/{name}', cwd=folder)
    return folder


def _compare(*argv: str, cwd: pathlib.Path) -> Outcome:
    return run_module('byol_func.report.compare', *argv, cwd=cwd)


def _summary(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / 'summary.json').read_text())


def test_compare_runs(folder, tmp_path):
    paths = [f'{folder}/{name}/' for name in ('two', 'fast', 'fast_again', 'fast')]
    done = _compare(*paths, cwd=tmp_path)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    two, fast = (next(line for line in lines if line.startswith(name)) for name in ('two ', 'fast, fast_again '))
    spread = _summary(folder / 'two')['over_seeds']['test/online_top1']
    assert f'{100 * spread["mean"]:.2f} +- {100 * spread["std"]:.2f}' in two
    assert two.split()[1:3] == ['2', '11'] and fast.split()[2:4] == ['2', '11']
    mean = sum(_summary(folder / name)['test/online_top1'] for name in ('fast', 'fast_again')) / 2
    assert f'{100 * mean:.2f} +-' in fast
    differences = lines[lines.index(next(line for line in lines if line.startswith('what differs'))) + 2 :]
    assert differences[0].split() == ['config.lr_schedule.base_learning_rate', '2.0', '4.0']
    assert differences[1] == '' and lines[-1] == f'The curves are in {folder}/comparison.png.'
    with Image.open(folder / 'comparison.png') as image:
        assert image.format == 'PNG' and min(image.size) > 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'where, output, written',
    [('', [], 'runs/comparison.png'), ('runs', [], 'comparison.png'), ('', ['--picture=x.png'], 'x.png')],
)
def test_where_the_picture_goes(where, output, written, folder, tmp_path):
    (tmp_path / 'runs').mkdir()
    for name in ('fast', 'two'):
        (tmp_path / 'runs' / name).symlink_to(folder / name)
    prefix = '' if where else 'runs/'
    done = _compare(*(f'{prefix}{name}' for name in ('fast', 'two')), *output, cwd=tmp_path / where)
    assert done.code == 0 and done.stdout.endswith(f'The curves are in {written}.\n')
    assert [path.relative_to(tmp_path / where) for path in tmp_path.rglob('*.png')] == [pathlib.Path(written)]


def test_an_unfinished_run_is_shown(folder, tmp_path):
    workdir = tmp_path / 'killed'
    workdir.mkdir()
    (workdir / 'config.json').write_text((folder / 'fast/config.json').read_text())
    lines = (folder / 'fast/metrics.jsonl').read_text().splitlines()
    (workdir / 'metrics.jsonl').write_text('\n'.join(lines[:5]) + '\n{"mode": "pre')
    (group,) = compare.read_groups([str(workdir)])
    row = compare.results_table([group]).splitlines()[2]
    assert row.split() == ['killed', '1', '5', '-']
    (both,) = compare.read_groups([str(workdir), str(folder / 'fast')])
    assert '(1 of 2)' in compare.results_table([both]) and compare.differences_table([both]) == ''


def test_a_reader_that_goes_away(folder, tmp_path):
    """As `head -1` does: the pipe is closed before the first line."""
    argv = [sys.executable, '-m', 'byol_func.report.compare', f'{folder}/fast']
    environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(
        argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ''


def test_an_empty_section_has_no_row():
    group = compare.Group('a', {'batch_size': 1, 'variant_config': {}}, [])
    other = compare.Group('b', {'batch_size': 1, 'variant_config.tau': 0.9}, [])
    (row,) = compare.differences_table([group, other]).splitlines()[2:]
    assert row.split() == ['config.variant_config.tau', '-', '0.9']


def test_names_are_told_apart(folder):
    groups = compare.read_groups([f'{folder}/two/seed_0', f'{folder}/fast'])
    assert [group.label for group in groups] == ['seed_0', 'fast']
    (group,) = compare.read_groups([f'{folder}/two/seed_0', f'{folder}/two/seed_1/../seed_0'])
    assert len(group.repetitions) == 2


@pytest.mark.parametrize(
    'argv, expected',
    [
        ([], 'no WORKDIR given; expected python -m byol_func.report.compare WORKDIR'),
        (['nowhere'], "'nowhere': no config.json in it; expected the --workdir of a run of launch.py"),
        (['.'], "'.': no config.json in it"),
        (['{fast}', '--picture=/dev/null/a/x.png'], '--picture=/dev/null/a/x.png: cannot be written (Not a directory'),
        (['{fast}', '--picture=x.jpg'], '--picture=x.jpg: expected a name that ends in .png'),
    ],
)
def test_bad_input(argv, expected, folder, tmp_path):
    done = _compare(*(argument.format(fast=folder / 'fast') for argument in argv), cwd=tmp_path)
    assert done.code == 1 and done.stderr.count('\n') == 1 and expected in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'name, content',
    [
        ('config.json', b'{"a'),
        ('config.json', b'[1]'),
        ('summary.pretrain.json', b''),
        ('metrics.jsonl', b'\xff\xfe'),
    ],
)
def test_damaged_files(name, content, tmp_path):
    (tmp_path / 'config.json').write_text('{"a": 1}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f'{name}.*expected the --workdir'):
        compare.read_groups([str(tmp_path)])


def test_numbers_of_different_protocols_are_told_apart(tmp_path):
    """Those of pre-training from those of an evaluation of its own, val from test, old summaries too."""
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / 'config.json').write_text('{}')
    for summary in (
        {'mode': 'pretrain', 'eval_split': 'test', 'test/knn_top1': 0.1, 'test/linear_top1': 0.2},
        {'mode': 'knn', 'eval_split': 'test', 'test/knn_top1': 0.3},
        {'mode': 'linear_eval', 'eval_split': 'test', 'test/linear_top1': 0.4},
        {'mode': 'fine_tune', 'eval_split': 'val', 'test/fine_tuned_top1': 0.5},
        {'mode': 'eval', 'split': 'val', 'eval_split': 'test', 'val/online_top1': 0.6},
    ):
        (workdir / f'summary.{summary["mode"]}.json').write_text(json.dumps(summary))
    table = compare.results_table(compare.read_groups([str(workdir)])).splitlines()
    assert [line.split() for line in table[:3]] == [
        ['top-1', '%', 'seeds', 'steps', 'images/s', 'linear', 'k-NN', 'k-NN', 'while', 'fine-tuned', 'online'],
        ['(test)', '(test)', 'training', '(val)', '(val)'],
        ['(test)'],
    ]
    assert table[4].split()[-5:] == ['40.00', '30.00', '10.00', '50.00', '60.00']


def test_the_number_of_labels(tmp_path):
    """It is part of the header where all rows share it, and of the cells where they differ."""
    for name, count in (('few', 20), ('many', 1442)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps({'a': count}))
        for mode, measure, labels in (('logistic', 'logistic', count), ('knn', 'knn', 1), ('pretrain', 'online', None)):
            summary = {'mode': mode, f'test/{measure}_top1': 0.5, **({'labelled_images': labels} if labels else {})}
            (tmp_path / name / f'summary.{mode}.json').write_text(json.dumps(summary))
    table = compare.results_table(compare.read_groups([f'{tmp_path}/few', f'{tmp_path}/many']))
    assert '50.00, 20 labels' in table and '50.00, 1,442 labels' in table and table.count('label') == 3
    assert table.splitlines()[2].split() == ['1', 'label']
    alone = compare.results_table(compare.read_groups([f'{tmp_path}/few'])).splitlines()
    assert alone[2].split() == ['20', 'labels', '1', 'label'] and '50.00 ' in alone[4]


def test_tables_fit_the_line():
    names = ['linear', 'knn', 'logistic', 'online', 'online_knn', 'fine_tuned', 'untrained_linear', 'pixels_knn']
    metrics = {f'{split}/{name}_top1': 0.123 for split in ('test', 'val') for name in names}
    groups = [
        compare.Group(f'{label * 30} a', {'variant': label * 50}, [compare.Repetition({}, metrics, {}, 1.0)] * 2)
        for label in 'xyz'
    ]
    lines = compare.results_table(groups).splitlines()
    assert max(map(len, [*lines, *compare.differences_table(groups).splitlines()])) <= 100
    found = [line.split()[2:] for line in lines if line.startswith('x')]  # Behind the two words of the label.
    assert sum(cells.count('12.30') for cells in found) == len(metrics) and found[0][0] == '2'

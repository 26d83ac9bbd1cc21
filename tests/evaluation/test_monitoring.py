"""What is told while BYOL trains: accuracies now and then, a collapse as it happens."""

import json
import pathlib

import pytest
import torch

from byol_func.modes import monitoring
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from byol_func.workdir.summaries import merge_seeds
from cli import run_launch, succeed, tiny_digits
from configs import digits
from runs import records, without_rates

HEALTHY = dict(projection_spread=0.8, effective_rank=20.0)
COLLAPSED = dict(projection_spread=0.004, effective_rank=20.0)


@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    """Outcome, workdir and flags of two epochs of 11 steps, looked at every half epoch."""
    workdir = tmp_path_factory.mktemp('healthy')
    argv = tiny_digits(
        num_epochs=2, eval_every_epochs=0.5, monitoring__health_every_steps=4, monitoring__knn_bank_size=200
    )
    return succeed(*argv, '--log_every_seconds=0', f'--workdir={workdir}', cwd=workdir), workdir, argv


def test_accuracies_and_health_are_written_now_and_then(healthy):
    outcome, workdir, _ = healthy
    lines, last = records(workdir), 21
    evaluations = [r for r in lines if 'test/online_knn_top1' in r]
    assert [r['step'] for r in evaluations] == [5, 11, 17, last]
    assert all(0 <= r[f'test/{name}'] <= 1 for r in evaluations for name in ('online_knn_top1', 'online_top1'))
    assert evaluations[-1]['test/online_knn_top1'] > 0.15  # Of ten classes.
    panels = [r for r in lines if 'health/projection_spread' in r]
    assert [r['step'] for r in panels] == [3, 7, 11, 15, 19, last]
    assert all(r['health/collapsed'] == 0.0 for r in panels) and 'collapsed' not in outcome.stderr
    logged = {r['step']: r for r in lines if 'loss' in r}
    for record in panels:
        for name in ('tau', 'learning_rate'):
            assert record[f'health/{name}'] == logged[record['step']][name]
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['collapses'] == []
    names = [name for name in evaluations[-1] if name.startswith('test/')]
    assert {name: summary[name] for name in names} == {name: evaluations[-1][name] for name in names}


def test_less_than_a_step_is_every_step_and_none_is_told(tmp_path):
    argv = tiny_digits(batch_size=512, eval_every_epochs=1e-9)
    succeed(*argv, f'--workdir={tmp_path}/often', cwd=tmp_path)
    assert [r['step'] for r in records(tmp_path / 'often') if 'test/online_knn_top1' in r] == [0, 1]
    outcome = succeed(*tiny_digits(num_epochs=0), f'--workdir={tmp_path}/none', cwd=tmp_path)
    assert 'pretrain: no epochs, so nothing is trained' in outcome.stderr


def test_the_lines_of_progress_show_what_is_known(healthy):
    lines = [line for line in healthy[0].stderr.splitlines() if ', loss ' in line]
    found = [r for r in records(healthy[1]) if 'test/online_knn_top1' in r]
    assert ', online ' in lines[0] and 'k-NN' not in lines[0]
    shown = (
        f', test {100 * found[-2]["test/online_top1"]:.1f} %, k-NN {100 * found[-2]["test/online_knn_top1"]:.1f} %, '
    )
    assert shown in lines[-1]


def test_looking_changes_no_number(healthy, tmp_path):
    _, workdir, argv = healthy
    rarely = ['--config.eval_every_epochs=0', '--config.monitoring.health_every_steps=1000']
    succeed(*argv, *rarely, f'--workdir={tmp_path}', cwd=tmp_path)
    steps = [without_rates([r for r in records(w) if 'loss' in r]) for w in (workdir, tmp_path)]
    assert steps[0] == steps[1] and len(steps[0]) == 22
    assert [r['step'] for r in records(tmp_path) if 'loss' not in r] == [21, 21]


def test_a_finished_run_tells_the_same(healthy):
    _, workdir, argv = healthy
    before = json.loads((workdir / 'summary.json').read_text())
    succeed(*argv, f'--workdir={workdir}', cwd=workdir)
    assert json.loads((workdir / 'summary.json').read_text()) == before


def test_a_collapse_is_said_while_it_happens(tmp_path):
    """Weight decay that eats the weights faster than gradients feed them, norms and biases included."""
    argv = tiny_digits(
        batch_size=64,
        num_epochs=3,
        optimizer='sgd',
        lr_schedule__base_learning_rate=1.0,
        optimizer_config__sgd__weight_decay=0.3,
        optimizer_config__sgd__weight_decay_filter='none',
        monitoring__health_every_steps=5,
    )
    outcome = succeed(*argv, '--log_every_seconds=0', f'--workdir={tmp_path}', cwd=tmp_path)
    (event, *_) = json.loads((tmp_path / 'summary.json').read_text())['collapses']
    said = [line for line in outcome.stderr.splitlines() if 'has collapsed' in line]
    assert f'Step {event["step"]}: the network has collapsed' in said[0]
    assert f'health/{event["measure"]}' in said[0] and 10 < event['step'] < 60
    (record,) = (r for r in records(tmp_path) if r['step'] == event['step'] and 'health/collapsed' in r)
    assert record['health/collapsed'] == 1.0
    assert record[f'health/{event["measure"]}'] == event['value'] < 0.2
    lines = outcome.stderr.splitlines()
    assert lines.index(said[0]) < max(i for i, line in enumerate(lines) if 'images/s' in line)  # Not at the end.


def _write(workdir: pathlib.Path, panels: dict[int, dict], watch: monitoring.CollapseWatch) -> list[bool]:
    found = []
    with open(workdir / 'metrics.jsonl', 'a') as file:
        for step, scalars in panels.items():
            found.append(watch.look(step, scalars))
            record = {f'health/{name}': value for name, value in scalars.items()}
            file.write(
                json.dumps({'mode': 'pretrain', 'step': step, **record, 'health/collapsed': float(found[-1])}) + '\n'
            )
    return found


def test_a_recovery_is_said_too_also_after_a_resumption(tmp_path, caplog):
    caplog.set_level('INFO', logger='absl')
    watch = monitoring.CollapseWatch(str(tmp_path), 'pretrain')
    assert _write(tmp_path, {0: HEALTHY, 10: COLLAPSED, 20: COLLAPSED}, watch) == [False, True, True]
    resumed = monitoring.CollapseWatch(str(tmp_path), 'pretrain')
    almost = HEALTHY | {'projection_spread': 0.15}
    assert _write(tmp_path, {30: almost, 40: HEALTHY, 50: COLLAPSED}, resumed) == [True, False, True]
    assert monitoring.read_collapses(str(tmp_path), 'pretrain') == [
        {'step': 10, 'measure': 'projection_spread', 'value': 0.004, 'recovered_step': 40},
        {'step': 50, 'measure': 'projection_spread', 'value': 0.004, 'recovered_step': None},
    ]
    said = caplog.text
    assert said.count('has collapsed') == 2  # Once each, not again by the resumed run.
    assert 'Step 40: the network has recovered from the collapse of step 10' in said


@pytest.mark.parametrize(
    'field, value',
    [
        ('eval_every_epochs', -1.0),
        ('monitoring.health_every_steps', 0),
        ('monitoring.knn_bank_size', 0),
        ('monitoring.health_images', 1),
    ],
)
def test_values_that_make_no_sense_are_refused(field, value, tmp_path):
    outcome = run_launch(*tiny_digits(), f'--config.{field}={value}', f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert outcome.code == 1 and f'Error: config.{field}={value}: expected at least' in outcome.stderr
    assert not (tmp_path / 'run').exists()


def test_collapses_of_several_seeds_tell_their_seed():
    event = {'step': 3, 'measure': 'effective_rank', 'value': 1.0, 'recovered_step': None}
    summaries = [dict(seed=s, seconds=None, collapses=[event] * count) for s, count in ((4, 0), (5, 1), (6, 2))]
    merged = merge_seeds(summaries)
    assert merged['collapses'] == [{'seed': 5, **event}, {'seed': 6, **event}, {'seed': 6, **event}]


def test_no_copy_of_the_bank_lies_beside_the_training(monkeypatch):
    """It is taken when it is looked at; on a GPU it may be larger than everything else."""
    config = digits.get_config()
    config.monitoring.knn_bank_size = 8
    run = Run(config=config, workdir='', device=torch.device('cpu'), checkpoint=None, log_every_seconds=1.0)
    data = dataset.Dataset(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 10, tuple('0123456789'))
    taken = []
    monkeypatch.setattr(dataset.Dataset, 'take', lambda self, indices: taken.append(indices))
    monitoring.make_evaluation(run.config, None, data, data)
    assert not taken

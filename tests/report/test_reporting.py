"""What a run tells: the lines of `metrics.jsonl` and the tables."""

import pytest

from byol_func.errors import UserError
from byol_func.workdir.files import MetricsFile, read_records, write_json
from byol_func.workdir.summaries import accuracy_table, choice_in_words, mean_and_std
from runs import records


def _write(workdir, mode: str, first_step: int, steps) -> None:
    metrics = MetricsFile(workdir, mode, first_step)
    for step in steps:
        metrics.write(step, {'loss': step + 0.5, 'images_per_second': 100.0})
    metrics.close()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    _write(tmp_path, 'linear_eval', 0, range(2))
    _write(tmp_path, 'pretrain', 0, range(6))
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"mode": "pretrain", "st')  # Killed while it wrote.
    _write(tmp_path, 'pretrain', 4, range(4, 8))
    found = [(record['mode'], record['step']) for record in records(tmp_path)]
    assert found == [('linear_eval', 0), ('linear_eval', 1)] + [('pretrain', i) for i in range(8)]


def test_last_scalars_are_of_the_same_mode(tmp_path):
    _write(tmp_path, 'pretrain', 0, range(3))
    _write(tmp_path, 'linear_eval', 0, range(1))
    metrics = MetricsFile(tmp_path, 'pretrain', 3)
    assert metrics.last() == {'loss': 2.5}
    metrics.close()
    fresh = MetricsFile(tmp_path, 'fine_tune', 0)
    assert fresh.last() == {}
    fresh.close()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / 'file').write_text('')
    for write in (
        lambda: MetricsFile(tmp_path / 'file', 'pretrain', 0),
        lambda: write_json(tmp_path / 'file' / 'summary.json', {}),
    ):
        with pytest.raises(UserError, match='--workdir=.*file: cannot write'):
            write()


def test_half_a_line_is_passed_over(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    assert read_records(path) == []
    path.write_text('{"mode": "pretrain", "step": 1}\n{"mode": "x"}\n[1]\n7\n{"mode": "pretrain", "st')
    assert read_records(path) == [{'mode': 'pretrain', 'step': 1}]


def test_choices_in_words():
    chosen = {'learning_rate': 0.3, 'weight_decay': 0.0, 'held_out_top1': 0.5, 'sweep': [{}]}
    assert choice_in_words(chosen) == 'learning rate 0.3, weight decay 0 (top-1 50.0 %)'
    assert choice_in_words([{'k': 20, 'held_out_top1': 0.793}, {'k': 5, 'held_out_top1': 1.0}], [3, 4]) == (
        'seed 3: k = 20 (top-1 79.3 %); seed 4: k = 5 (top-1 100.0 %)'
    )


def test_mean_and_std():
    assert mean_and_std([0.5]) == {'mean': 0.5, 'std': 0.0, 'values': [0.5]}
    spread = mean_and_std([1.0, 2.0, 3.0])
    assert (spread['mean'], spread['std']) == (2.0, 1.0)  # The sample's: divided by n - 1.


def test_accuracy_table():
    table = accuracy_table('digits', {'untrained': [0.5, 0.6, 0.7], 'BYOL': [0.9, 0.9, 0.9]})
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ['digits', 'top-1', '%', 'std', 'each', 'seed']
    assert lines[2] == ['untrained', '60.00', '10.00', '50.00', '60.00', '70.00']
    assert lines[3] == ['BYOL', '90.00', '0.00', '90.00', '90.00', '90.00']
    assert 'std' not in accuracy_table('digits', {'BYOL': [0.9]})

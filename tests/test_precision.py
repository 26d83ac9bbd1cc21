"""bfloat16, the default on a GPU, in a short real training: the same curve, the same accuracy."""

import json

import pytest
from cli import config, succeed


def _train(folder, precision):
    """Six epochs on the digits: the losses of all logged steps, and the summary."""
    workdir = folder / precision
    argv = config(
        'digits.py', num_seeds=1, num_epochs=6, lr_schedule__warmup_epochs=1.0, precision=precision,
        linear_eval__compare_untrained=False)
    succeed(*argv, f'--workdir={workdir}', cwd=folder)
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['repr_loss'] for line in lines if line['mode'] == 'pretrain' and 'repr_loss' in line]
    return losses, json.loads((workdir / 'summary.pretrain.json').read_text())


def test_bfloat16_learns_what_float32_learns(tmp_path):
    (expected, full), (actual, half) = (_train(tmp_path, policy) for policy in ('float32', 'bfloat16'))
    assert actual != expected, 'bfloat16 has no effect'
    assert len(actual) == len(expected) > 10
    third = len(expected) // 3
    for part in (slice(0, third), slice(third, 2 * third), slice(2 * third, None)):
        means = [sum(losses[part]) / len(losses[part]) for losses in (actual, expected)]
        assert means[0] == pytest.approx(means[1], rel=0.1)
    # One seed of 360 test images; the accuracy of float32 itself spreads by a point over seeds.
    assert full['test/linear_top1'] > 0.75
    assert half['test/linear_top1'] == pytest.approx(full['test/linear_top1'], abs=0.04)

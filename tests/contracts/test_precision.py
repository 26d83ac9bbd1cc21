"""bfloat16, the default on a GPU, in a short real training: the same curve, the same accuracy."""

import json

import pytest
import torch

from byol_func import byol_experiment, eval_experiment
from byol_func.modes import inputs
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from cli import config, succeed
from configs import digits
from runs import records


def _train(folder, precision):
    """Three epochs on the digits: the losses of all logged steps, and the summary."""
    workdir = folder / precision
    argv = config(
        'digits.py',
        num_seeds=1,
        num_epochs=3,
        lr_schedule__warmup_epochs=1.0,
        log_every_steps=5,
        precision=precision,
        linear_eval__compare_untrained=False,
        linear_eval__compare_pixels=False,
        pictures=False,
        compile=False,
    )
    succeed(*argv, f'--workdir={workdir}', cwd=folder)
    lines = records(workdir)
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


def _look(precision):
    """Whatever looks at one pre-trained and one linear network, made for a training in that precision."""
    settings = digits.get_config()
    settings.precision, settings.batch_size, settings.linear_eval.batch_size = precision, 16, 16
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = dataset.Dataset(images, torch.arange(16) % 10, tuple('0123456789'))
    facts = inputs.facts(data)
    pretraining = byol_experiment.make(settings, **facts)
    state = pretraining.init()
    encoder = inputs.encoder_part(state.online_params), inputs.encoder_part(state.online_state)
    linear = eval_experiment.make(settings, 'linear_eval', *encoder, **facts)
    run = Run(config=settings, workdir='', device=torch.device('cpu'), checkpoint=None, log_every_seconds=1.0)
    batch = {'images': data.images, 'labels': data.labels}
    seen = {'embeddings': inputs.embed(run.config, data, *encoder).embeddings}
    for name, experiment in (('online', pretraining), ('linear', linear)):
        state = experiment.init()
        seen[f'{name} logits'] = experiment.predict(state, batch)
        seen[f'{name} loss'] = experiment.evaluate(state, batch)['eval_loss']
    return seen


def test_what_looks_at_a_network_is_float32_however_it_is_trained():
    expected, actual = _look('float32'), _look('bfloat16')
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float32 and torch.equal(actual[name], value), name

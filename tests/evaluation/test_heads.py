"""Sweeps over learning rates and weight decays: many heads in one pass, and the choice among them."""

import json
import math
import re

import optree
import pytest
import torch
from safetensors.torch import load_file

from byol_func import eval_experiment
from byol_func.evaluation.heads import grid, stack
from byol_func.runtime import compilation
from byol_func.utils import checkpointing, dataset, optimizers
from cli import run_launch, succeed, tiny_digits
from configs import digits

RATES, DECAYS = (0.02, 0.3, 2.0), (0.0, 0.05)


def _config(**overrides):
    config = digits.get_config()
    config.linear_eval.batch_size = 32
    config.linear_eval.num_epochs = 4
    config.update_from_flattened_dict({f'linear_eval.{k}': v for k, v in overrides.items()})
    return config


def _features(num: int = 160, size: int = 12) -> dataset.Features:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 4
    centres = torch.randn(4, size, generator=rng)
    return dataset.Features(centres[labels] + torch.randn(num, size, generator=rng), labels, tuple('abcd'))


def _train(experiment, data):
    state = experiment.init()
    for step in range(experiment.max_steps):
        inputs = dataset.train_batch(data, step, seed=0, batch_size=experiment.batch_size)
        state, logs = experiment.update(state, torch.tensor(step), experiment.sample(step), inputs)
    return state, logs


def _make(config, data):
    facts = dict(num_examples=data.num_examples, num_classes=4, image_shape=data.image_shape)
    return eval_experiment.make(config, 'linear_eval', {}, {}, **facts)


def _heads(data, pairs, **overrides):
    config = _config(**{'lr_schedule.base_learning_rate': 1.0, **overrides})
    settings = config.linear_eval.optimizer_config.sgd
    return stack(
        _make(config, data),
        pairs,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        decays=optimizers.FILTERS[settings.weight_decay_filter],
    )


@pytest.mark.parametrize('schedule', ['cosine', 'constant'])
@pytest.mark.parametrize('decay_filter', ['exclude_bias_and_norm', 'none'])
def test_every_head_is_trained_as_if_it_were_alone(schedule, decay_filter):
    data, pairs = _features(), grid(RATES, DECAYS)
    common = {'lr_schedule.name': schedule, 'optimizer_config.sgd.weight_decay_filter': decay_filter}
    heads = _heads(data, pairs, **common)
    together, _ = _train(heads, data)
    batch = data.batch(torch.arange(data.num_examples))
    logits, hits = heads.predict(together, batch), heads.evaluate(together, batch)['top1_accuracy']
    assert logits.shape == (160, 6, 4) and hits.shape == (160, 6)
    for i, (rate, decay) in enumerate(pairs):
        alone = _make(
            _config(**common, **{'lr_schedule.base_learning_rate': rate, 'optimizer_config.sgd.weight_decay': decay}),
            data,
        )
        state, _ = _train(alone, data)
        torch.testing.assert_close(logits[:, i], alone.predict(state, batch), rtol=1e-4, atol=1e-4)
        assert torch.equal(hits[:, i], alone.evaluate(state, batch)['top1_accuracy'])
    assert len({round(float(x), 4) for x in logits[0, :, 0]}) == 6


def test_gradients_are_those_of_vmap_over_a_stacked_tree():
    """A step from random heads, with momentum that is still zero: the update shows the gradient."""
    data, pairs = _features(), [(1.0, 0.0)] * 3
    heads = _heads(data, pairs, **{'lr_schedule.name': 'constant', 'optimizer_config.sgd.momentum': 0.0})
    rng = torch.Generator().manual_seed(1)
    w, b = torch.randn(3, 12, 4, generator=rng), torch.randn(3, 4, generator=rng)
    flat = {'classifier': {'w': w.permute(1, 2, 0).reshape(12, 12), 'b': b.T.reshape(12)}}
    batch = data.batch(torch.arange(data.num_examples))
    state = heads.init()._replace(classif_params=flat)
    new, _ = heads.update(state, torch.tensor(0), None, batch)

    loss = lambda w, b: torch.nn.functional.cross_entropy(data.embeddings @ w + b, data.labels)
    grad_w, grad_b = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(w, b)
    found = new.classif_params['classifier']
    expected = (w - grad_w).permute(1, 2, 0).reshape(12, 12)
    torch.testing.assert_close(found['w'], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found['b'], (b - grad_b).T.reshape(12), rtol=1e-5, atol=1e-6)


def test_compiled_heads_are_the_plain_ones():
    data, pairs = _features(), grid(RATES, DECAYS)
    heads = _heads(data, pairs)
    compiled = heads._replace(update=compilation.compile_update(heads.update, backend='aot_eager'))
    (state, logs), (expected, expected_logs) = _train(compiled, data), _train(heads, data)
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(logs, expected_logs)


def test_a_head_that_diverges_leaves_the_others_alone():
    data = _features()
    data = data._replace(embeddings=data.embeddings * 1e18)
    state, logs = _train(_heads(data, [(1e-37, 0.0), (1e30, 0.0)]), data)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(state.classif_params))
    assert math.isfinite(logs['train_loss'])
    alone, _ = _train(_heads(data, [(1e-37, 0.0)]), data)
    w, w_alone = (s.classif_params['classifier']['w'] for s in (state, alone))
    torch.testing.assert_close(w[:, ::2], w_alone)


# From the command line.


def _encoder(path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of an encoder: part is 'online' or 'backbone'."""
    names = {f'{part}_{tree}/encoder/': f'{tree}/' for tree in ('params', 'state')}
    return {
        new + name.removeprefix(old): value
        for name, value in load_file(path).items()
        for old, new in names.items()
        if name.startswith(old)
    }


def _equal_tensors(before: dict, after: dict) -> list[bool]:
    assert before.keys() == after.keys() and len(before) > 40
    return [torch.equal(before[name], after[name]) for name in before if name.startswith('state/')] + [
        torch.equal(before[name], after[name]) for name in before if name.startswith('params/')
    ]


FAST = tiny_digits(
    batch_size=256,
    num_epochs=2,
    linear_eval__compare_untrained=False,
    linear_eval__num_epochs=5,
    fine_tune__batch_size=64,
    fine_tune__num_epochs=15,
    fine_tune__label_fraction=0.1,
)
# Given twice on the command line, a tuple grows.
SWEEP = [
    '--config.linear_eval.sweep.learning_rates=(0.0001, 0.2, 1.0)',
    '--config.linear_eval.sweep.weight_decays=(0.0, 1.0)',
]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A pre-training on the digits."""
    path = tmp_path_factory.mktemp('run')
    succeed(*FAST, f'--workdir={path}', cwd=path)
    return path


def _summary(workdir, mode):
    return json.loads((workdir / f'summary.{mode}.json').read_text())


@pytest.mark.parametrize('cached', [True, False])
def test_linear_evaluation_chooses_and_trains_again(workdir, cached, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    argv = ['--mode=linear_eval', f'--config.linear_eval.cache_features={cached}']
    argv += [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}']
    outcome = succeed(*FAST, *SWEEP, *argv, cwd=tmp_path)
    summary = _summary(tmp_path, 'linear_eval')
    chosen = summary['chosen']
    assert [(row['learning_rate'], row['weight_decay']) for row in chosen['sweep']] == [
        (0.0001, 0.0),
        (0.2, 0.0),
        (1.0, 0.0),
        (0.0001, 1.0),
        (0.2, 1.0),
        (1.0, 1.0),
    ]
    assert chosen['held_out_top1'] == max(row['held_out_top1'] for row in chosen['sweep'])
    assert chosen['learning_rate'] in (0.2, 1.0)
    assert 'are the best of 6 pairs on 14' in outcome.stderr
    # The same numbers as with the chosen pair from the start.
    pair = [
        f'--config.linear_eval.lr_schedule.base_learning_rate={chosen["learning_rate"]}',
        f'--config.linear_eval.optimizer_config.sgd.weight_decay={chosen["weight_decay"]}',
        f'--workdir={tmp_path}/alone',
    ]
    succeed(*FAST, *argv, *pair, cwd=tmp_path)
    alone = _summary(tmp_path / 'alone', 'linear_eval')
    assert {n: v for n, v in alone.items() if '/' in n} == {n: v for n, v in summary.items() if '/' in n}
    # Images in training mode would have moved the averages: not a bit has changed.
    before = _encoder(checkpoint, 'online')
    for mode in ('linear_eval', 'linear_eval_sweep'):
        (path,) = tmp_path.glob(f'checkpoints/{mode}_0*')
        assert all(_equal_tensors(before, _encoder(path, 'backbone')))
    # Started again it finds everything done.
    succeed(*FAST, *SWEEP, *argv, cwd=tmp_path)
    assert _summary(tmp_path, 'linear_eval')['chosen'] == chosen


def test_fine_tuning_on_a_tenth_of_the_labels(workdir):
    rates = '--config.fine_tune.sweep.learning_rates=(0.0, 0.2)'
    outcome = succeed(*FAST, rates, '--mode=fine_tune', f'--workdir={workdir}', cwd=workdir)
    summary = _summary(workdir, 'fine_tune')
    assert summary['chosen']['learning_rate'] == 0.2  # A rate of 0 leaves the classifier as it was drawn.
    assert len(summary['chosen']['sweep']) == 2
    images = int(re.search(r'fine_tune: (14\d) images, 10 classes of 1[345]', outcome.stderr)[1])
    assert summary['epochs'] == summary['steps'] * 64 / images
    (before,), (after,) = (workdir.glob(f'checkpoints/{name}_0*') for name in ('pretrain', 'fine_tune'))
    assert not any(_equal_tensors(_encoder(before, 'online'), _encoder(after, 'backbone'))[:10])


def test_a_rate_that_diverges_is_left_out(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    argv = [*FAST, '--mode=fine_tune', f'--checkpoint={checkpoint}', '--config.fine_tune.num_epochs=2']
    rates = '--config.fine_tune.sweep.learning_rates'
    outcome = succeed(*argv, f'{rates}=(1e36, 0.2)', f'--workdir={tmp_path}/one', cwd=tmp_path)
    chosen = _summary(tmp_path / 'one', 'fine_tune')['chosen']
    assert chosen['learning_rate'] == 0.2
    assert [row['held_out_top1'] for row in chosen['sweep']] == [None, chosen['held_out_top1']]
    assert re.search(
        r'fine_tune_sweep_0: learning rate 1e\+36 and weight decay 0 are left out: .* step \d+', outcome.stderr
    )
    assert 'replay' not in outcome.stderr and not (tmp_path / 'one/diverged').exists()
    outcome = run_launch(*argv, f'{rates}=(1e36, 1e37)', f'--workdir={tmp_path}/all', cwd=tmp_path)
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and 'config.fine_tune.sweep.learning_rates=(1e+36, 1e+37): all of them give' in error
    # Heads that are trained together say the same field.
    argv = [*FAST, '--mode=linear_eval', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/heads']
    outcome = run_launch(*argv, '--config.linear_eval.sweep.learning_rates=(3e38, 2e38)', cwd=tmp_path)
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and 'try smaller config.linear_eval.sweep.learning_rates' in error
    assert 'replay' not in error


def test_weight_decays_alone_are_swept_at_the_rate_of_the_protocol(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    at = [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}']
    for mode in ('linear_eval', 'fine_tune'):
        flags = [f'--config.{mode}.sweep.weight_decays=(0.0, 0.5)', f'--config.{mode}.num_epochs=2']
        flags += [f'--config.{mode}.lr_schedule.base_learning_rate=0.125']
        succeed(*FAST, *flags, f'--mode={mode}', *at, cwd=tmp_path)
        rows = _summary(tmp_path, mode)['chosen']['sweep']
        assert [(row['learning_rate'], row['weight_decay']) for row in rows] == [(0.125, 0.0), (0.125, 0.5)]


def test_another_choice_does_not_go_on_with_the_training_of_the_first(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    argv = [*FAST, '--mode=linear_eval', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}']
    succeed(*argv, *SWEEP, cwd=tmp_path)
    for path in tmp_path.glob('checkpoints/linear_eval_0*'):
        loaded = checkpointing.load(path)
        rate, decay = loaded.config['chosen']
        config = loaded.config | {'chosen': [rate / 2, decay]}
        checkpointing.save(path.parent, dict(loaded.tensors), mode=loaded.mode, step=loaded.step, config=config)
    outcome = run_launch(*argv, *SWEEP, cwd=tmp_path)
    assert outcome.code == 1 and 'of another learning rate or weight decay, which a sweep chose' in outcome.stderr


def test_fine_tuning_of_a_frozen_encoder_moves_no_average(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    flags = ['fine_tune.freeze_backbone=True', 'fine_tune.num_epochs=3']
    argv = [f'--config.{flag}' for flag in flags] + [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}']
    succeed(*FAST, '--mode=fine_tune', *argv, cwd=tmp_path)
    (after,) = tmp_path.glob('checkpoints/fine_tune_0*')
    assert all(_equal_tensors(_encoder(checkpoint, 'online'), _encoder(after, 'backbone')))


def test_refusals(workdir):
    argv = [*FAST, '--mode=linear_eval', f'--workdir={workdir}']
    for flag, words in {
        'linear_eval.optimizer=adam --config.linear_eval.sweep.learning_rates=(1.0,)': (
            "config.linear_eval.optimizer='adam': expected sgd"
        ),
        'linear_eval.sweep.learning_rates=(-1.0,)': 'config.linear_eval.sweep.learning_rates=(-1.0,): expected',
        "linear_eval.sweep.learning_rates=('a',)": "config.linear_eval.sweep.learning_rates=('a',): expected",
        'linear_eval.label_fraction=0.0': 'config.linear_eval.label_fraction=0.0: expected',
        'linear_eval.label_fraction=0.005 --config.linear_eval.batch_size=4 '
        '--config.linear_eval.sweep.learning_rates=(1.0,)': 'config.linear_eval.label_fraction=0.005: the class',
        'dataset.val_fraction=1.0': 'config.dataset.val_fraction=1.0: expected',
    }.items():
        outcome = run_launch(*argv, *f'--config.{flag}'.split(), cwd=workdir)
        assert outcome.code == 1 and words in outcome.stderr.splitlines()[-1], outcome.stderr

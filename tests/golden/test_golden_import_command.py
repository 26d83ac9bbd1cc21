"""The commands that convert official checkpoints, from an official file to an official file."""

import json

import numpy as np
import optree
import PIL.Image
import pytest
import torch
from test_golden_official_checkpoint import _CLASSES, _TRUE, PATH, _imported, _network

from byol_func.bridge.official import write
from byol_func.utils import checkpointing
from cli import run_launch, succeed, tiny_digits
from golden_networks import golden_network_fields


def test_import_pretrain_evaluate_and_export(tmp_path):
    """The commands of the README, from an official file to an official file."""
    images_per_class, batch_size = 16, 32
    _write_colour_images(tmp_path / 'images', images_per_class)
    num_epochs = 2 + (_TRUE.step + 1) * batch_size // (images_per_class * _CLASSES)  # Beyond the checkpoint.
    last = num_epochs * images_per_class * _CLASSES // batch_size - 1
    data = dict(
        dataset__name='folder',
        dataset__root='images',
        batch_size=batch_size,
        num_epochs=num_epochs,
        linear_eval__batch_size=32,
    )
    flags = [*tiny_digits(**golden_network_fields(_TRUE.network), **data), '--workdir=run']
    refused = run_launch(*tiny_digits(), '--workdir=run', '--mode=import', f'--checkpoint={PATH}', cwd=tmp_path)
    assert (
        refused.code == 1
        and f'--config.network.projector_hidden_size={_TRUE.network["projector_hidden_size"]}' in refused.stderr
    )
    assert not (tmp_path / 'run' / 'checkpoints').exists()
    out = succeed(*flags, '--mode=import', f'--checkpoint={PATH}', cwd=tmp_path).stdout
    saved = f'TinyResNet of width 1, saved at the official step {_TRUE.step} (the first is 0), with a classifier of'
    assert f'{saved} {_CLASSES} classes' in out
    of_seeds = [*flags[:-1], '--workdir=seeds', '--config.num_seeds=2', '--mode=import', f'--checkpoint={PATH}']
    assert 'Continue with --workdir=seeds --config.num_seeds=1 and' in succeed(*of_seeds, cwd=tmp_path).stdout
    twice = run_launch(*flags, '--mode=import', f'--checkpoint={PATH}', cwd=tmp_path)
    assert twice.code == 1 and f'already holds pretrain_{_TRUE.step:08d}.safetensors' in twice.stderr

    exported = ['--mode=export', '--output=out.pkl']
    succeed(*flags, *exported, cwd=tmp_path)
    first, second = _imported(tmp_path / 'out.pkl')[0], _imported(PATH)[0]
    assert all(map(torch.equal, optree.tree_leaves(first), optree.tree_leaves(second)))
    again = run_launch(*flags, *exported, cwd=tmp_path)
    assert again.code == 1 and '--output=out.pkl: already exists' in again.stderr

    succeed(*flags, '--mode=linear_eval', cwd=tmp_path)
    succeed(*flags, cwd=tmp_path)
    steps = [step for step, _ in checkpointing.list_checkpoints(tmp_path / 'run/checkpoints', 'pretrain')]
    assert steps == [_TRUE.step, last]

    # The official loop saves once more behind its last step; there is nothing left to do.
    state, official = _imported(PATH)
    write(tmp_path / 'final.pkl', state, step=last + 1, network=_network(official))
    flags = [flag.replace('--workdir=run', '--workdir=final') for flag in flags]
    succeed(*flags, '--mode=import', '--checkpoint=final.pkl', cwd=tmp_path)
    succeed(*flags, cwd=tmp_path)
    assert json.loads((tmp_path / 'final/summary.json').read_text())['steps'] == last + 1
    saved = checkpointing.list_checkpoints(tmp_path / 'final/checkpoints', 'pretrain')
    assert [step for step, _ in saved] == [last + 1]


def _write_colour_images(folder, images_per_class):
    """As many classes as the true checkpoint has."""
    rng = np.random.default_rng(0)
    for split, count in (('train', images_per_class), ('test', 2)):
        for i in range(_CLASSES * count):
            path = folder / split / str(i % _CLASSES) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--mode=import'], '--checkpoint: required by --mode=import'),
        (
            ['--mode=import', '--checkpoint=gone.pkl', '--config.optimizer=adam'],
            '--checkpoint=gone.pkl: No such file or directory',
        ),
        (
            ['--mode=import', f'--checkpoint={PATH}', '--config.optimizer=adam'],
            "config.optimizer='adam': expected one of lars",
        ),
        (['--mode=export'], '--output: required by --mode=export'),
        (
            ['--mode=export', '--output=x', '--format=keras'],
            "--format='keras': expected one of official, encoder, module",
        ),
        (['--mode=export', '--output=x'], 'no checkpoint of pretrain'),
    ],
)
def test_mistakes_on_the_command_line(flags, message, tmp_path):
    outcome = run_launch(*tiny_digits(), '--workdir=run', *flags, cwd=tmp_path)
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith('Error: ') and message in outcome.stderr
    assert not list(tmp_path.glob('*.pkl'))

"""Checkpoints that do not fit a run, or are none: one line that says so."""

import pathlib

import pytest
import safetensors.torch
import torch

from byol_func.utils import checkpointing
from cli import assert_refused, run_launch, succeed, tiny_digits


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory) -> pathlib.Path:
    """The checkpoint of a run of two steps."""
    workdir = tmp_path_factory.mktemp('pretrained')
    succeed(*tiny_digits(batch_size=512), f'--workdir={workdir}', cwd=workdir)
    (path,) = workdir.glob('checkpoints/*')
    return path


@pytest.mark.parametrize(
    'mode, overrides',
    [
        ('linear_eval', dict(network__encoder_config__width_multiplier=2.0)),
        ('fine_tune', dict(network__encoder_config__resnet_v2=True)),
        ('eval', dict(network__encoder_config__width_multiplier=2.0)),
        ('pretrain', dict(optimizer='adam')),
    ],
    ids=['width', 'version', 'width, eval', 'optimizer'],
)
def test_checkpoint_of_another_config(pretrained, mode, overrides, tmp_path):
    argv = [*tiny_digits(batch_size=512, **overrides), f'--mode={mode}']
    if mode == 'pretrain':  # Which goes on in its own workdir.
        outcome = run_launch(*argv, f'--workdir={pretrained.parent.parent}', cwd=tmp_path)
        return assert_refused(outcome, 'config.optimizer')
    argv += [f'--checkpoint={pretrained}', f'--workdir={tmp_path}/run']
    assert_refused(run_launch(*argv, cwd=tmp_path), f'--checkpoint={pretrained}', 'config.network')


def test_checkpoint_of_another_mode(tmp_path):
    path = checkpointing.save(tmp_path, {'w': torch.zeros(1)}, mode='linear_eval', step=0, config={})
    argv = [*tiny_digits(), '--mode=fine_tune', f'--checkpoint={path}']
    outcome = run_launch(*argv, f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert_refused(outcome, f'--checkpoint={path}', '--mode=linear_eval', 'expected one of pretrain')


def test_no_checkpoint_file(pretrained, tmp_path):
    tensors = safetensors.torch.save({'w': torch.zeros(1)})
    contents = dict(text=b'no checkpoint', empty=b'', short=pretrained.read_bytes()[:-100], plain=tensors)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        argv = [*tiny_digits(), '--mode=eval', f'--checkpoint={name}', '--workdir=run']
        outcome = run_launch(*argv, cwd=tmp_path)
        assert_refused(outcome, f'--checkpoint={name}', 'checkpoint of')
    assert_refused(
        run_launch(*tiny_digits(), '--mode=eval', '--checkpoint=.', '--workdir=run', cwd=tmp_path), '--checkpoint=.'
    )

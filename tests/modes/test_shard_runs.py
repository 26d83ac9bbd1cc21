"""Runs on tar shards are the runs on the folder they were made from, to the last bit."""

import numpy as np
import pytest
import safetensors.torch
import torch

from cli import assert_refused, config, run_launch, srun, succeed
from image_folders import flags, lines_of, make_folder

COMMON = dict(dataset__source_size=20, final_linear_eval=False, checkpointing__save_every_steps=1)
COMMON |= dict(checkpointing__keep=10, network__bn_config__cross_replica=True)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('images'), lambda rng: rng.integers(20, 40, 2))


@pytest.fixture(scope='module')
def shards(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    argv = config('folder.py', dataset__root=root)
    outcome = succeed(*argv, '--mode=shards', '--output=SHARDS', '--images_per_shard=5', cwd=folder)
    first, second, last = outcome.stdout.splitlines()
    assert first == 'train: 12 images in 3 shards, SHARDS/train-000000.tar to SHARDS/train-000002.tar'
    assert second == 'test: 6 images in 2 shards, SHARDS/test-000000.tar to SHARDS/test-000001.tar'
    assert last == 'Train on them with --config=configs/shards.py --config.dataset.root=SHARDS'
    assert [path.name for path in folder.iterdir()] == ['SHARDS']
    return folder / 'SHARDS'


def on(root, **fields):
    name = 'shards' if root.name == 'SHARDS' else 'folder'
    return flags(root, dataset__name=name, **COMMON | fields)


def test_a_run_on_shards_is_the_run_on_the_folder_and_resumes(root, shards, tmp_path):
    succeed(*on(root, dataset__max_gib=1.0), '--workdir=folder', cwd=tmp_path)
    succeed(*on(shards), '--workdir=shards', cwd=tmp_path)
    expected = lines_of(tmp_path / 'folder')
    assert lines_of(tmp_path / 'shards') == expected and len(expected) == 6
    last = tmp_path / 'shards/checkpoints/pretrain_00000005.safetensors'
    weights = safetensors.torch.load_file(last)
    for path in (tmp_path / 'shards/checkpoints').glob('*_0000000[45]*'):
        path.unlink()
    moved = tmp_path / 'moved' / 'SHARDS'  # Somewhere else, and with another number of workers.
    moved.mkdir(parents=True)
    for path in shards.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    outcome = succeed(*on(moved, dataset__num_workers=1), '--workdir=shards', cwd=tmp_path)
    assert 'images have changed' not in outcome.stderr and lines_of(tmp_path / 'shards')[-2:] == expected[-2:]
    resumed = safetensors.torch.load_file(last)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    succeed('--workdir=shards', '--mode=embed', '--split=test', cwd=tmp_path)
    paths = np.load(tmp_path / 'shards/embeddings.test.npz')['path'].tolist()
    assert [path.split('.tar/')[1] for path in paths] == [f'{name}/{i}.jpg' for name in 'ab' for i in range(3)]


def test_two_replicas_share_shards_as_they_share_a_folder(root, shards, tmp_path):
    for where, workdir in ((root, 'folder'), (shards, 'shards')):
        for replica in srun(*on(where, num_epochs=1), f'--workdir={workdir}', cwd=tmp_path):
            outcome = replica.wait()
            assert outcome.code == 0, outcome.stderr
    assert lines_of(tmp_path / 'shards') == lines_of(tmp_path / 'folder') != []


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], '--mode=shards: expected --output=FOLDER'),
        (['--output=x', '--images_per_shard=0'], '--images_per_shard=0: expected at least 1'),
        (['--output=/dev/null/x'], '/dev/null is a file; expected a folder there, or another name'),
        ([f'--output={__file__}'], 'is a file; expected a folder, or a new name'),
        (['--output=x', '--config.dataset.name=digits'], "config.dataset.name='digits': expected one of folder"),
    ],
)
def test_what_is_refused(root, argv, words, tmp_path):
    outcome = run_launch(*config('folder.py', dataset__root=root), '--mode=shards', *argv, cwd=tmp_path)
    assert_refused(outcome, words)
    assert not list(tmp_path.iterdir())

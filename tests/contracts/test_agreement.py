"""A continuation is that of the same run: on the same images, and by replicas that start from the same state."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types
import unicodedata

import pytest
import safetensors.torch
import torch
from PIL import Image

from byol_func.data import fingerprint
from byol_func.errors import UserError
from byol_func.modes import checkpoints
from byol_func.utils import checkpointing
from cli import ROOT, TINY_RUN, config, run_launch, srun, succeed, tiny_digits

_EPOCH = 1442 // 128  # steps
_LAST = 2 * 1442 // 128 - 1


def _agents(tmp_path: pathlib.Path, *commands: list[str]) -> list[tuple[int, str]]:
    """Status and messages of one torchrun agent per command, as on machines of their own."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    processes = []
    for rank, command in enumerate(commands):
        launcher = ['-m', 'torch.distributed.run', '--nnodes=2', f'--node-rank={rank}', '--nproc-per-node=1']
        launcher += ['--master-addr=127.0.0.1', f'--master-port={port}']
        argv = [sys.executable, *launcher, str(ROOT / 'launch.py'), *command, '--device=cpu']
        processes.append(
            subprocess.Popen(
                argv, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    messages = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, messages, strict=True)]


@pytest.fixture(scope='module')
def first_part(tmp_path_factory) -> pathlib.Path:
    """Some steps of a run, saved at the end of its first epoch and stopped there by a kill of its clock."""
    workdir = tmp_path_factory.mktemp('first')
    run = tiny_digits(num_epochs=2, checkpointing__save_every_steps=_EPOCH, checkpointing__keep=2)
    succeed(*run, f'--workdir={workdir}/run', cwd=workdir)
    last = workdir / f'run/checkpoints/pretrain_{_LAST:08d}.safetensors'
    last.rename(workdir / 'last.safetensors')
    return workdir


_TWO_EPOCHS = tiny_digits(num_epochs=2)


def test_replicas_without_a_checkpoint_get_the_state_of_the_first(first_part, tmp_path):
    shutil.copytree(first_part / 'run', tmp_path / 'here')
    outcomes = _agents(tmp_path, [*_TWO_EPOCHS, '--workdir=here'], [*_TWO_EPOCHS, '--workdir=elsewhere'])
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    expected = safetensors.torch.load_file(first_part / 'last.safetensors')
    (path,) = tmp_path.glob(f'here/checkpoints/pretrain_{_LAST:08d}.safetensors')
    actual = safetensors.torch.load_file(path)
    for name, value in expected.items():
        if value.is_floating_point() and name.startswith('online_params'):
            error = (actual[name] - value).norm().item()
            assert error <= 5e-2 * max(value.norm().item(), 1e-2), name


def test_replicas_at_other_steps_are_refused_by_all(first_part, tmp_path):
    shutil.copytree(first_part / 'run', tmp_path / 'here')
    for replica in srun(*_TWO_EPOCHS, '--workdir=elsewhere', cwd=tmp_path, second=['--workdir=here']):
        code, _, text = replica.wait()
        assert code == 1
        errors = [line for line in text.splitlines() if line.startswith('Error: ')]
        assert errors == [
            f'Error: replica 1 resumes after {_EPOCH} steps, but replica 0 finds no checkpoint: the replicas see '
            'different disks; give all of them the --workdir of one run, or all but the first an empty one'
        ], text


def test_replicas_with_other_configs_are_refused_by_all(tmp_path):
    second = ['--config.random_seed=5', '--workdir=b']
    for replica in srun(*_TWO_EPOCHS, '--config.preview.num_images=2', '--workdir=a', cwd=tmp_path, second=second):
        code, _, text = replica.wait()
        assert code == 1 and 'Error: replica 1: config differs from that of replica 0; start all replicas' in text
    assert not list(tmp_path.iterdir())  # A refused run leaves nothing behind.


@pytest.mark.parametrize(
    'second, what',
    [(['--workdir=elsewhere'], 'checkpoint'), (['--config.dataset.fraction=0.5'], 'training set')],
)
def test_replicas_that_would_evaluate_different_things_are_refused_by_all(second, what, first_part, tmp_path):
    """Each embeds a part of the images: those of two encoders, or of two sets, must not be mixed."""
    for name in ('here', 'elsewhere'):
        shutil.copytree(first_part / 'run', tmp_path / name)
    shutil.copy(first_part / 'last.safetensors', tmp_path / f'elsewhere/checkpoints/pretrain_{_LAST:08d}.safetensors')
    for replica in srun(*_TWO_EPOCHS, '--mode=knn', '--workdir=here', cwd=tmp_path, second=second):
        outcome = replica.wait()
        assert outcome.code == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
        assert f'Error: replica 1: {what} differs from that of replica 0; start all replicas' in outcome.stderr


def _folder(root: pathlib.Path, classes: str, images: int) -> None:
    for split, count in (('train', images), ('test', 4)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new('RGB', (8, 8), (i, 9, 30)).save(root / split / name / f'{i:03d}.png')


def _folder_run(root: pathlib.Path, **overrides) -> list[str]:
    sizes = dict(image_size=8, batch_size=16, dataset__root=root, dataset__source_size=8)
    return config('folder.py', **{**TINY_RUN, **sizes, 'linear_eval__batch_size': 16, **overrides})


def _more(root: pathlib.Path) -> None:
    _folder(root, 'ab', 30)


def _fewer(root: pathlib.Path) -> None:
    for path in root.glob('train/b/01*.png'):
        path.unlink()


def _renamed(root: pathlib.Path) -> None:
    for split in ('train', 'test'):
        (root / split / 'b').rename(root / split / 'c')


def _other_names(root: pathlib.Path) -> None:
    (root / 'train/a/000.png').rename(root / 'train/a/0000.png')


@pytest.mark.parametrize(
    'change, message',
    [
        (_more, 'a run on 40 images, not 60'),
        (_fewer, 'a run on 40 images, not 30'),
        (_renamed, 'a run on classes named b, not c'),
        (_other_names, 'a run on images with other names, sizes or labels'),
    ],
)
def test_other_images_are_refused_unless_the_user_insists(change, message, tmp_path):
    _folder(tmp_path / 'images', 'ab', 20)
    run = [*_folder_run(tmp_path / 'images'), '--workdir=run']
    succeed(*run, cwd=tmp_path)
    (tmp_path / 'images').rename(tmp_path / 'moved')
    moved = [*_folder_run(tmp_path / 'moved'), '--workdir=run']
    succeed(*moved, cwd=tmp_path)
    change(tmp_path / 'moved')
    outcome = run_launch(*moved, cwd=tmp_path)
    assert outcome.code == 1
    assert f'Error: --workdir=run: holds {message}; resume with' in outcome.stderr
    if change is _other_names:
        succeed(*moved, '--resume=anyway', cwd=tmp_path)


def test_a_fingerprint_of_arrays_tells_labels_apart():
    class Arrays:
        files = part = None
        class_names = ('a', 'b')

        def __init__(self, labels):
            self.labels, self.num_examples = torch.tensor(labels), len(labels)

    one, other = (fingerprint.fingerprint(Arrays(labels)) for labels in ([0, 1, 1], [1, 0, 1]))
    assert fingerprint.difference(one, dict(one)) == '' and fingerprint.difference({}, one) == ''
    assert fingerprint.difference(one, other) == 'images with other names, sizes or labels'


def test_names_in_another_unicode_form_are_the_same_classes(tmp_path):
    """A folder that comes from a Mac, and a checkpoint from before or after the move."""
    composed, decomposed = (unicodedata.normalize(form, 'Vögel') for form in ('NFC', 'NFD'))
    tensors = {'online_params/classifier/b': torch.zeros(2)}
    checkpoint = checkpointing.Checkpoint('x', 'pretrain', 0, {}, tensors, class_names=(composed, 'b'))
    for name, refused in ((composed, False), (decomposed, False), ('Vogel', True)):
        data = types.SimpleNamespace(num_classes=2, class_names=(name, 'b'))
        with pytest.raises(UserError, match='class 0 is') if refused else contextlib.nullcontext():
            checkpoints.check_classes(checkpoint, data)
    one, other = (dict(num_examples=4, class_names=[name], digest=name) for name in (composed, decomposed))
    assert fingerprint.difference(one, other) == 'images with other names, sizes or labels'

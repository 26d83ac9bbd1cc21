"""What the workers of a stream need of the system: shared memory and open files."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from byol_func.evaluation import features
from byol_func.utils import dataset
from byol_func.utils.networks import Network
from image_folders import load, make_folder

_HELPERS = pathlib.Path(__file__).resolve().parents[1] / 'helpers'
_READ_ALL = """
import sys
sys.path[:0] = sys.argv[2:]
from image_folders import load
from byol_func.utils import dataset
stream = load(sys.argv[1], source_size=96, max_gib=0.0, num_workers=2)
print(sum(batch['images'].float().mean().item() for batch in dataset.eval_batches(stream, 4)))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('images'), lambda rng: (30, 40), num_train=60)


def _with_shared_memory(folder, options):
    """Reads the folder where /dev/shm is mounted with these options; the mount is seen by that process alone."""
    if not shutil.which('unshare') or subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode:
        pytest.skip('needs the right to mount')
    command = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    argv = [sys.executable, '-c', _READ_ALL, folder, _HELPERS, _HELPERS.parents[1]]
    return subprocess.run(
        ['unshare', '-m', 'sh', '-c', command, 'sh', *map(str, argv)], capture_output=True, text=True, timeout=240
    )


def test_little_shared_memory_is_no_obstacle(folder):
    expected = sum(
        batch['images'].float().mean().item() for batch in dataset.eval_batches(load(folder, source_size=96), 4)
    )
    outcome = _with_shared_memory(folder, 'size=256k')
    assert outcome.returncode == 0 and float(outcome.stdout) == pytest.approx(expected), outcome.stderr
    assert outcome.stderr.count('/dev/shm') == 1 and 'config.dataset.num_workers' in outcome.stderr


def test_no_shared_memory_is_one_line(folder):
    outcome = _with_shared_memory(folder, 'ro')
    assert outcome.returncode == 1
    assert 'UserError: config.dataset.num_workers=2: workers need /dev/shm' in outcome.stderr.splitlines()[-1]


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts open files by /proc')
def test_a_long_evaluation_keeps_no_files_open(folder):
    stream = load(folder, source_size=8, max_gib=0.0, num_workers=1)
    opened = []

    def preprocess(batch):
        opened.append(len(os.listdir('/proc/self/fd')))
        return batch['images'].float().flatten(1)

    network = Network(None, lambda params, state, inputs, is_training: (inputs, state), 192)
    found = features.extract(network, {}, {}, stream, preprocess=preprocess, batch_size=2)
    assert len(opened) == 60 and max(opened[10:]) <= max(opened[:10]) + 4
    expected = load(folder, source_size=8)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.embeddings, expected.images.float().flatten(1))


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts open files by /proc')
def test_labels_that_a_training_keeps_hold_no_files_open(folder):
    stream = load(folder, source_size=8, max_gib=0.0, num_workers=1)
    opened, kept = [], []
    for batch in dataset.train_batches(stream, range(60), seed=0, batch_size=2):
        opened.append(len(os.listdir('/proc/self/fd')))
        kept.append(batch['labels'])
    assert max(opened[10:]) <= max(opened[:10]) + 4
    expected = [dataset.train_batch(load(folder, source_size=8), step, seed=0, batch_size=2) for step in range(60)]
    assert torch.equal(torch.cat(kept), torch.cat([batch['labels'] for batch in expected]))

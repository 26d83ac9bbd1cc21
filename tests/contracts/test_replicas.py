"""Two real processes share a batch and give the numbers of one."""

import pathlib
import subprocess
import sys

import safetensors.torch
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARGUMENTS = [
    '--config=configs/digits.py',
    '--config.num_seeds=1',
    '--config.num_epochs=1',
    '--config.batch_size=718',
    '--config.network.encoder_class=TinyResNet',
    '--config.network.encoder_config.width_multiplier=1.0',
    '--config.network.projector_hidden_size=32',
    '--config.network.predictor_hidden_size=32',
    '--config.lr_schedule.warmup_epochs=0',
    '--config.linear_eval.num_epochs=1',
    '--device=cpu',
    # Adam would make whole steps of the rounding in gradients of 0.
    '--config.optimizer=sgd',
    '--config.lr_schedule.base_learning_rate=0.1',
]


def _train(workdir: pathlib.Path, *launcher: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, *launcher, 'launch.py', *ARGUMENTS, f'--workdir={workdir}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (workdir / 'checkpoints').glob('pretrain_*.safetensors')
    assert len((workdir / 'metrics.jsonl').read_text().splitlines()) > 0
    return safetensors.torch.load_file(path)


def test_two_replicas_equal_one(tmp_path):
    one = _train(tmp_path / 'one')
    two = _train(tmp_path / 'two', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')
    assert one.keys() == two.keys()
    for name, expected in one.items():
        if not expected.is_floating_point():
            assert torch.equal(two[name], expected), name
            continue
        # Two steps of float32, sums over the batch in another order: where rounding moves an activation
        # across the kink of a ReLU, single gradients jump. Replicas that did not share their gradients
        # or statistics would be off by the size of the tensors.
        tolerance = 5e-2 if name.startswith('opt_state') else 1e-2
        error, scale = (two[name] - expected).norm().item(), expected.norm().item()
        assert error <= tolerance * max(scale, 1e-3), f'{name}: {error} of {scale}'


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node=2',
        'launch.py',
        *ARGUMENTS,
        '--config.batch_size=33',
        f'--workdir={tmp_path}',
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert 'Error: config.batch_size=33: expected a multiple of 2' in done.stderr

"""Two real processes share a batch and give the numbers of one."""

import pathlib

import safetensors.torch
import torch

from cli import srun, succeed, tiny_digits

RUN = [
    *tiny_digits(
        batch_size=718,
        network__projector_hidden_size=32,
        network__projector_output_size=256,
        network__predictor_hidden_size=32,
        final_linear_eval=True,
        # Adam would make whole steps of the rounding in gradients of 0.
        optimizer='sgd',
        lr_schedule__base_learning_rate=0.1,
    ),
    '--device=cpu',
]


def _trained(workdir: pathlib.Path) -> dict[str, torch.Tensor]:
    (path,) = (workdir / 'checkpoints').glob('pretrain_*.safetensors')
    assert len((workdir / 'metrics.jsonl').read_text().splitlines()) > 0
    return safetensors.torch.load_file(path)


def test_two_replicas_equal_one(tmp_path):
    succeed(*RUN, '--workdir=one', cwd=tmp_path)
    for replica in srun(*RUN, '--workdir=two', cwd=tmp_path):
        outcome = replica.wait()
        assert outcome.code == 0, outcome.stderr
    one, two = (_trained(tmp_path / name) for name in ('one', 'two'))
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
    for replica in srun(*RUN, '--config.batch_size=33', '--workdir=run', cwd=tmp_path):
        outcome = replica.wait()
        assert outcome.code == 1
        assert 'Error: config.batch_size=33: expected a multiple of 2' in outcome.stderr

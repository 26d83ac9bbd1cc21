"""No network, size or precision ends a process by a signal, and a process that does die so leaves a trace."""

import faulthandler
import multiprocessing
import os
import pathlib
import signal
import time

import optree
import pytest
import torch

from byol_func.runtime import layers
from byol_func.utils import networks
from cli import PRELOAD, start_launch, succeed, tiny_digits

# Narrow networks have numbers of channels that few others have, and sizes around 64 pixels are where oneDNN
# changes from one implementation to another.
ENCODERS = [
    *(('TinyResNet', width, 'cifar') for width in (0.5, 1.0, 1.5, 2.0, 4.0)),
    ('TinyResNet', 1.0, 'imagenet'),
    ('ResNet10', 0.125, 'cifar'),
    ('ResNet18', 0.1875, 'cifar'),
    ('ResNet50', 0.125, 'cifar'),
    ('ResNet50', 0.125, 'imagenet'),
]
SIZES = (8, 17, 32, 64, 65, 96)


def _descend(dtype: torch.dtype, all_networks: bool) -> None:
    """Gradients of the networks at all sizes; the last line that is printed names the one that crashes."""
    faulthandler.enable()
    torch.set_num_threads(1)
    for i, (encoder, width, stem) in enumerate(ENCODERS):
        for v2 in (False, True) if all_networks else (i % 2 == 0,):
            network = networks.make_encoder(encoder, {'width_multiplier': width, 'stem': stem, 'resnet_v2': v2}, {})
            for size in SIZES:
                print(f'{encoder} x {width}, {stem} stem, v2 {v2}, {dtype}, {size} pixels', flush=True)
                _check_gradients(network, torch.rand(2, 3, size, size, dtype=dtype))


def _check_gradients(network: networks.Network, images: torch.Tensor) -> None:
    params, state = network.init(torch.Generator().manual_seed(0))
    grads = torch.func.grad(lambda params: network.apply(params, state, images, True)[0].square().sum())(params)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(grads))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_no_network_crashes(dtype, pytestconfig):
    """Both versions of the ResNet have the same convolutions: by default each network is tried in one of them."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_descend, args=(dtype, pytestconfig.getoption('all_networks')))
    process.start()
    process.join(300)
    assert process.exitcode == 0


@pytest.mark.parametrize('size', [(7, 7), (8, 8), (9, 12)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_strided_1x1_convolution_is_a_slice_and_an_unstrided_one(size, channels_last):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, *size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    params = {'w': torch.randn(32, 16, 1, 1, generator=generator, dtype=torch.float64)}
    strided = lambda params, x: torch.nn.functional.conv2d(x, params['w'], stride=2)
    torch.testing.assert_close(layers.conv2d(params, x, 2), strided(params, x), rtol=1e-12, atol=1e-12)
    gradients = [
        torch.func.grad(lambda p, x, f=f: f(p, x).pow(3).sum(), argnums=(0, 1))(params, x)
        for f in (lambda p, x: layers.conv2d(p, x, 2), strided)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-10)


def test_a_strided_convolution_of_one_pixel_is_an_unstrided_one():
    """In bfloat16 the derivative of the strided one took what was in memory before, and so was NaN now and then."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 1, 1, generator=generator, dtype=torch.bfloat16)
    params = {'w': torch.randn(8, 8, 3, 3, generator=generator, dtype=torch.bfloat16)}
    for _ in range(20):
        for size in (2**8, 2**10, 2**12, 2**14):
            torch.full((size,), torch.nan)  # Is freed at once.
        actual = torch.func.grad(lambda p: layers.conv2d(p, x, 2).square().sum())(params)['w']
        expected = torch.func.grad(lambda w: torch.nn.functional.conv2d(x.float(), w, padding=1).square().sum())(
            params['w'].float()
        )
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize('number', [signal.SIGSEGV, signal.SIGABRT])
def test_a_run_that_crashes_leaves_a_trace_and_goes_on(number, tmp_path):
    workdir = tmp_path / 'run'
    run = tiny_digits(num_epochs=4, checkpointing__save_every_steps=2)
    running = start_launch(*run, f'--workdir={workdir}', cwd=tmp_path)
    _wait_for_a_checkpoint(workdir)
    os.kill(running.process.pid, number)
    assert running.wait().code == -number
    trace = (workdir / 'fault.txt').read_text()
    assert trace.startswith('Fatal Python error') and 'in train_loop' in trace
    succeed(*run, f'--workdir={workdir}', cwd=tmp_path)
    assert (workdir / 'fault.txt').read_text() == trace, 'the trace stays for whoever looks into it'
    last = 4 * 1442 // 128 - 1
    assert (workdir / f'checkpoints/pretrain_{last:08d}.safetensors').exists()


def test_a_run_that_ends_well_leaves_no_trace(tmp_path):
    succeed(*tiny_digits(batch_size=1442), '--workdir=run', cwd=tmp_path)
    assert not list(tmp_path.glob('run/fault*'))


def _wait_for_a_checkpoint(workdir: pathlib.Path) -> None:
    deadline = time.monotonic() + 400
    while not list(workdir.glob('checkpoints/*.safetensors')):
        assert time.monotonic() < deadline
        time.sleep(0.02)

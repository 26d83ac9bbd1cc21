"""`byol_func.load_encoder` gives the embeddings of `--mode=embed`, as functions and as a module."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import byol_func
import cli
from byol_func.errors import UserError
from byol_func.utils import checkpointing


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A workdir of a run on photographs of many sizes, its embeddings, and the photographs."""
    root = tmp_path_factory.mktemp('library')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('test', 3)):
        for name in ('a', 'b'):
            (root / 'data' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (20 + 3 * i, 30 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / 'data' / split / name / f'{i}.png')
    small = dict(cli.TINY_RUN, batch_size=8, image_size=16, dataset__source_size=20)
    cli.succeed(*cli.config('folder.py', **small, dataset__root=root / 'data'), '--workdir=run', cwd=root)
    cli.succeed('--workdir=run', '--mode=embed', '--split=test', cwd=root)
    return root


def test_files_and_pictures_embed_as_the_mode_does(folder):
    saved = np.load(folder / 'run' / 'embeddings.test.npz')
    encoder = byol_func.load_encoder(folder / 'run')
    paths = [folder / 'data' / path for path in saved['path']]
    assert len(paths) == 6
    expected = torch.from_numpy(saved['features'])
    assert expected.std() > 1e-3
    for images in (paths, [Image.open(path) for path in paths]):
        torch.testing.assert_close(encoder.embed(images, batch_size=4), expected, rtol=1e-4, atol=1e-5)
    assert encoder.output_size == expected.shape[1] and encoder.embed([]).shape == (0, encoder.output_size)


def test_a_checkpoint_a_module_and_the_functions_agree(folder):
    path = next((folder / 'run' / 'checkpoints').glob('pretrain_*.safetensors'))
    encoder = byol_func.load_encoder(path)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embeddings = encoder(images)
    module = encoder.as_module()
    assert not module.training
    for wrong, message in (
        (images[:, :1], r'images of shape \(3, 1, 16, 16\): expected \[B, 3, H, W\]'),
        (images[0], r'images of shape \(3, 16, 16\)'),
        ((images * 255).byte(), 'images of torch.uint8: expected floats in 0..1'),
    ):
        with pytest.raises(ValueError, match=message):
            module(wrong)
    torch.testing.assert_close(module(images).detach(), embeddings, rtol=1e-4, atol=1e-5)
    functional, _ = encoder.network.apply(encoder.params, encoder.state, images, is_training=False)
    torch.testing.assert_close(functional, embeddings)
    as_bytes = (images * 255).round().to(torch.uint8)
    for embed in (encoder, encoder.embed):
        torch.testing.assert_close(embed(as_bytes), embed(as_bytes / 255), rtol=1e-4, atol=1e-5)


def test_wrong_images_are_refused_in_one_line(folder, tmp_path):
    encoder = byol_func.load_encoder(folder / 'run')
    (tmp_path / 'broken.png').write_bytes(b'no image')
    for images, message in (
        (torch.zeros(2, 1, 16, 16), r'expected \[B, 3, H, W\]'),
        (torch.full((2, 3, 16, 16), 200.0), 'expected floats in 0..1'),
        (torch.full((2, 3, 16, 16), float('nan')), 'expected floats in 0..1'),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), 'torch.int64'),
        ([tmp_path / 'missing.png'], 'missing.png'),
        ([tmp_path / 'broken.png'], 'broken.png'),
        ('photo.jpg', "images='photo.jpg', a single path: expected a list of images or paths"),
        (iter(['photo.jpg']), 'list_iterator: expected a list of images'),
        ([torch.zeros(3, 8, 8)], 'a list with Tensor: expected paths or PIL images'),
        (Image.new('RGB', (8, 8)), 'images=a single PIL image: expected a list of images or paths'),
    ):
        with pytest.raises(UserError, match=message):
            encoder.embed(images)
    with pytest.raises(UserError, match='expected floats'):
        encoder(torch.full((2, 3, 16, 16), -1.0))
    for images in (torch.tensor(1.0), np.zeros(3)):
        with pytest.raises(UserError, match=r'images of shape .*: expected \[N, C, H, W\]'):
            encoder.embed(images)
    with pytest.raises(UserError, match='cannot be read as an image \\(it has no pixels'):
        encoder.embed([Image.new('RGB', (0, 0))])
    for size in (0, -1, 1.5, None):
        with pytest.raises(UserError, match=f'batch_size={size}: expected a whole number'):
            encoder.embed([Image.new('RGB', (8, 8))], batch_size=size)
    for images, message in (
        ([1, 2], r'images of type list: expected a tensor or an array \[B, 3, H, W\]; embed and predict take lists'),
        (None, 'images of type NoneType: expected'),
        (Image.new('RGB', (8, 8)), 'images of type Image: expected'),
        (np.zeros((2, 3, 16, 16), object), 'images of object: expected floats'),
        (np.zeros((2, 3, 16, 16), '<U3'), 'images of <U3: expected floats'),
    ):
        with pytest.raises(UserError, match=message):
            encoder(images)


def test_floats_of_any_precision_become_float32(folder):
    encoder = byol_func.load_encoder(folder / 'run')
    images = torch.rand(2, 3, 16, 16)
    for each in (images.double(), images.half(), images.double().numpy(), images.flip(3).numpy()[..., ::-1]):
        for embed in (encoder, encoder.embed):
            found = embed(each)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, embed(images), rtol=1e-2, atol=1e-2)


def test_an_encoder_is_described_in_one_line(folder):
    assert str(byol_func.load_encoder(folder / 'run')) == 'Encoder(TinyResNet, 8 features, 3 channels, step 1, cpu)'


def test_folders_without_an_encoder_are_refused(tmp_path):
    (tmp_path / 'seed_0').mkdir()
    with pytest.raises(UserError, match='seed_0'):
        byol_func.load_encoder(tmp_path)
    with pytest.raises(UserError, match='missing.safetensors: no such file or folder'):
        byol_func.load_encoder(tmp_path / 'missing.safetensors')
    with pytest.raises(AttributeError):
        _ = byol_func.no_such_name


def test_an_encoder_alone_is_a_checkpoint_for_the_modes_that_measure_one(tmp_path):
    run = cli.tiny_digits(num_epochs=1)
    cli.succeed(*run, '--workdir=run', cwd=tmp_path)
    cli.succeed('--workdir=run', '--mode=export', '--format=encoder', '--output=e.safetensors', cwd=tmp_path)
    whole, alone = (
        checkpointing.load(path) for path in (*tmp_path.glob('run/checkpoints/*'), tmp_path / 'e.safetensors')
    )
    assert alone.config == whole.config and alone.class_names == whole.class_names and alone.step == whole.step
    assert all(
        name.split('/')[1] == 'encoder' and torch.equal(t, whole.tensors[name]) for name, t in alone.tensors.items()
    )
    measured = lambda workdir: json.loads((tmp_path / workdir / 'summary.knn.json').read_text())['test/knn_top1']
    cli.succeed('--workdir=run', '--mode=knn', cwd=tmp_path)
    for flags in ([], run):
        cli.succeed(*flags, '--checkpoint=e.safetensors', '--mode=knn', '--workdir=x', cwd=tmp_path)
        assert measured('x') == measured('run')
    refused = cli.run_launch('--checkpoint=e.safetensors', '--mode=export', '--output=o.pkl', cwd=tmp_path)
    assert refused.code == 1 and '--format=official: ' in refused.stderr.splitlines()[-1]
    assert not (tmp_path / 'o.pkl').exists()

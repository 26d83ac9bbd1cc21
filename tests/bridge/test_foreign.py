"""Files of other programs are told by name, never unpickled, and nothing that is not known is guessed."""

import io
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from byol_func.bridge import foreign
from byol_func.bridge.official import read
from byol_func.errors import UserError
from byol_func.utils import checkpointing
from cli import run_launch, succeed, tiny_digits


class _Canary:
    """Creates a file if anybody unpickles it."""

    def __reduce__(self):
        return open, ('canary', 'w')


def _torchvision(path):
    torch.save(torchvision.models.resnet18().state_dict(), path)


def _timm(path):
    model = timm.create_model('resnet18')
    torch.save({'epoch': 3, 'state_dict': model.state_dict(), 'args': _Canary()}, path)


def _lightly(path):  # A Lightning checkpoint of a module with a backbone.
    model = torch.nn.ModuleDict({'backbone': torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))})
    torch.save({'pytorch-lightning_version': '2.0', 'state_dict': model.state_dict(), 'x': _Canary()}, path)


def _legacy(path):
    torch.save(torchvision.models.resnet18().state_dict(), path, _use_new_zipfile_serialization=False)


def _safetensors(path):
    safetensors.torch.save_file({'blocks.0.attn.qkv.weight': torch.zeros(3, 3)}, path)


def _program(path):
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), f'{path}.pt2')
    path.write_bytes(path.with_name(f'{path.name}.pt2').read_bytes())


def _npz(path):
    with open(path, 'wb') as file:
        np.savez(file, x=np.zeros(3))


_FILES = {
    'torchvision': (_torchvision, 'a PyTorch file (torch.save) with tensors such as conv1.weight'),
    'timm': (_timm, 'a PyTorch file (torch.save) with tensors such as conv1.weight'),
    'lightly': (_lightly, 'a PyTorch file (torch.save) with tensors such as backbone.0.weight'),
    'legacy': (_legacy, 'a PyTorch file (torch.save before version 1.6)'),
    'safetensors': (_safetensors, 'a safetensors file with tensors such as blocks.0.attn.qkv.weight'),
    'program': (_program, 'an exported program (torch.export)'),
    'npz': (_npz, 'a numpy archive (.npz)'),
    'damaged_zip': (lambda path: path.write_bytes(b'PK\x03\x04' + bytes(50)), 'a damaged zip archive'),
    'empty': (lambda path: path.write_bytes(b''), 'the file is empty'),
    'lfs': (lambda path: path.write_bytes(b'version https://git-lfs.github.com/spec/v1\n'), 'a Git LFS pointer'),
    'web_page': (lambda path: path.write_bytes(b'<!DOCTYPE html><title>404</title>'), 'a web page'),
    'onnx': (lambda path: path.write_bytes(b'\x08\x07\x12\x07pytorch\x1a\x051.9.0:'), 'an ONNX model'),
}


@pytest.mark.parametrize('write, expected', _FILES.values(), ids=_FILES)
def test_what_a_file_is(write, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Where the canary would be.
    path = tmp_path / 'file.pth'
    write(path)
    assert expected in foreign.recognise(path)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f'--checkpoint={path}: expected a checkpoint of the official pre-training')
    assert expected in message and '\n' not in message and len(message) < 600
    assert not (tmp_path / 'canary').exists()


def test_a_pickle_inside_a_zip_takes_bounded_memory(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + b'K\x01' * (100 << 20))
    path = tmp_path / 'bomb.pth'
    path.write_bytes(buffer.getvalue())
    assert 'a PyTorch file (torch.save); ' in foreign.recognise(path)


def test_modes_say_it_too(tmp_path):
    """--checkpoint of any mode; a checkpoint of this code given to --mode=import; and one that is damaged."""
    _torchvision(tmp_path / 'resnet18.pth')
    flags = [*tiny_digits(batch_size=512), '--workdir=run']
    for mode in (['--mode=knn'], ['--mode=export', '--output=x']):
        outcome = run_launch(*flags, *mode, '--checkpoint=resnet18.pth', cwd=tmp_path)
        assert outcome.code == 1
        assert '--checkpoint=resnet18.pth: expected a checkpoint of byol_func; it is a PyTorch file' in outcome.stderr
    succeed(*flags, cwd=tmp_path)
    _, path = checkpointing.list_checkpoints(tmp_path / 'run/checkpoints', 'pretrain')[-1]
    outcome = run_launch(*flags, '--mode=import', f'--checkpoint={path}', '--workdir=new', cwd=tmp_path)
    assert outcome.code == 1 and 'it is already a checkpoint of byol_func' in outcome.stderr
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = run_launch(*flags, '--mode=knn', f'--checkpoint={path}', cwd=tmp_path)
    assert outcome.code == 1 and 'checksum differs' in outcome.stderr

"""Recognises exports and the files of other programs by their bytes and the names in them, without unpickling."""

import codecs
import json
import os
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_MAX_READ = 16 << 20  # Bytes of a header or of a pickle to inspect.
_PICKLE = b'\x80'  # Of protocol 2 or later.
_LEGACY_TORCH = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # The magic number of torch.save before version 1.6.
_BEGINNINGS = {
    b'version https://git-lfs': 'a Git LFS pointer, not the file itself (git lfs pull fetches it)',
    b'<!DOCTYPE': 'a web page, so the download failed',
    b'<html': 'a web page, so the download failed',
    b'\x1f\x8b': 'a gzip archive; unpack it first',
    b'\x89HDF': 'an HDF5 file, such as those of Keras',
    b'\x93NUMPY': 'a single numpy array',
    b'\x89PNG': 'a picture',
    b'\xff\xd8\xff': 'a picture',
}
# The formats of --mode=export whose files are no checkpoints -> what loads them.
_LOADED_BY = {
    'timm': 'timm.models.resnetv2.ResNetV2',
    'torchvision': "torchvision.models and timm's ResNet",
    'safetensors': 'byol_func.bridge.plain_module.Encoder',
    'module': 'torch.export.load(FILE).module()',
    'onnx': 'onnxruntime.InferenceSession(FILE)',
    'mlflow': 'mlflow.pyfunc.load_model(FOLDER)',
}
_ONNX_TAIL = 8192  # Bytes at the end of an ONNX file, where the description of its input is.
_ENCODERS_ONLY = (
    'networks of other libraries cannot be converted, because their strided layers pad differently; use them with '
    'their library, or train one here with --mode=pretrain'
)


def recognise(path: str | os.PathLike, advice: str = f'; {_ENCODERS_ONLY}') -> str:
    """Returns a clause that says what a file is, and an advice for networks of other programs.

    Returns '' for pickles, whose errors `unpickling.load` reports, and for checkpoints of this code, even damaged ones.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, 'rb') as file:
        start = file.read(64)
        if not start:
            return 'the file is empty'
        known = next((what for beginning, what in _BEGINNINGS.items() if start.startswith(beginning)), None)
        if known:
            return f'it is {known}'
        if start[:1] == b'\x08' and start[2:3] == b'\x12':  # The version of the format, then the name of the exporter.
            file.seek(max(0, os.path.getsize(path) - _ONNX_TAIL))
            return _export('onnx') if b'"then_normalised_by"' in file.read() else f'it is an ONNX model{advice}'
        if start.startswith(_LEGACY_TORCH):
            return f'it is a PyTorch file (torch.save before version 1.6){advice}'
        if start.startswith(b'PK\x03\x04'):
            found = _zip_archive(file)
            return found if found.startswith('it is an export ') else f'it is {found}{advice}'
        if start[8:9] == b'{':
            return _safetensors(file, start, advice)
    if start.startswith(_PICKLE):
        return ''
    return 'it is a text file' if _is_text(start) else 'it is neither a safetensors file nor a pickle'


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(start)  # The last character may be cut.
    except UnicodeDecodeError:
        return False
    return ''.join(text.split()).isprintable()


def is_pickle(path: str | os.PathLike) -> bool:
    """Returns whether a file begins as a pickle does."""
    with open(path, 'rb') as file:
        return file.read(1) == _PICKLE


def recognise_folder(path: str | os.PathLike) -> str:
    """Returns a clause that says what a folder is; '' unless it is an exported mlflow model."""
    return _export('mlflow') if os.path.isfile(os.path.join(path, 'MLmodel')) else ''


def _export(form: str) -> str:
    return (
        f'it is an export with --format={form}, for {_LOADED_BY[form]}; --format=encoder and --format=hub write what '
        'is read here'
    )


def _zip_archive(file: BinaryIO) -> str:
    """Describes a zip archive, such as one of torch.save, torch.jit.save, torch.export.save or numpy.savez."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            if any(name.endswith('/extra/input.json') for name in members):
                return _export('module')
            pickles = [name for name in members if name.endswith('data.pkl')]
            if pickles:
                kind = 'TorchScript' if any('/code/' in name for name in members) else 'torch.save'
                with archive.open(pickles[0]) as pickled:
                    names = _strings(pickled.read(_MAX_READ))
                return f'a PyTorch file ({kind}){_such_as(names)}'
            if any(name.endswith('.npy') for name in members):
                return 'a numpy archive (.npz)'
            if any('/models/' in name or name.endswith('.json') for name in members):
                return 'an exported program (torch.export)'
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError):
        return 'a damaged zip archive'
    return 'a zip archive'


def _strings(data: bytes) -> Iterator[str]:
    """Yields the strings in a pickle; its opcodes are listed, not executed."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if 'UNICODE' in opcode.name and isinstance(argument, str):
                yield argument
    except (ValueError, IndexError, UnicodeDecodeError):
        return


def _safetensors(file: BinaryIO, start: bytes, advice: str) -> str:
    length = int.from_bytes(start[:8], 'little')
    if length > _MAX_READ:
        return ''
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        metadata = header.pop('__metadata__', None) or {}
    except (ValueError, AttributeError, RecursionError):
        return ''
    if 'format_version' in metadata and 'mode' in metadata:
        return ''  # A checkpoint of this code.
    if {'network', 'step', 'input'} <= metadata.keys():
        return _export(
            'timm' if 'stem.conv.weight' in header else 'torchvision' if 'fc.weight' in header else 'safetensors'
        )
    return f'it is a safetensors file{_such_as(header)}{advice}'


def _such_as(names: Iterable[str]) -> str:
    """Returns ' with tensors such as NAME' if one of the names is that of a weight, otherwise ''."""
    found = next((name for name in names if name.endswith('weight') and len(name) < 100), None)
    return f' with tensors such as {found}' if found else ''

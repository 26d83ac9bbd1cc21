"""Writes the pickles that the official code loads: dicts, tuples, named tuples, integers and arrays.

It writes the opcodes directly, because they name modules that need not be installed here.
"""

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class NamedTupleOf(NamedTuple):
    """A named tuple whose class is given by name; dill recreates the class if its package no longer has it."""

    module: str
    name: str
    fields: dict[str, Any]


def dump(value: Any, file: BinaryIO) -> None:
    """Writes `value` as a pickle of protocol 3 that `dill.load` can read, and `pickle.load` if dill is installed.

    Args:
      value: dicts with string keys, tuples, `NamedTupleOf`, integers, strings and numpy arrays.
      file: a binary file, open for writing.
    """
    file.write(b'\x80\x03')
    _dump(value, file)
    file.write(b'.')


def _dump(value: Any, file: BinaryIO) -> None:
    if isinstance(value, NamedTupleOf):
        file.write(b'cdill._dill\n_create_namedtuple\n')
        _dump((value.name, tuple(value.fields), value.module), file)
        file.write(b'R')
        _dump(tuple(value.fields.values()), file)
        file.write(b'R')
    elif isinstance(value, Mapping):
        file.write(b'}(')
        for key, item in value.items():
            _dump(key, file)
            _dump(item, file)
        file.write(b'u')
    elif isinstance(value, tuple):
        file.write(b'(')
        for item in value:
            _dump(item, file)
        file.write(b't')
    elif isinstance(value, np.ndarray):
        _dump_array(value, file)
    elif isinstance(value, str):
        text = value.encode()
        file.write(b'X' + struct.pack('<I', len(text)) + text)
    elif isinstance(value, int):
        file.write(b'J' + struct.pack('<i', value))
    else:
        raise TypeError(f'{type(value).__name__}: expected dicts, tuples, integers, strings and arrays')


def _dump_array(array: np.ndarray, file: BinaryIO) -> None:
    """Writes an array as `numpy.ndarray.__reduce__` describes it: an empty array and its state."""
    # The module's name before numpy 2; newer versions accept it, too.
    file.write(b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n')
    file.write(b'K\x00\x85C\x01b\x87R')  # ((0,), b'b')
    file.write(b'(K\x01')
    _dump(array.shape, file)
    file.write(b'cnumpy\ndtype\n')
    _dump(f'{array.dtype.kind}{array.dtype.itemsize}', file)
    file.write(b'\x89\x88\x87R')  # (code, False, True)
    file.write(b'(K\x03')
    _dump('<', file)
    file.write(b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb')
    file.write(b'\x89')
    data = np.ascontiguousarray(array, array.dtype.newbyteorder('<')).tobytes()
    file.write(b'B' + struct.pack('<I', len(data)))
    file.write(data)
    file.write(b'tb')

"""Maps the names in a pickle to stand-ins: harmless functions of our own, from a closed list.

None of them imports, opens or executes anything, and any other name in a file is refused. The list covers
the names that numpy, jax, dill and Haiku have written into checkpoints since 2020.
"""

import math
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from byol_func.errors import counted


class PickleError(ValueError):
    """Raised if a pickle is damaged, or holds anything but arrays in plain containers."""


class Blob(NamedTuple):
    """Bytes that are still in the file, stored raw or as the characters 0..255 of a UTF-8 text."""

    offset: int
    length: int
    is_text: bool

    def read(self, file: BinaryIO) -> bytes:
        """Reads the bytes from the file."""
        file.seek(self.offset)
        raw = file.read(self.length)
        return raw.decode('utf-8').encode('latin-1') if self.is_text else raw


class StandIn(NamedTuple):
    """The replacement for a name in a file; it can only be called, through `call`."""

    name: str
    call: Callable[..., Any]


class Record(NamedTuple):
    """A named tuple: the name of its class and its fields."""

    name: str
    fields: dict[str, Any]


# Numpy's codes for the kind and size of numbers.
_DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


class Dtype:
    """A numpy dtype of numbers; `build` sets its byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        del align, copy
        if code not in _DTYPES:
            raise PickleError(f'an array of dtype {_short(code)}, expected one of {", ".join(_DTYPES)}')
        self.numpy = np.dtype(code)

    def build(self, state: Any) -> None:
        """Sets the state (version, byte order, ...); the further fields are empty for numbers."""
        _, order, *rest = state
        if order not in ('<', '>', '=', '|') or any(value is not None for value in rest[:3]):
            raise PickleError('a dtype with fields or without a byte order')
        self.numpy = self.numpy.newbyteorder(order)


class Array:
    """An array whose numbers are still in the file."""

    shape: tuple[int, ...] | None = None
    dtype: np.dtype
    is_fortran: bool
    data: bytes | Blob

    def build(self, state: Any) -> None:
        """Sets the state (version, shape, dtype, is_fortran, data), like `numpy.ndarray.__setstate__`."""
        _, shape, dtype, is_fortran, data = state
        if self.shape is not None:
            raise PickleError('an array that is filled twice')
        if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise PickleError('an array with an impossible shape')
        if not isinstance(dtype, Dtype) or type(is_fortran) is not bool or not isinstance(data, (bytes, Blob)):
            raise PickleError('an array of something other than numbers')
        length = data.length if isinstance(data, Blob) else len(data)
        needed = math.prod(shape) * dtype.numpy.itemsize
        # In UTF-8, a character in 0..255 takes one or two bytes.
        if not (needed <= length <= 2 * needed if isinstance(data, Blob) and data.is_text else needed == length):
            raise PickleError(f'an array of shape {list(shape)} with {counted(length, "byte")}')
        self.shape, self.dtype, self.is_fortran, self.data = shape, dtype.numpy, is_fortran, data

    def read(self, file: BinaryIO) -> np.ndarray:
        """Reads the array, in native byte order and C order.

        Raises:
          PickleError: its numbers are missing or damaged.
        """
        if self.shape is None:
            raise PickleError('an array without data')
        try:
            data = self.data.read(file) if isinstance(self.data, Blob) else self.data
            flat = np.frombuffer(data, self.dtype)
            array = flat.reshape(self.shape, order='F' if self.is_fortran else 'C')
        except ValueError as error:
            raise PickleError('an array with damaged data') from error
        return np.ascontiguousarray(array, self.dtype.newbyteorder('=')).reshape(self.shape)


# --- The functions ----------------------------------------------------------------------------------


def _reconstruct(array_class: Any, shape: Any, typecode: Any) -> Array:
    del shape, typecode  # Placeholders.
    return _call(array_class)


def _scalar(dtype: Any, data: Any) -> Array:
    array = Array()
    array.build((1, (), dtype, False, data))
    return array


def _create_array(function: Any, arguments: Any, state: Any, attributes: Any = None) -> Array:
    """Makes an array from the form in which dill and jax store it."""
    if attributes:
        raise PickleError('an array with attributes')
    array = _call(function, *arguments)
    if not isinstance(array, Array):
        raise PickleError('an array made by a function that makes none')
    array.build(state)
    return array


def _jax_array(function: Any, arguments: Any, state: Any, aval_state: Any) -> Array:
    del aval_state  # Whether jax may promote its dtype.
    return _create_array(function, arguments, state)


def _encode(text: Any, encoding: Any) -> bytes | Blob:
    """Makes bytes from the characters of a text, the form of bytes in protocol 2."""
    if encoding != 'latin1' or not (type(text) is str or (isinstance(text, Blob) and text.is_text)):
        raise PickleError('bytes in an unknown encoding')
    return text.encode('latin-1') if isinstance(text, str) else text


def _no_bytes() -> bytes:
    return b''


def _mapping(values: Any = ()) -> dict[str, Any]:
    pairs = list(values.items()) if type(values) is dict else values
    if type(pairs) not in (list, tuple) or not all(
        type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) is str for pair in pairs
    ):
        raise PickleError('a mapping whose keys are not strings')
    return dict(pairs)


def _record_class(name: Any, fields: Any) -> StandIn:
    if type(name) is not str or type(fields) not in (tuple, list) or not all(type(f) is str for f in fields):
        raise PickleError('a named tuple without field names')

    def make(*values: Any) -> Record:
        if len(values) != len(fields):
            raise PickleError(f'a {name} of {counted(len(values), "value")}, expected {len(fields)}')
        return Record(name, dict(zip(fields, values, strict=True)))

    return StandIn(name, make)


def _create_namedtuple(name: Any, fields: Any, module: Any, defaults: Any = None) -> StandIn:
    del module, defaults  # dill would import the module.
    return _record_class(name, fields)


def _call(function: Any, *arguments: Any) -> Any:
    if not isinstance(function, StandIn):
        raise PickleError('a call of an unknown function')
    return function.call(*arguments)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ('numpy', 'dtype'): Dtype,
    ('_codecs', 'encode'): _encode,
    ('__builtin__', 'bytes'): _no_bytes,
    ('builtins', 'bytes'): _no_bytes,
    ('collections', 'OrderedDict'): _mapping,
    # Classes of arrays, which are empty until their state is set.
    ('numpy', 'ndarray'): Array,
    ('jax.interpreters.xla', 'DeviceArray'): Array,
    ('jax.interpreters.xla', '_DeviceArray'): Array,
    ('jaxlib.xla_extension', 'DeviceArray'): Array,
    ('jax._src.array', '_reconstruct_array'): _jax_array,
    ('jax._src.device_array', 'reconstruct_device_array'): _jax_array,
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _FUNCTIONS[_module, '_reconstruct'] = _reconstruct
    _FUNCTIONS[_module, 'scalar'] = _scalar
for _module in ('dill._dill', 'dill.dill'):
    _FUNCTIONS[_module, '_create_array'] = _create_array
    _FUNCTIONS[_module, '_create_namedtuple'] = _create_namedtuple
for _name in ('FlatMapping', 'FlatMap', 'frozendict'):
    _FUNCTIONS['haiku._src.data_structures', _name] = _mapping

# The fields of named tuples that a file names by class. Their modules have moved since 2020, but their names
# have not; each becomes a `Record`.
_RECORDS: dict[str, tuple[str, ...]] = {
    '_ByolExperimentState': ('online_params', 'target_params', 'online_state', 'target_state', 'opt_state'),
    'AddWeightDecayState': (),
    'ScaleByLarsState': ('mu',),
    'ScaleState': (),
    'EmptyState': (),
    'IdentityState': (),
}


def find(module: str, name: str) -> StandIn:
    """Returns the stand-in of a name.

    Raises:
      PickleError: the name is not in the list.
    """
    function = _FUNCTIONS.get((module, name))
    if function is not None:
        return StandIn(f'{module}.{name}', function)
    if name in _RECORDS and module.split('.')[0] in ('byol', 'deepmind_research', 'optax', 'deepmind'):
        return _record_class(name, _RECORDS[name])
    raise PickleError(f'names {_short(f"{module}.{name}")}, which no array or container needs')


def _short(value: Any) -> str:
    # Never take the repr of a container: a few lists that nest each other can expand to a billion items.
    text = repr(value) if type(value) is str else type(value).__name__
    return text if len(text) <= 80 else f'{text[:77]}...'

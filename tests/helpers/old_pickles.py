"""Writes checkpoints of the official code as older versions of its libraries wrote them.

The classes named in them need not be installed: the opcodes are written here, as CPython's pickler
writes them in protocol 2, where bytes are the characters of a text.
"""

import struct
from typing import Any, NamedTuple

import numpy as np


class Form(NamedTuple):
    """What a generation of the libraries wrote."""

    mapping: str | None = None  # The class of Haiku's dicts, 'module name'; None for dict.
    array: str = 'numpy ndarray'
    jax_reduce: str | None = None  # jax's function around an array, 'module name'.
    numpy_module: str = 'numpy.core.multiarray'
    # Named tuples: 'dill' makes the class from its fields, 'class' refers to it.
    tuples: str = 'dill'
    experiment_module: str = 'byol.byol_experiment'
    empty_state: tuple[str, str] = ('optax._src.transform', 'ScaleState')
    step_is_array: bool = False
    fortran: bool = False
    big_endian: bool = False


class Call(NamedTuple):
    """A call of `function`, 'module name'."""

    function: str
    arguments: tuple


def dumps(value: Any, form: Form | None = None) -> bytes:
    """The value as a pickle of protocol 2: dicts, lists, tuples, numbers, texts, arrays and `Call`s."""
    return b'\x80\x02' + _dumps(value, form or Form()) + b'.'


def global_(name: str) -> bytes:
    """The opcode of a name, 'module name'."""
    module, _, attribute = name.partition(' ')
    return f'c{module}\n{attribute}\n'.encode()


def _dumps(value: Any, form: Form) -> bytes:
    each = lambda values: b''.join(_dumps(v, form) for v in values)
    if isinstance(value, Call):
        return global_(value.function) + _dumps(value.arguments, form) + b'R'
    if isinstance(value, dict):
        return b'}(' + each(x for item in value.items() for x in item) + b'u'
    if isinstance(value, tuple):
        return b'(' + each(value) + b't'
    if isinstance(value, list):
        return b'](' + each(value) + b'e'
    if isinstance(value, str):
        return b'X' + struct.pack('<I', len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return global_('_codecs encode') + _dumps((value.decode('latin-1'), 'latin1'), form) + b'R'
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        return b'J' + struct.pack('<i', value)
    return _array(value, form)


def _array(array: np.ndarray, form: Form) -> bytes:
    order = '>' if form.big_endian else '<'
    dtype = _dumps(Call('numpy dtype', (f'{array.dtype.kind}{array.dtype.itemsize}', False, True)), form)
    dtype += _dumps((3, order, None, None, None, -1, -1, 0), form) + b'b'
    fortran = form.fortran and array.ndim > 1
    data = array.astype(array.dtype.newbyteorder(order)).tobytes('F' if fortran else 'C')
    state = b'(K\x01' + _dumps(array.shape, form) + dtype + _dumps(fortran, form) + _dumps(data, form) + b't'
    arguments = b'(' + global_(form.array) + b'K\x00\x85' + _dumps(b'b', form) + b't'
    function = global_(f'{form.numpy_module} _reconstruct')
    if form.jax_reduce:
        aval = _dumps({'weak_type': False, 'named_shape': {}}, form)
        return global_(form.jax_reduce) + b'(' + function + arguments + state + aval + b'tR'
    return function + arguments + b'R' + state + b'b'


def named_tuple(form: Form, module: str, name: str, fields: tuple[bytes, ...], names: tuple[str, ...]) -> bytes:
    """A named tuple of fields that are pickled already."""
    if form.tuples == 'dill':
        cls = _dumps(Call('dill._dill _create_namedtuple', (name, names, module)), form)
    else:
        cls = global_(f'{module} {name}')
    return cls + b'(' + b''.join(fields) + b't\x81'


def checkpoint(trees: dict[str, dict], momentum: dict, step: int, form: Form) -> bytes:
    """A checkpoint of the official pre-training.

    Args:
      trees: the four trees of the experiment, Haiku's flat dicts of modules.
      momentum: of LARS.
      step: index of the last update.
      form: how to write it.
    """

    def mapping(tree):
        inner = {name: _mapping(_dumps(leaves, form), form) for name, leaves in tree.items()}
        items = b''.join(_dumps(name, form) + leaves for name, leaves in inner.items())
        return _mapping(b'}(' + items + b'u', form)

    lars = 'byol.utils.optimizers'
    opt_state = (
        b'('
        + b''.join(
            (
                named_tuple(form, lars, 'AddWeightDecayState', (), ()),
                named_tuple(form, lars, 'ScaleByLarsState', (mapping(momentum),), ('mu',)),
                named_tuple(form, *form.empty_state, (), ()),
            )
        )
        + b't'
    )
    state = named_tuple(
        form,
        form.experiment_module,
        '_ByolExperimentState',
        (*(mapping(tree) for tree in trees.values()), opt_state),
        (*trees, 'opt_state'),
    )
    return b''.join(
        (
            b'\x80\x02}(',
            _dumps('experiment_state', form),
            state,
            _dumps('step', form),
            _dumps(np.int64(step).reshape(()) if form.step_is_array else step, form),
            _dumps('rng', form),
            _dumps(np.array([0, 1], np.uint32), form),
            b'u.',
        )
    )


def _mapping(pickled_dict: bytes, form: Form) -> bytes:
    return global_(form.mapping) + pickled_dict + b'\x85R' if form.mapping else pickled_dict

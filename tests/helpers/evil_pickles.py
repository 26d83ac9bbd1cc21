"""Pickles that want to run code, read files, take all memory, or are simply broken.

Each one is written with the opcodes an attacker would use; where it would run, it makes the file
named by `canary`.
"""

import struct

import numpy as np

from old_pickles import Call, dumps, global_

_PROTO = b'\x80\x04'

# Names with the arguments to call them with; {} is the path of the canary.
_CALLS = {
    'os system': ('touch {}',),
    'posix system': ('touch {}',),
    'nt system': ('copy nul {}',),
    'os popen': ('touch {}',),
    'os mkdir': ('{}',),
    'os execvp': ('touch', ['touch', '{}']),
    'os spawnlp': (0, 'touch', 'touch', '{}'),
    'subprocess Popen': (['touch', '{}'],),
    'subprocess check_output': (['touch', '{}'],),
    'pty spawn': (['touch', '{}'],),
    'builtins eval': ("open('{}', 'w')",),
    'builtins exec': ("open('{}', 'w')",),
    'builtins compile': ("open('{}', 'w')", 'x', 'exec'),
    'builtins open': ('{}', 'w'),
    'builtins __import__': ('os',),
    'builtins getattr': ('os', 'system'),
    'builtins breakpoint': (),
    'builtins input': (),
    'builtins map': ('print', [1]),
    '__builtin__ eval': ("open('{}', 'w')",),
    '__builtin__ file': ('{}', 'w'),
    'io open': ('{}', 'w'),
    'io FileIO': ('{}', 'w'),
    'pathlib Path': ('{}',),
    'tempfile mkstemp': (),
    'shutil copy': ('/etc/passwd', '{}'),
    'shutil rmtree': ('{}',),
    'importlib import_module': ('os',),
    'runpy run_path': ('{}',),
    'code interact': (),
    'timeit timeit': ("open('{}', 'w')",),
    'cProfile run': ("open('{}', 'w')",),
    'pdb run': ("open('{}', 'w')",),
    'types CodeType': (),
    'types FunctionType': (),
    'functools partial': ('print',),
    'operator methodcaller': ('system', 'touch {}'),
    'operator attrgetter': ('__class__.__base__',),
    'copyreg _reconstructor': ('os', 'object', None),
    'copyreg add_extension': ('os', 'system', 1),
    'copy_reg __newobj__': ('os',),
    'pickle loads': (b'cos\nsystem\n.',),
    '_pickle Unpickler': (),
    'marshal loads': (b'\xe3',),
    'ctypes CDLL': ('libc.so.6',),
    'socket create_connection': (('127.0.0.1', 9),),
    'urllib.request urlopen': ('file:///etc/passwd',),
    'http.client HTTPConnection': ('127.0.0.1',),
    'webbrowser open': ('file://{}',),
    'logging.config dictConfig': ({},),
    'signal raise_signal': (9,),
    'sys exit': (0,),
    'os _exit': (0,),
    'os kill': (0, 9),
    'multiprocessing.util spawnv_passfds': (b'touch', ['{}'], ()),
    'asyncio.unix_events _UnixSubprocessTransport': (),
    'torch load': ('{}',),
    'torch.hub load': ('{}', 'x'),
    'torch.jit load': ('{}',),
    'torch.storage _load_from_bytes': (b'\x80\x02.',),
    'torch._utils _rebuild_tensor_v2': (),
    'torch._inductor.codecache compile_file': ('{}', '{}', []),
    'torch.utils.collect_env run': ('touch {}',),
    'numpy load': ('{}', None, True),
    'numpy fromfile': ('/etc/passwd',),
    'numpy memmap': ('{}', 'u1', 'w+', 0, 1),
    'numpy loadtxt': ('/etc/passwd',),
    'numpy.f2py compile': ('x',),
    'numpy.testing runstring': ("open('{}', 'w')", {}),
    'numpy.testing._private.utils runstring': ("open('{}', 'w')", {}),
    'numpy ufunc': (),
    'numpy.core.records fromfile': ('/etc/passwd',),
    'scipy.io loadmat': ('{}',),
    'pandas read_pickle': ('{}',),
    'joblib load': ('{}',),
    'dill loads': (b'.',),
    'dill._dill _import_module': ('os.system',),
    'dill._dill _create_function': (),
    'dill._dill _create_code': (),
    'dill._dill _create_filehandle': ('{}', 'w', 0, True, None, True, {}, ''),
    'dill._dill _create_type': ('type', 'x', (), {}),
    'dill._dill _get_attr': ('os', 'system'),
    'dill._dill _load_type': ('FunctionType',),
    'dill._dill _eval_repr': ("open('{}', 'w')",),
    'dill._dill _create_lock': (False,),
    'haiku._src.data_structures to_immutable_dict': ({},),
    'jax._src.api jit': ('print',),
    'byol_func.bridge.stand_ins find': ('os', 'system'),
    # A known module, another name; a known name, another module; a path in the name.
    'numpy dtype.__class__': ('f4',),
    'numpy core.multiarray._reconstruct': (),
    'numpy.core.multiarray fromfile': ('/etc/passwd',),
    'numpy.core.multiarray __builtins__': (),
    '_codecs lookup': ('rot13',),
    'os dtype': ('f4',),
    'os ScaleByLarsState': (1,),
}


def _filled(value, canary):
    if isinstance(value, str):
        return value.replace('{}', canary)
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(v, canary) for v in value)
    return value


def code(canary: str) -> dict[str, bytes]:
    """Pickles that run code or touch files when an ordinary unpickler reads them."""
    pickles = {
        name.replace(' ', '.'): dumps(Call(name, _filled(arguments, canary))) for name, arguments in _CALLS.items()
    }
    touch = dumps(f'touch {canary}')[2:-1]
    text = lambda x: b'\x8c' + bytes([len(x)]) + x
    system = global_('posix system')
    pickles |= {
        'stack_global': _PROTO + text(b'posix') + text(b'system') + b'\x93' + touch + b'\x85R.',
        'stack_global_dotted': _PROTO + text(b'numpy') + text(b'os.system') + b'\x93' + touch + b'\x85R.',
        'inst': _PROTO + b'(' + touch + b'iposix\nsystem\n.',
        'obj': _PROTO + b'(' + system + touch + b'o.',
        'newobj': _PROTO + system + touch + b'\x85\x81.',
        'newobj_ex': _PROTO + system + touch + b'\x85}\x92.',
        'protocol_0': b'cposix\nsystem\n(S"touch ' + canary.encode() + b'"\ntR.',
        'persistent_id': b'\x80\x02Pposix.system\n.',
        'binary_persistent_id': _PROTO + touch + b'Q.',
        'extension_registry': b'\x80\x02\x82\x01.',
        'build_attributes': _PROTO + global_('numpy ndarray') + b')R}' + touch + b'K\x01sb.',
        'build_on_a_function': _PROTO + global_('numpy dtype') + b'}b.',
        'setstate_of_a_dict': _PROTO + b'}' + dumps({'__class__': 1})[2:-1] + b'b.',
        'call_a_string': _PROTO + touch + b')R.',
        'call_a_record': dumps(Call('dill._dill _create_namedtuple', ('x', ('a',), 'os')))[:-1]
        + b'K\x01\x85RK\x01\x85R.',
        'namedtuple_of_code': dumps(Call('dill._dill _create_namedtuple', ('x', (1, None), 'os'))),
        'array_by_a_function': _PROTO + global_('dill._dill _create_array') + b'(' + system + touch + b'\x85)tR.',
        'jax_array_by_a_function': _PROTO
        + global_('jax._src.array _reconstruct_array')
        + b'('
        + system
        + touch
        + b'\x85)}tR.',
        'reconstruct_a_function': _PROTO + global_('numpy.core.multiarray _reconstruct') + b'(' + system + b'))tR.',
        'array_with_attributes': _PROTO
        + global_('dill._dill _create_array')
        + b'('
        + global_('numpy ndarray')
        + b'))}'
        + touch
        + touch
        + b'stR.',
        'encode_with_another_codec': dumps(Call('_codecs encode', (canary, 'unicode_escape'))),
        'in_a_valid_container': dumps({'experiment_state': {}, 'step': Call('os system', (f'touch {canary}',))}),
    }
    return pickles


def _array(shape=(2,), dtype='f4', data=b'\0' * 8, state=None) -> bytes:
    """The opcodes of an array as numpy writes it, with any of its parts wrong."""
    body = global_('numpy.core.multiarray _reconstruct') + b'(' + global_('numpy ndarray') + b'K\x00\x85'
    body += b'C\x01btR'
    parts = (
        dumps(shape)[2:-1],
        dumps(Call('numpy dtype', (dtype, False, True)))[2:-1]
        + dumps(state or (3, '<', None, None, None, -1, -1, 0))[2:-1]
        + b'b',
    )
    return body + b'(K\x01' + parts[0] + parts[1] + b'\x89B' + struct.pack('<I', len(data)) + data + b'tb'


def _long(number: int) -> bytes:
    return b'\x8a\x10' + number.to_bytes(16, 'little', signed=True)


def _shaped(*numbers: int) -> bytes:
    whole = _array(shape=(7,))
    return _PROTO + whole.replace(dumps((7,))[2:-1], b'(' + b''.join(map(_long, numbers)) + b't') + b'.'


def memory() -> dict[str, bytes]:
    """Small files that ask for much: memory, or time."""
    key = lambda name: b'X\x01\0\0\0' + name
    memo = lambda opcode, i: opcode + bytes([i])
    # Each holds the one before it twice.
    laughs = b'(]q\0' + b''.join(b'](' + memo(b'h', i) * 2 + b'e' + memo(b'q', i + 1) for i in range(200)) + b't'
    dicts = (
        (b'}(' + key(b'a')) * 200
        + b'}q\0'
        + b''.join(key(b'b') + memo(b'h', i) + b'u' + memo(b'q', i + 1) for i in range(200))
    )
    tuples = b')' + b''.join(b'q' + bytes([i]) + b'h' + bytes([i]) + b'\x86' for i in range(200))
    state = lambda tree: (
        _PROTO
        + b'}('
        + dumps('experiment_state')[2:-1]
        + b'}('
        + b''.join(
            dumps(name)[2:-1] + tree
            for name in ('online_params', 'target_params', 'online_state', 'target_state', 'opt_state')
        )
        + b'u'
        + dumps('step')[2:-1]
        + b'K\x01u.'
    )
    endless = b'}q\0(X\x01\0\0\0ah\0u'
    return {
        'shape_2_to_40': _shaped(2**40),
        'shape_2_to_62_squared': _shaped(2**62, 2**62),
        'shape_times_zero': _shaped(2**62, 0),
        'shape_negative': _shaped(-1, -2),
        'shape_of_bools': _PROTO + _array(shape=(True, 2)) + b'.',
        'shape_of_65_axes': _PROTO + _array(shape=(1,) * 65, data=b'\0' * 4) + b'.',
        'shape_of_text': _PROTO + _array(shape=('a',)) + b'.',
        'text_of_2_to_62_bytes': _PROTO + b'\x8d' + struct.pack('<Q', 2**62) + b'x.',
        'text_of_4_gib': _PROTO + b'X\xff\xff\xff\xffx.',
        'bytes_of_2_to_62_bytes': _PROTO + b'\x8e' + struct.pack('<Q', 2**62) + b'x.',
        'bytes_of_4_gib': _PROTO + b'B\xff\xff\xff\xffx.',
        'bytearray': _PROTO + b'\x96' + struct.pack('<Q', 2**62) + b'x.',
        'long_of_255_bytes': _PROTO + b'\x8a\xff' + b'\x7f' * 255 + b'.',
        'long_of_2_gib': _PROTO + b'\x8b\xff\xff\xff\x7f\x01.',
        'decimal_of_many_digits': b'\x80\x02L' + b'9' * 100_000 + b'L\n.',
        'frame_of_2_to_63_bytes': _PROTO + b'\x95' + struct.pack('<Q', 2**63) + b'}.',
        'memo_at_2_to_32': _PROTO + b'}r\xff\xff\xff\xff.',
        'memo_that_is_empty': _PROTO + b'h\x05.',
        'line_without_end': b'\x80\x02c' + b'a' * 1_000_000,
        'name_of_a_megabyte': b'\x80\x02c' + b'a' * 1_000_000 + b'\nb\n.',
        'billion_laughs_in_lists': state(laughs),
        'billion_laughs_in_tuples': state(tuples),
        'billion_laughs_in_dicts': state(dicts),
        'billion_laughs_as_dtype': dumps(Call('numpy dtype', ('@',))).replace(dumps('@')[2:-1], tuples),
        'billion_laughs_as_key': _PROTO + b'}' + tuples + b'Ns.',
        'billion_laughs_as_pairs': _PROTO + global_('collections OrderedDict') + b']' + tuples + b'N\x86a\x85R.',
        'dict_in_itself': state(endless),
        'list_in_itself': _PROTO + b']q\0h\0a.',
        'marks': _PROTO + b'(' * 400_000 + b'.',
        'tuples_in_tuples': _PROTO + b')' + b'\x85' * 400_000 + b'.',
        'dicts_in_dicts': state(b'}' + b'X\x01\0\0\0a}' * 1000 + b's' * 1000),
        'too_many_opcodes': _PROTO + b'N0' * 300_000 + b'.',
        'five_million_dicts': _PROTO + b'}' * 5_000_000 + b'.',
        'long_named_tuple': dumps(Call('dill._dill _create_namedtuple', ('x', ['a'] * 100_000, 'os'))),
    }


def broken() -> dict[str, bytes]:
    """Pickles that no pickler has written, or of other things than a checkpoint."""
    return {
        'empty': b'',
        'stop_alone': b'.',
        'no_pickle': b'PK\x03\x04' + b'\0' * 100,
        'text': b'hello, world\n',
        'zeros': b'\0' * 1000,
        'no_end': _PROTO + b'}',
        'two_values': _PROTO + b'}}.',
        'more_after_the_end': _PROTO + b'}.}.',
        'protocol_9': b'\x80\x09}.',
        'an_integer': _PROTO + b'K\x01.',
        'a_list': _PROTO + b'].',
        'an_empty_dict': _PROTO + b'}.',
        'no_mark': _PROTO + b'}u.',
        'reduce_of_nothing': _PROTO + b'R.',
        'build_of_nothing': _PROTO + b'b.',
        'append_to_a_dict': _PROTO + b'}K\x01a.',
        'set_in_a_list': _PROTO + b']K\x01K\x01s.',
        'integer_keys': _PROTO + b'}K\x01K\x01s.',
        'unhashable_keys': _PROTO + b'}]K\x01s.',
        'odd_items': _PROTO + b'}(X\x01\0\0\0au.',
        'invalid_utf8': _PROTO + b'\x8c\x02\xff\xfe.',
        'invalid_utf8_in_a_name': b'\x80\x02c\xff\xfe\n\xff\n.',
        'objects': _PROTO + _array(dtype='O8') + b'.',
        'records': _PROTO + _array(dtype='V8') + b'.',
        'texts': _PROTO + _array(dtype='U2') + b'.',
        'dtype_with_fields': _PROTO + _array(state=(3, '|', None, ('a',), {'a': 1}, 8, 1, 0)) + b'.',
        'dtype_state_short': _PROTO + _array(state=(3,)) + b'.',
        'dtype_order_unknown': _PROTO + _array(state=(3, 'x', None, None, None, -1, -1, 0)) + b'.',
        'too_few_bytes': _PROTO + _array(data=b'\0' * 7) + b'.',
        'too_many_bytes': _PROTO + _array(data=b'\0' * 9) + b'.',
        'filled_twice': _PROTO + _array() + b'(K\x01K\x02\x85N\x89Ntb.',
        'array_state_short': _PROTO + global_('numpy ndarray') + b')R(K\x01tb.',
        'array_as_state': dumps({'experiment_state': np.zeros(3), 'step': 1}),
        'state_without_trees': dumps({'experiment_state': {'online_params': {}}, 'step': 1}),
        'namedtuple_too_short': dumps(Call('dill._dill _create_namedtuple', ('x', ('a', 'b'), 'os')))[:-1]
        + b'K\x01\x85R.',
        'encode_a_number': dumps(Call('_codecs encode', (1, 'latin1'))),
        'bytes_of_something': dumps(Call('builtins bytes', (2**30,))),
        'scalar_of_objects': _PROTO + global_('numpy.core.multiarray scalar') + b'NC\x08' + b'\0' * 8 + b'\x86R.',
    }

"""Reads a pickle safely, by interpreting only the opcodes that arrays and containers need.

Python's own unpickler imports and calls anything that a file names, and allocates memory according to numbers
in the file. This interpreter cannot import anything. It knows about forty opcodes, calls only the functions
of `stand_ins`, and leaves long strings in the file until an array needs their bytes: `MAX_OPCODES` bounds
its memory for any file.
"""

import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from byol_func.bridge.stand_ins import Array, Blob, Dtype, PickleError, StandIn, find
from byol_func.errors import counted

# A checkpoint of ResNet-200, width 2, has about 150,000.
MAX_OPCODES = 500_000
_EAGER = 1024  # Bytes; longer strings are left in the file.
_LONGEST_NAME = 256  # Bytes in the name of a module or a class.


def load(file: BinaryIO) -> Any:
    """Loads a pickle of protocol 2 to 5 as dicts, lists, tuples, `Record`s and `Array`s.

    Args:
      file: a seekable binary file, open for reading; `Array.read` needs it afterwards.

    Returns:
      Plain containers, whose arrays are not read yet.

    Raises:
      PickleError: the file is truncated or damaged, or holds anything but arrays in plain containers.
    """
    machine = _Machine(file)
    try:
        return machine.run()
    except PickleError as error:
        raise PickleError(f'byte {machine.position}: {error}') from None
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error, RecursionError) as error:
        # Such an error means a sequence of opcodes that no valid pickle contains.
        raise PickleError(f'byte {machine.position}: damaged (no pickle goes on like this)') from error


class _Machine:
    """The pickle machine: the stack, the stacks below the marks, and the memo."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._end = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.position = 0

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self._read(1)
            if code == b'.':
                (value,) = self._stack
                if self._below or self.position != self._end:
                    raise PickleError('damaged (more follows after its end)')
                return value
            handler = _HANDLERS.get(code)
            if handler is None:
                raise PickleError(f'opcode {code!r}, which arrays and plain containers do not need')
            handler(self)
        raise PickleError(f'more than {MAX_OPCODES} opcodes')

    # --- Reading ----------------------------------------------------------------------------------

    def _read(self, length: int) -> bytes:
        self._check_left(length)
        self.position += length
        return self._file.read(length)

    def _check_left(self, length: int) -> None:
        left = self._end - self.position
        if length > left:
            raise PickleError(f'truncated ({counted(length, "byte")} expected, {left} left)')

    def _number(self, layout: str) -> Any:
        (number,) = struct.unpack(layout, self._read(struct.calcsize(layout)))
        return number

    def _line(self) -> str:
        line = self._file.readline(_LONGEST_NAME)
        self.position += len(line)
        if not line.endswith(b'\n'):
            raise PickleError('a name without an end')
        return line[:-1].decode()

    def _string(self, length_layout: str, is_text: bool) -> str | bytes | Blob:
        length = self._number(length_layout)
        if length <= _EAGER:
            data = self._read(length)
            return data.decode('utf-8', 'surrogatepass') if is_text else data
        blob = Blob(self.position, length, is_text)
        self._check_left(length)
        self.position = self._file.seek(self.position + length)
        return blob

    # --- Opcodes ----------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_many(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise PickleError('damaged (nothing left on the stack)')
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return values

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError('items are added to something that is not a list')
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        keys = values[::2]
        if type(target) is not dict:
            raise PickleError('items are set in something that is not a dict')
        if len(values) % 2 or not all(type(key) is str for key in keys):
            raise PickleError('a dict whose keys are not strings')
        target.update(zip(keys, values[1::2], strict=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError('a class whose name is not a string')
        self._push(find(module, name))

    def _reduce(self) -> None:
        function, arguments = self._pop_many(2)
        if not isinstance(function, StandIn) or type(arguments) is not tuple:
            raise PickleError('a call of an unknown function')
        self._push(function.call(*arguments))

    def _build(self) -> None:
        target, state = self._pop_many(2)
        if not isinstance(target, (Array, Dtype)):
            raise PickleError(f'a state for {type(target).__name__}, which takes none')
        target.build(state)
        self._push(target)

    def _frame(self) -> None:
        self._read(8)  # The length of the frame, which is only a hint for buffering.

    def _proto(self) -> None:
        protocol = self._read(1)[0]
        if not 2 <= protocol <= 5:
            raise PickleError(f'protocol {protocol}, expected 2 to 5')

    def _long(self) -> None:
        length = self._read(1)[0]
        if length > 16:
            raise PickleError(f'an integer of {counted(length, "byte")}')
        self._push(int.from_bytes(self._read(length), 'little', signed=True))


def _pushes(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(value(machine))


# The opcodes are documented in pickletools.
_HANDLERS: dict[bytes, Callable[[_Machine], None]] = {
    b'\x80': _Machine._proto,
    b'\x95': _Machine._frame,
    b'(': _Machine._mark,
    b'N': _pushes(lambda m: None),
    b'\x88': _pushes(lambda m: True),
    b'\x89': _pushes(lambda m: False),
    b'J': _pushes(lambda m: m._number('<i')),
    b'K': _pushes(lambda m: m._number('<B')),
    b'M': _pushes(lambda m: m._number('<H')),
    b'\x8a': _Machine._long,
    b'G': _pushes(lambda m: m._number('>d')),
    b'X': _pushes(lambda m: m._string('<I', True)),
    b'\x8c': _pushes(lambda m: m._string('<B', True)),
    b'\x8d': _pushes(lambda m: m._string('<Q', True)),
    b'B': _pushes(lambda m: m._string('<I', False)),
    b'C': _pushes(lambda m: m._string('<B', False)),
    b'\x8e': _pushes(lambda m: m._string('<Q', False)),
    b')': _pushes(lambda m: ()),
    b'\x85': _pushes(lambda m: tuple(m._pop_many(1))),
    b'\x86': _pushes(lambda m: tuple(m._pop_many(2))),
    b'\x87': _pushes(lambda m: tuple(m._pop_many(3))),
    b't': _pushes(lambda m: tuple(m._pop_to_mark())),
    b']': _pushes(lambda m: []),
    b'a': lambda m: m._append(m._pop_many(1)),
    b'e': lambda m: m._append(m._pop_to_mark()),
    b'}': _pushes(lambda m: {}),
    b's': lambda m: m._set_items(m._pop_many(2)),
    b'u': lambda m: m._set_items(m._pop_to_mark()),
    b'q': lambda m: m._put(m._number('<B')),
    b'r': lambda m: m._put(m._number('<I')),
    b'\x94': lambda m: m._put(len(m._memo)),
    b'h': _pushes(lambda m: m._memo[m._number('<B')]),
    b'j': _pushes(lambda m: m._memo[m._number('<I')]),
    b'c': lambda m: m._global(m._line(), m._line()),
    b'\x93': lambda m: m._global(*m._pop_many(2)),
    b'R': _Machine._reduce,
    b'\x81': _Machine._reduce,
    b'b': _Machine._build,
}

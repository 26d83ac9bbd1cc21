"""Malicious and malformed checkpoints are refused: nothing runs, nothing is read, memory stays small.

`python -m pytest tests/test_evil_pickles.py -k refused` counts the malicious files in its last line.
"""

import subprocess
import sys
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

import evil_pickles
from byol_func.bridge.official import read
from byol_func.errors import UserError
from cli import ROOT
from golden_io import DIRECTORY

TRUE = (DIRECTORY / 'official_checkpoint.pkl').read_bytes()
# Beside the file's own size: what the opcodes may leave behind, at most MAX_OPCODES small objects.
MEMORY = 100 * 2**20
_EVIL = {
    **{f'code-{name}': data for name, data in evil_pickles.code('CANARY').items()},
    **{f'memory-{name}': data for name, data in evil_pickles.memory().items()},
    **{f'broken-{name}': data for name, data in evil_pickles.broken().items()},
}


def _refused(data, tmp_path):
    """The message with which a file is refused, in one line that names the file."""
    path = tmp_path / 'evil.pkl'
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f'--checkpoint={path}: ') and '\n' not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize('data', _EVIL.values(), ids=_EVIL)
def test_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Where the canary would be.
    tracemalloc.start()
    try:
        _refused(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ['evil.pkl']
    assert peak < MEMORY


def test_the_attacks_are_real(tmp_path, monkeypatch):
    """Python's own unpickler falls for them, so their refusal means something."""
    import pickle

    monkeypatch.chdir(tmp_path)
    caught = 0
    for name in ('os.system', 'posix.system', 'builtins.open', 'builtins.exec', 'stack_global', 'inst', 'obj'):
        data = _EVIL[f'code-{name}']
        pickle.loads(data)
        caught += (tmp_path / 'CANARY').exists()
        (tmp_path / 'CANARY').unlink(missing_ok=True)
    assert caught == 7


def test_truncated_anywhere(tmp_path):
    for length in [*range(600), *range(600, len(TRUE), 4999), len(TRUE) - 1]:
        _refused(TRUE[:length], tmp_path)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.lists(st.tuples(st.integers(0, len(TRUE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes(tmp_path, flips):
    """A byte of a number changes that number, any other one is found out; nothing else happens."""
    data = bytearray(TRUE)
    for position, value in flips:
        data[position] = value
    path = tmp_path / 'flipped.pkl'
    path.write_bytes(data)
    try:
        official = read(path)
    except UserError as error:
        assert '\n' not in str(error)
    else:
        sound = read(DIRECTORY / 'official_checkpoint.pkl')
        shapes = lambda checkpoint: {
            (name, key): value.shape for name, tree in checkpoint.trees.items() for key, value in tree.items()
        }
        assert len(shapes(official)) == len(shapes(sound))
    assert [path.name for path in tmp_path.iterdir()] == ['flipped.pkl']


_OPCODES = b'(.})]Nacehjqrsutb\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95BCGJKMRXX'
_FRAGMENTS = [
    *(bytes([code]) for code in _OPCODES),
    b'cnumpy\ndtype\n',
    b'cnumpy\nndarray\n',
    b'cnumpy.core.multiarray\n_reconstruct\n',
    b'c_codecs\nencode\n',
    b'cdill._dill\n_create_namedtuple\n',
    b'cdill._dill\n_create_array\n',
    b'ccollections\nOrderedDict\n',
    b'cos\nsystem\n',
    b'X\x02\0\0\0f4',
    b'X\x06\0\0\0latin1',
    b'K\x01',
    b'h\0',
]


@hypothesis.settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.lists(st.sampled_from(_FRAGMENTS), max_size=40), st.binary(max_size=20))
def test_random_opcodes(tmp_path, fragments, tail):
    _refused(b'\x80\x04' + b''.join(fragments) + tail, tmp_path)


def test_a_process_with_little_memory_survives_them(tmp_path):
    """The kernel counts here: 200 MiB beyond what the interpreter and torch take."""
    for name, data in _EVIL.items():
        if name.startswith('memory-'):
            (tmp_path / f'{name}.pkl').write_bytes(data)
    script = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(ROOT)!r})
from byol_func.bridge import official
from byol_func.errors import UserError
size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
for path in sorted(pathlib.Path('.').glob('memory-*.pkl')):
    try:
        official.read(path)
    except UserError:
        print(path.stem)
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(name for name in _EVIL if name.startswith('memory-'))

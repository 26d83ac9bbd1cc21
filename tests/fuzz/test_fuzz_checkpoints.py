"""Whatever a file holds: exactly what was saved, or one line that says why not. Random configs likewise."""

import json
import pathlib
import string

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byol_func.errors import UserError
from byol_func.utils import checkpointing

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_QUICK = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def _tensors(draw) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    numbers = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    tensor = (numbers / 7).to(draw(st.sampled_from(_DTYPES)))
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


_NAMES = st.text(string.ascii_letters + string.digits + '_.~ "\\é', min_size=1, max_size=6)
_TREES = st.recursive(
    _tensors(),
    lambda inner: st.dictionaries(_NAMES, inner, min_size=1, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)


def _save(folder: pathlib.Path, tree, **other) -> pathlib.Path:
    facts = dict(mode='pretrain', step=3, config={'a': [1, None, 'x"0"'], 'b': {}}, scalars={'loss': 0.5})
    return checkpointing.save(folder, tree, **{**facts, **other})


@_QUICK
@given(
    tree=_TREES,
    step=st.integers(0, 10**9),
    config=st.dictionaries(_NAMES, st.none() | st.text() | st.floats(allow_nan=False) | st.lists(st.integers())),
)
def test_any_tree_comes_back(tmp_path, tree, step, config):
    if isinstance(tree, torch.Tensor):
        tree = {'leaf': tree}
    checkpoint = checkpointing.load(_save(tmp_path, tree, step=step, config=config))
    assert (checkpoint.mode, checkpoint.step, checkpoint.config) == ('pretrain', step, config)
    assert checkpoint.scalars == {'loss': 0.5}
    import optree

    restored = checkpointing.restore(checkpoint, optree.tree_map(torch.zeros_like, tree))
    for expected, actual in zip(optree.tree_leaves(tree), optree.tree_leaves(restored), strict=True):
        assert expected.dtype == actual.dtype and torch.equal(expected, actual)


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
    """A checkpoint of a few hundred bytes of tensors."""
    tree = {'w': torch.arange(20.0), 'n': {'counter': torch.tensor(7)}, 'half': torch.ones(3, dtype=torch.bfloat16)}
    return _save(tmp_path_factory.mktemp('saved'), tree)


def _refused(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    for read in (checkpointing.load, checkpointing.load_scalars):
        try:
            read(path)
        except UserError as error:
            assert str(error).startswith(f'--checkpoint={path}: ') and len(str(error)) < 600
        else:
            assert read is checkpointing.load_scalars, 'damage was not noticed'


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << i % 8
        _refused(tmp_path / 'damaged', bytes(damaged))


@settings(_QUICK, max_examples=300)
@given(data=st.data())
def test_random_damage_is_noticed(saved, tmp_path, data):
    content = saved.read_bytes()
    position = st.integers(0, len(content) - 1)
    kind = data.draw(st.sampled_from(['cut', 'bytes', 'grown', 'swapped', 'inserted', 'other', 'zeros']))
    if kind == 'cut':
        damaged = content[: data.draw(position)]
    elif kind == 'bytes':
        damaged = bytearray(content)
        for i in data.draw(st.lists(position, min_size=1, max_size=20)):
            damaged[i] = data.draw(st.integers(0, 255))
    elif kind == 'grown':
        damaged = content + data.draw(st.binary(min_size=1, max_size=50))
    elif kind == 'swapped':
        i = data.draw(position)
        damaged = content[i:] + content[:i]
    elif kind == 'inserted':
        i = data.draw(position)
        damaged = content[:i] + data.draw(st.binary(min_size=1, max_size=9)) + content[i:]
    elif kind == 'zeros':
        i = data.draw(position)
        damaged = content[:i] + bytes(len(content) - i)
    else:
        damaged = data.draw(st.binary(max_size=200))
    if bytes(damaged) != content:
        _refused(tmp_path / 'damaged', bytes(damaged))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@settings(_QUICK, max_examples=150)
@given(header=st.dictionaries(st.sampled_from(['__metadata__', 'w', 'format_version']), _JSON) | _JSON)
def test_any_header_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    _refused(tmp_path / 'made', len(text).to_bytes(8, 'little') + text + bytes(80))


_FIELDS = ('format_version', 'mode', 'step', 'config', 'scalars', 'class_names')


@settings(_QUICK, max_examples=150)
@given(
    changes=st.dictionaries(
        st.sampled_from(_FIELDS),
        st.none()
        | st.text(max_size=8)
        | st.sampled_from(['2', '1', '-1', '1e3', '[]', '{}', '[' * 5000, 'null', '{"a": 1}']),
    )
)
def test_foreign_files_with_a_true_checksum(tmp_path, changes):
    """Somebody else's idea of the format, or one of ours before classes had names: read as it says, or refused."""
    metadata = dict(format_version='2', mode='pretrain', step='3', config='{}', scalars='{}')
    metadata = {name: value for name, value in {**metadata, **changes}.items() if value is not None}
    content = safetensors.torch.save({'w': torch.ones(2)}, {**metadata, 'digest': checkpointing._NO_DIGEST})
    path = tmp_path / 'foreign'
    path.write_bytes(b''.join(checkpointing._with_digest(memoryview(content))))
    try:
        checkpoint = checkpointing.load(path)
    except UserError:
        assert changes
    else:
        assert checkpoint.step == int(metadata['step']) >= 0
        assert checkpoint.mode == metadata['mode'] and checkpoint.config == json.loads(metadata['config'])
        assert torch.equal(checkpoint.tensors['w'], torch.ones(2))


@_QUICK
@given(tree=_TREES, other=_TREES)
def test_a_tree_that_does_not_fit_is_refused(tmp_path, tree, other):
    tree, other = ({'leaf': t} if isinstance(t, torch.Tensor) else t for t in (tree, other))
    checkpoint = checkpointing.load(_save(tmp_path, tree))
    try:
        checkpointing.restore(checkpoint, other)
    except UserError as error:
        assert 'does not fit the config' in str(error)
    else:
        shapes = lambda t: dict(
            zip(checkpointing.leaf_names(t), ((x.shape, x.dtype) for x in _leaves(t)), strict=False)
        )
        assert shapes(tree) == shapes(other)


def _leaves(tree):
    import optree

    return optree.tree_leaves(tree)

"""The bridge to the official checkpoints: a true one, older forms, every encoder, and back."""

import re

import optree
import pytest
import torch
from test_golden_byol_update import _Official, _trees

from byol_func.bridge import haiku
from byol_func.bridge.official import _template, read, to_state, write
from byol_func.errors import UserError
from byol_func.utils import checkpointing
from configs import byol
from golden_io import (
    BYOL_LOGS,
    BYOL_STATES,
    DIRECTORY,
    OUTPUTS,
    assert_close,
    assert_norms_close,
    assert_trees_close,
    below,
    flatten,
    images,
    limit,
    load,
    tensor,
    tree,
)
from old_pickles import Form, checkpoint

PATH = DIRECTORY / 'official_checkpoint.pkl'
GOLDEN = 'byol_update.npz'
TREES = ('online_params', 'target_params', 'online_state', 'target_state')


def _network(official):
    """`config.network` for an official checkpoint."""
    network = byol.get_config().network.to_dict()
    return network | {k: v for k, v in official.network.items() if k != 'num_classes'}


def _imported(path):
    official = read(path)
    return to_state(official, _network(official)), official


def test_a_true_checkpoint_is_the_recorded_state_bit_for_bit():
    state, official = _imported(PATH)
    data = load(GOLDEN)
    # The official loop numbers updates from 0, the golden file from 1.
    where = f'step{official.step + 1}'
    assert official.step == data[f'{where}/global_step']
    for group, actual in _trees(state).items():
        assert_trees_close(actual, tree(data, f'{where}/{group}'), 0, group)


def test_imported_networks_give_the_official_outputs():
    state, official = _imported(PATH)
    expected = load('official_checkpoint_outputs.npz')
    inputs = {'images': images(expected['images'])}
    network = _Official(GOLDEN).network
    for name, params, averages in (
        ('online', state.online_params, state.online_state),
        ('target', state.target_params, state.target_state),
    ):
        outputs, _ = network.apply(params, averages, inputs, is_training=False)
        stored = below(expected, name)
        assert len(stored) == 3
        for key, value in stored.items():
            assert_close(outputs[key], tensor(value), limit(OUTPUTS, torch.float32), f'{name}/{key}')


def test_training_goes_on_as_the_official_one_did():
    """In float64, in which nothing hides behind rounding; the same chain as in the golden test."""
    state, official = _imported(PATH)
    state = optree.tree_map(lambda x: x.double() if x.is_floating_point() else x, state)
    recorded = _Official(GOLDEN)
    data, steps = recorded.data, recorded.config['steps']
    assert steps > official.step + 1
    for update in range(official.step + 2, steps + 1):
        global_step = torch.tensor(update - 1)
        batch = recorded.batch(update, torch.float64, slice(None))
        state, logs = recorded.update_fn(state, global_step, None, batch)
        for key, value in below(data, f'step{update}/logs').items():
            assert_close(logs[key], tensor(value), limit(BYOL_LOGS, torch.float64), f'step{update}/{key}')
        assert_norms_close(
            _trees(state),
            data['norm_keys'],
            data[f'step{update}/norms'],
            limit(BYOL_STATES, torch.float64),
            f'step{update}',
        )


# --- Older forms --------------------------------------------------------------------------------------


def _haiku_trees(state, encoder_class):
    root = haiku.class_root(encoder_class)

    def haiku_tree(values):
        leaves = zip(checkpointing.leaf_names(values), optree.tree_leaves(values), strict=True)
        return haiku.haiku_tree(dict(leaves), root)

    return {name: haiku_tree(getattr(state, name)) for name in TREES}, haiku_tree(state.opt_state[1].mu)


_FORMS = {
    'dicts': Form(),
    'flat_mapping_2020': Form(mapping='haiku._src.data_structures FlatMapping'),
    'frozendict': Form(
        mapping='haiku._src.data_structures frozendict', tuples='class', empty_state=('optax.transform', 'ScaleState')
    ),
    'tuples_by_class': Form(
        tuples='class',
        experiment_module='deepmind_research.byol.byol_experiment',
        empty_state=('optax._src.base', 'EmptyState'),
    ),
    'device_array': Form(array='jax.interpreters.xla DeviceArray', step_is_array=True),
    'device_array_of_jaxlib': Form(array='jaxlib.xla_extension DeviceArray'),
    'jax_2022': Form(jax_reduce='jax._src.device_array reconstruct_device_array'),
    'jax_2025': Form(jax_reduce='jax._src.array _reconstruct_array', numpy_module='numpy._core.multiarray'),
    'fortran': Form(fortran=True),
    'big_endian': Form(big_endian=True),
}


@pytest.mark.parametrize('form', _FORMS.values(), ids=_FORMS)
def test_older_forms_hold_the_same_state(form, tmp_path):
    state, official = _imported(PATH)
    path = tmp_path / 'old.pkl'
    path.write_bytes(checkpoint(*_haiku_trees(state, 'TinyResNet'), official.step, form))
    old, again = _imported(path)
    assert again.step == official.step
    for where, value in flatten(_trees(old)).items():
        assert torch.equal(value, flatten(_trees(state))[where]), where


# --- Every encoder, and back ----------------------------------------------------------------------------


def _random_state(network, num_classes, seed=0):
    """A state with other numbers in every leaf."""
    state = _template(network, num_classes, 3)
    rng = torch.Generator().manual_seed(seed)
    draw = lambda x: (
        torch.randn(x.shape, generator=rng)
        if x.is_floating_point()
        else torch.randint(1, 99, x.shape, generator=rng, dtype=x.dtype)
    )
    return optree.tree_map(draw, state)


def _config_network(encoder_class, **options):
    network = byol.get_config().network.to_dict()
    network['encoder_class'] = encoder_class
    network['encoder_config'] |= options
    return network | dict(projector_hidden_size=24, projector_output_size=5, predictor_hidden_size=17)


@pytest.mark.parametrize(
    'encoder_class, options',
    [
        ('TinyResNet', {}),
        ('TinyResNet', dict(resnet_v2=True, width_multiplier=2.0)),
        ('ResNet18', {}),
        ('ResNet18', dict(resnet_v2=True)),
        ('ResNet50', {}),
    ],
)
def test_round_trip_is_exact_and_tells_the_network(encoder_class, options, tmp_path):
    network = _config_network(encoder_class, **options)
    state = _random_state(network, num_classes=13)
    path = tmp_path / 'pretrain.pkl'
    write(path, state, step=77, network=network)
    official = read(path)
    again = to_state(official, network)
    assert official.step == 77
    assert official.network['num_classes'] == 13
    assert _network(official) | {'bn_config': network['bn_config']} == network
    assert checkpointing.leaf_names(again) == checkpointing.leaf_names(state)
    assert all(map(torch.equal, optree.tree_leaves(again), optree.tree_leaves(state)))


@pytest.mark.parametrize('depth, width', [(101, 1.0), (152, 1.0), (200, 2.0)])
def test_large_encoders_are_told_by_their_structure(depth, width):
    """All published encoders and their official siblings, by shapes alone: the tensors have no memory."""
    network = _config_network(f'ResNet{depth}', width_multiplier=width)
    params = _shapes_only(network)
    found = haiku.infer_network(params)
    assert {k: found[k] for k in ('encoder_class', 'encoder_config')} == {
        k: network[k] for k in ('encoder_class', 'encoder_config')
    }


def _shapes_only(network):
    from byol_func.runtime import layers
    from byol_func.utils import networks

    original = layers.truncated_normal
    layers.truncated_normal = lambda generator, shape, fan_in: torch.empty(shape, device='meta')
    try:
        encoder = networks.make_encoder(network['encoder_class'], network['encoder_config'], network['bn_config'])
        params = {'encoder': encoder.init(None)[0]}
        for name, size in (('projector', encoder.output_size), ('predictor', 5)):
            params[name] = networks.MLP(size, 24, 5).init(None)[0]
        params['classifier'] = networks.linear_init(None, encoder.output_size, 13)
    finally:
        layers.truncated_normal = original
    return dict(zip(checkpointing.leaf_names(params), optree.tree_leaves(params), strict=True))


@pytest.mark.parametrize(
    'encoder_class, options, message',
    [
        ('ResNet10', {}, "config.network.encoder_class='ResNet10'"),
        ('TinyResNet', dict(stem='cifar'), "config.network.encoder_config.stem='cifar'"),
        ('TinyResNet', dict(width_multiplier=0.5), 'config.network.encoder_config.width_multiplier=0.5'),
    ],
)
def test_networks_that_the_official_code_does_not_have_are_not_exported(encoder_class, options, message, tmp_path):
    network = _config_network(encoder_class, **options)
    with pytest.raises(UserError, match=message):
        write(tmp_path / 'x.pkl', _random_state(network, 3), step=0, network=network)
    assert not list(tmp_path.iterdir())


# --- What does not fit ----------------------------------------------------------------------------------


def _changed(change):
    """The true checkpoint's trees after a change, as a file's bytes."""
    state, official = _imported(PATH)
    trees, momentum = _haiku_trees(state, 'TinyResNet')
    change(trees, momentum)
    return checkpoint(trees, momentum, official.step, Form())


def _drop(trees, momentum):
    del trees['target_params']['tiny_res_net/~/block_group_2/~/block_0/~/conv_0']


def _add(trees, momentum):
    trees['online_state']['extra/~/mean_ema'] = dict(trees['online_state']['projector/batch_norm/~/mean_ema'])


def _reshape(trees, momentum):
    weights = trees['target_params']['predictor/linear_1']
    weights['w'] = weights['w'][:, :7]


def _not_finite(trees, momentum):
    trees['online_params']['classifier']['b'][3] = float('nan')


def _no_momentum(trees, momentum):
    momentum.clear()


def _float64(trees, momentum):
    trees['online_params']['classifier']['w'] = trees['online_params']['classifier']['w'].astype('f8')


def _other_encoder(trees, momentum):
    params = trees['online_params']
    params['vit/~/patches'] = params.pop('tiny_res_net/~/initial_conv')


_TRUE = read(PATH)
_PREDICTOR, _OUTPUT = (_TRUE.network[key] for key in ('predictor_hidden_size', 'projector_output_size'))
_CLASSES = _TRUE.network['num_classes']
_CLASSIFIER = re.escape(str(list(_TRUE.trees['online_params']['classifier/w'].shape)))


@pytest.mark.parametrize(
    'change, message',
    [
        (_drop, 'it has no target_params/encoder/block_group_2/block_0/conv_0/w, which TinyResNet of width 1 has'),
        (_add, 'it has online_state/extra/mean_ema/average, which TinyResNet of width 1 lacks'),
        (
            _reshape,
            rf'linear_1/w is \[{_PREDICTOR}, 7\] torch.float32, expected \[{_PREDICTOR}, {_OUTPUT}\]',
        ),
        (_not_finite, 'classifier/b: expected finite numbers'),
        (_no_momentum, 'the momentum in its opt_state does not match the parameters'),
        (_float64, rf'online_params/classifier/w is {_CLASSIFIER} torch.float64, expected {_CLASSIFIER} torch.float32'),
        (_other_encoder, 'the momentum in its opt_state does not match the parameters'),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    path = tmp_path / 'changed.pkl'
    path.write_bytes(_changed(change))
    with pytest.raises(UserError, match=message) as error:
        _imported(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)

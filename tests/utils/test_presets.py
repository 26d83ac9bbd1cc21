"""Augmentation presets: the named ones, the switch on the command line, and whatever else may be asked for."""

import copy
import json
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byol_func.errors import UserError
from byol_func.training import resuming
from byol_func.utils import augmentations, sampling
from cli import config, run_launch, succeed, tiny_digits
from configs import augmentations as presets_config
from configs import byol, cifar10, cifar100, digits, emnist, folder, imagenette, linear_evaluation, stl10, tiny_imagenet
from runs import records

VIEWS = ('view1', 'view2')
OPERATIONS = ('random_crop', 'color_transform', 'gaussian_blur', 'solarize')


def _views(presets, images: torch.Tensor, image_size: int, seed: int = 0):
    """Draws and views of both views, as in training."""
    rngs = [torch.Generator().manual_seed(seed + view) for view in (1, 2)]
    draws = sampling.sample_pair(*rngs, len(images), presets, tuple(images.shape[2:]))
    inputs = {'images': images, 'labels': torch.zeros(len(images))}
    return draws, augmentations.postprocess(inputs, draws, presets, image_size)


def test_named_presets_are_valid_and_of_their_own():
    for name, make in presets_config.PRESETS.items():
        presets = make()
        sampling.validate_presets(presets)
        sampling.validate_view(presets_config.crop_and_flip(presets), 'config.linear_eval.augmentations')
        presets['view1']['random_crop']['min_area'] = 0.99
        presets['view2']['color_transform']['hue'] = 0.01
        assert make() != presets, f'{name} hands out the same dicts again'
    assert presets_config.official() == sampling.AUGMENT_CONFIG


def test_presets_do_what_they_are_for():
    images = torch.randint(0, 256, (64, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws, views = _views(presets_config.none(), images, 24)
    for view in VIEWS:
        torch.testing.assert_close(views[view], images / 255.0)
    draws, _ = _views(presets_config.glyphs(), images, 24)
    for view in VIEWS:
        assert not draws[view].flip.any() and not draws[view].grayscale.any() and not draws[view].solarize.any()
        assert (draws[view].saturation == 1).all() and (draws[view].hue == 0).all()
        assert (draws[view].crop[:, 2] * draws[view].crop[:, 3]).min() > 0.35 * 24 * 24
    draws, _ = _views(presets_config.cifar(), images, 24)
    official, _ = _views(presets_config.official(), images, 24)
    for view in VIEWS:
        assert not draws[view].blur.any()
        assert all(
            getattr(draws[view], name).equal(getattr(official[view], name))
            for name in draws[view]._fields
            if name != 'blur'
        )


def test_configs_take_the_preset_they_name():
    assert byol.get_config().augmentations.to_dict() == presets_config.official()
    assert cifar10.get_config().augmentations.to_dict() == presets_config.cifar()
    for own in (digits.get_config(), emnist.get_config()):
        assert own.augmentations_preset == 'glyphs'
        assert own.augmentations.to_dict() == presets_config.glyphs()
        for protocol in ('linear_eval', 'fine_tune'):
            view = own[protocol].augmentations.to_dict()
            assert not view['random_flip'] and view['random_crop']['min_area'] == 0.4
            assert not any(view[name]['apply_prob'] for name in OPERATIONS[1:])


def test_the_official_config_cuts_views_from_whole_images_and_the_others_keep_theirs_in_memory():
    of = lambda config: (config.dataset.source_size, config.dataset.max_gib)
    assert of(byol.get_config()) == (0, 0.0)
    for module in (cifar10, cifar100, digits, emnist, stl10, tiny_imagenet):
        assert of(module.get_config()) == (0, 16.0)
    assert of(folder.get_config()) == of(imagenette.get_config()) == (160, 16.0)


def test_evaluation_protocols_of_the_official_config_are_the_official_ones():
    """Crop and flip, nothing else."""
    for protocol in ('linear_eval', 'fine_tune'):
        view = byol.get_config()[protocol].augmentations.to_dict()
        assert view['random_flip'] and view['random_crop'] == sampling.AUGMENT_CONFIG['view1']['random_crop']
        assert not any(view[name]['apply_prob'] for name in OPERATIONS[1:])


def test_preset_on_the_command_line_and_single_fields_beside_it(tmp_path):
    """In any order; the fields of the config file give way, those of the command line stay."""
    resolved = []
    for turn in (1, -1):
        flags = [
            '--config.augmentations_preset=official',
            '--config.augmentations.view1.solarize.apply_prob=0.5',
            '--config.augmentations.view2.color_transform.semantics=torchvision',
            '--config.linear_eval.augmentations.random_flip=False',
        ][::turn]
        workdir = tmp_path / str(turn)
        argv = [*tiny_digits(batch_size=1024, preview__num_images=0), *flags, f'--workdir={workdir}']
        succeed(*argv, cwd=tmp_path)
        resolved.append(json.loads((workdir / 'config.json').read_text()))
        assert not (workdir / 'augmentations.png').exists()
    expected = presets_config.official()
    expected['view1']['solarize']['apply_prob'] = 0.5
    expected['view2']['color_transform']['semantics'] = 'torchvision'
    assert resolved[0] == resolved[1] and resolved[0]['augmentations'] == expected
    assert not resolved[0]['linear_eval']['augmentations']['random_flip']
    assert resolved[0]['fine_tune']['augmentations']['random_flip']


def test_linear_evaluation_presets():
    config = byol.get_config()
    before = config.to_dict()
    linear_evaluation.use(config, 'official')
    assert config.to_dict() == before
    linear_evaluation.use(config, 'constant')
    changed = resuming.differences(before, config.to_dict(), ())
    assert changed == {
        'linear_eval_preset': ('official', 'constant'),
        'linear_eval.num_epochs': (80, 25),
        'linear_eval.lr_schedule.name': ('cosine', 'constant'),
        'linear_eval.lr_schedule.base_learning_rate': (0.2, 0.1),
    }
    for make in (cifar10, cifar100):  # Their own data; the same protocol.
        adam = make.get_config('adam')
        assert adam.linear_eval_preset == 'constant' and adam.linear_eval.batch_size == 256
        assert adam.linear_eval.lr_schedule == config.linear_eval.lr_schedule and adam.linear_eval.num_epochs == 25


def test_linear_evaluation_preset_on_the_command_line_and_single_fields_beside_it(tmp_path):
    """Of any config; a preset of its own, such as epochs, gives way."""
    beside = dict(linear_eval__num_epochs=2, linear_eval__sweep__weight_decays='(0.0,0.1)')
    argv = tiny_digits(batch_size=1024, final_linear_eval=True, linear_eval__compare_untrained=False, **beside)
    succeed(*argv, '--config.linear_eval_preset=constant', f'--workdir={tmp_path}', cwd=tmp_path)
    resolved = json.loads((tmp_path / 'config.json').read_text())['linear_eval']
    assert resolved['num_epochs'] == 2 and resolved['sweep']['weight_decays'] == [0.0, 0.1]
    assert resolved['lr_schedule'] == dict(name='constant', base_learning_rate=0.1, warmup_epochs=0.0)
    assert resolved['batch_size'] == 256 and resolved['cache_features']  # Not the preset's business.
    rates = records(tmp_path)
    rates = {line['learning_rate'] for line in rates if line['mode'] == 'linear_eval'}
    assert rates == {float(torch.tensor(0.1))}


def test_wrong_presets_on_the_command_line(tmp_path):
    own = tmp_path / 'own.py'
    own.write_text(
        'from configs import digits\n\n\ndef get_config():\n    config = digits.get_config()\n'
        '    config.augmentations_preset = "letters"\n    return config\n'
    )
    field = 'config.augmentations.view2.gaussian_blur'
    for argv, *fragments in (
        (tiny_digits(augmentations_preset='svhn'), "augmentations_preset='svhn'", 'official, cifar, glyphs, none'),
        (tiny_digits(linear_eval_preset='short'), "linear_eval_preset='short'", 'official, constant'),
        ([f'--config={own}'], "augmentations_preset='letters'", 'official, cifar, glyphs, none'),
        (tiny_digits(augmentations__view2__gaussian_blur__sigma=1), f'--{field}.sigma: unknown', 'sigma_max'),
        (tiny_digits(augmentations__view3__random_flip=True), '--config.augmentations.view3: unknown', 'view1'),
        (tiny_digits(augmentations__view2__gaussian_blur__sigma_min=9), f'{field}.sigma_min=9', 'sigma_max=2.0'),
        (tiny_digits(augmentations__view1__color_transform__semantics='simclr'), "semantics='simclr'", 'torchvision'),
        ([*config('folder.py', dataset__root=tmp_path), '--config.augmentations=none'], '--config.augmentations=none'),
    ):
        outcome = run_launch(*argv, '--mode=preview', '--workdir=run', cwd=tmp_path)
        assert outcome.code == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
        error = outcome.stderr.splitlines()[-1]
        assert error.startswith('Error: ') and all(fragment in error for fragment in fragments), error
    assert not (tmp_path / 'run').exists()


# --- Whatever may be asked for -----------------------------------------------------------------

_PROBABILITY = st.floats(0, 1)
_ASPECT, _SIGMA = st.floats(0.01, 100), st.floats(0.01, 1000)


@st.composite
def _in_order(draw, values):
    return sorted((draw(values), draw(values)))


@st.composite
def _valid_view(draw) -> dict:
    """Any presets within the ranges."""
    area = draw(_in_order(st.floats(0, 1, exclude_min=True)))
    aspect, sigma = draw(_in_order(_ASPECT)), draw(_in_order(_SIGMA))
    return dict(
        random_crop=dict(
            apply_prob=draw(_PROBABILITY),
            min_area=area[0],
            max_area=area[1],
            min_aspect=aspect[0],
            max_aspect=aspect[1],
        ),
        random_flip=draw(st.booleans()),
        color_transform=dict(
            apply_prob=draw(_PROBABILITY),
            brightness=draw(_PROBABILITY),
            contrast=draw(_PROBABILITY),
            saturation=draw(_PROBABILITY),
            hue=draw(st.floats(0, 0.5)),
            color_jitter_prob=draw(_PROBABILITY),
            to_grayscale_prob=draw(_PROBABILITY),
            shuffle=draw(st.booleans()),
            semantics=draw(st.sampled_from(sampling.SEMANTICS)),
        ),
        gaussian_blur=dict(
            apply_prob=draw(_PROBABILITY), blur_divider=draw(st.floats(1, 1e6)), sigma_min=sigma[0], sigma_max=sigma[1]
        ),
        solarize=dict(apply_prob=draw(_PROBABILITY), threshold=draw(_PROBABILITY)),
    )


_SIDES = st.integers(1, 40)


def _assert_sound(presets, channels: int, size: tuple[int, int], image_size: int, seed: int) -> None:
    """Views of the right shape, finite, in [0, 1]; of noise with a black, a white and a grey image."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, channels, *size), generator=rng, dtype=torch.uint8)
    images[0], images[1], images[2] = 0, 255, 100
    draws, views = _views(presets, images, image_size, seed)
    for view in VIEWS:
        assert views[view].shape == (6, channels, image_size, image_size)
        assert views[view].dtype == torch.float32 and views[view].isfinite().all()
        assert views[view].min() >= 0 and views[view].max() <= 1
        top, left, height, width = draws[view].crop.unbind(1)
        assert min(top.min(), left.min()) >= 0 and min(height.min(), width.min()) >= 1
        assert (top + height).max() <= size[0] and (left + width).max() <= size[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_valid_view(), _valid_view(), st.sampled_from([1, 3]), _SIDES, _SIDES, st.integers(1, 40), st.integers(0, 99))
def test_any_valid_presets_give_sound_views(view1, view2, channels, height, width, image_size, seed):
    presets = dict(view1=view1, view2=view2)
    sampling.validate_presets(presets)
    _assert_sound(presets, channels, (height, width), image_size, seed)


_ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([-1e-9, 1 + 1e-9, 1e-300, 1e300, math.nan, -math.inf, 10**400, 'none', '0.5']),
)
_PLACES = [
    (view, section, field)
    for view in VIEWS
    for section, fields in sampling.AUGMENT_CONFIG[view].items()
    for field in (fields if isinstance(fields, dict) else [None])
]
_PLACES += [(view, section, None) for view in VIEWS for section in OPERATIONS] + [(view, None, None) for view in VIEWS]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(_PLACES), st.sampled_from(['replace', 'remove', 'add']), _ANYTHING, st.text(max_size=4))
def test_malformed_presets_are_refused_in_one_line_or_work(place, change, value, key):
    """No value anywhere gives a traceback or views that are not sound."""
    presets = copy.deepcopy(sampling.AUGMENT_CONFIG)
    *parents, last = [name for name in place if name is not None]
    parent = presets
    for name in parents:
        parent = parent[name]
    if change == 'replace':
        parent[last] = value
    elif change == 'remove':
        del parent[last]
    else:
        parent[key] = value
    try:
        sampling.validate_presets(presets)
    except UserError as error:
        message = str(error)
        assert message.startswith('config.augmentations.') and 'expected' in message and '\n' not in message
        return
    assert change == 'replace'
    _assert_sound(presets, 3, (9, 7), 8, seed=0)


def test_imagenette_was_a_folder_before():
    config = imagenette.get_config().to_dict()
    before = config | {'dataset': config['dataset'] | {'name': 'folder'}}
    assert resuming.differences(before, config, []) == {}
    other = config | {'dataset': config['dataset'] | {'name': 'cifar10'}}
    assert resuming.differences(other, config, []) == {'dataset.name': ('cifar10', 'imagenette')}

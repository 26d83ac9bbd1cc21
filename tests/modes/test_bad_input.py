"""A user's mistakes: one line that names field, value and what is accepted, exit status 1, nothing lost."""

import pathlib
import re

import pytest
import safetensors.torch
from PIL import Image

from byol_func.cli import MEANT, unknown_field
from byol_func.workdir import files
from cli import ROOT, assert_refused, config, run_launch, succeed, tiny_digits
from configs import byol

_ENCODERS = 'TinyResNet, ResNet10, ResNet18, ResNet34, ResNet50, ResNet101, ResNet152, ResNet200'
_WITH_EVAL = dict(final_linear_eval=True)
_ON_DIGITS = {
    'dataset': (dict(dataset__name='mnist'), "config.dataset.name='mnist'", 'folder, digits, cifar10'),
    'encoder': (
        dict(network__encoder_class='ResNet19'),
        "config.network.encoder_class='ResNet19'",
        _ENCODERS,
    ),
    'stem': (
        dict(network__encoder_config__stem='small'),
        "config.network.encoder_config.stem='small'",
        'imagenet, cifar',
    ),
    'width': (
        dict(network__encoder_config__width_multiplier=0.3),
        'config.network.encoder_config.width_multiplier=0.3',
        'expected a multiple of',
    ),
    'optimizer': (dict(optimizer='rmsprop'), "config.optimizer='rmsprop'", 'adam, adamw, lars, lion, muon, sgd'),
    'filter': (
        dict(optimizer_config__lars__weight_decay_filter='all'),
        "config.optimizer_config.lars.weight_decay_filter='all'",
        'exclude_bias_and_norm, none',
    ),
    'precision': (dict(precision='half'), "config.precision='half'", 'auto, float32, tf32, bfloat16'),
    'schedule': (dict(lr_schedule__name='step'), "config.lr_schedule.name='step'", 'cosine, constant'),
    'warm-up': (
        dict(lr_schedule__warmup_epochs=-5.0),
        'config.lr_schedule.warmup_epochs=-5.0',
        'expected 0 to 11',
    ),
    'less than a step': (dict(num_epochs=0.05), 'config.num_epochs=0.05', 'one batch of 128 images', 'at least 0.089'),
    'endless': (dict(num_epochs='inf'), 'config.num_epochs=inf', 'expected 0 to 1'),
    'views larger than the memory': (dict(image_size=9000), 'config.image_size=9000', 'GiB are free'),
    'linear_eval optimizer': (
        dict(**_WITH_EVAL, linear_eval__optimizer='rmsprop'),
        "config.linear_eval.optimizer='rmsprop'",
        'adam, adamw, lars, lion, muon, sgd',
    ),
    'linear_eval schedule': (
        dict(**_WITH_EVAL, linear_eval__lr_schedule__name='step'),
        "config.linear_eval.lr_schedule.name='step'",
        'cosine, constant',
    ),
    'linear_eval warm-up': (
        dict(**_WITH_EVAL, linear_eval__lr_schedule__warmup_epochs=-5.0),
        'config.linear_eval.lr_schedule.warmup_epochs=-5.0',
        'expected 0 to 5',
    ),
    'linear_eval filter': (
        dict(**_WITH_EVAL, linear_eval__optimizer_config__sgd__weight_decay_filter='all'),
        "config.linear_eval.optimizer_config.sgd.weight_decay_filter='all'",
        'exclude_bias_and_norm, none',
    ),
    'linear_eval augmentation': (
        dict(**_WITH_EVAL, linear_eval__cache_features=False, linear_eval__augmentations__random_crop__min_area=-1.0),
        'config.linear_eval.augmentations.random_crop.min_area=-1.0',
        'expected a number above 0',
    ),
    'linear_eval sweep': (
        dict(**_WITH_EVAL, linear_eval__optimizer='lars', linear_eval__sweep__weight_decays='(0.0,0.1)'),
        "config.linear_eval.optimizer='lars'",
        'expected sgd',
    ),
    'decay': (
        dict(network__bn_config__decay_rate=1.0),
        'config.network.bn_config.decay_rate=1.0',
        '0.0 to 0.999999',
    ),
    'cached features': (
        dict(linear_eval__freeze_backbone=False),
        'config.linear_eval.cache_features=True',
        'expected False unless freeze_backbone=True',
    ),
    'field': (dict(nope=1), '--config.nope: unknown field; configs/byol.py explains'),
    'field of another name': (dict(learning_rate=1), 'did you mean config.lr_schedule.base_learning_rate?'),
    'number of steps': (
        dict(max_steps=300),
        'config.num_epochs? It takes fractions: the steps of an epoch are the images',
    ),
    'steps of a section': (dict(linear_eval__iterations=9), 'config.linear_eval.num_epochs? It takes fractions'),
    'steps of warm-up': (dict(warmup_steps=9), 'did you mean config.lr_schedule.warmup_epochs? It takes fractions'),
    'another name of a field': (dict(lr=1), 'did you mean config.lr_schedule.base_learning_rate?'),
    'another name of a nested field': (dict(arch=1), 'did you mean config.network.encoder_class?'),
    'another name, of what the optimiser takes': (
        dict(wd=1),
        'did you mean config.optimizer_config.adam.weight_decay?',
    ),
    'the same of an evaluation': (
        dict(linear_eval__wd=1),
        'did you mean config.linear_eval.optimizer_config.sgd.weight_decay?',
    ),
    'field of another section': (
        dict(dataset__image_size=8),
        'dataset.image_size: unknown field',
        'config.image_size?',
    ),
    'field without its section': (dict(width_multiplier=8), 'config.network.encoder_config.width_multiplier?'),
    'nested field': (
        dict(network__nope=1),
        '--config.network.nope: unknown field',
        'configs/byol.py explains every field',
    ),
    'misspelt field': (dict(batchsize=1), '--config.batchsize: unknown field', 'batch_size'),
    'field of a value': (dict(dataset__name__x=1), '--config.dataset.name.x', 'config.dataset.name is a str'),
    'no integer': (dict(batch_size='abc'), '--config.batch_size=abc', 'expected an int'),
    'a fraction': (dict(batch_size='1.5'), '--config.batch_size=1.5', 'expected an int'),
    'no boolean': (dict(compile='maybe'), '--config.compile=maybe', 'expected a bool'),
    'no number': (dict(base_target_ema='high'), '--config.base_target_ema=high', 'expected a float'),
    'low': (dict(num_seeds=0), 'config.num_seeds=0', 'expected at least 1'),
    'high': (dict(base_target_ema=1.5), 'config.base_target_ema=1.5', 'expected 0.0 to 1.0'),
    'nan': (
        dict(lr_schedule__base_learning_rate='nan'),
        'config.lr_schedule.base_learning_rate=nan',
        'expected at least 0',
    ),
    'augmentation': (
        dict(augmentations__view1__random_crop__min_area=-1.0),
        'config.augmentations.view1.random_crop.min_area=-1.0',
        'expected a number above 0',
    ),
    'source size': (dict(dataset__source_size=9), 'config.dataset.source_size=9', 'expected 0 or 8'),
    'batch': (dict(batch_size=1443), 'config.batch_size=1443', '1442'),
    'less than a step of the evaluation': (
        dict(**_WITH_EVAL, linear_eval__batch_size=1443, linear_eval__num_epochs=0.5),
        'config.linear_eval.num_epochs=0.5',
        'one batch of 1442 images',
    ),
}


@pytest.mark.parametrize(
    'overrides, fragments',
    [pytest.param(overrides, fragments, id=name) for name, (overrides, *fragments) in _ON_DIGITS.items()],
)
def test_field(overrides, fragments, tmp_path):
    workdir = tmp_path / 'run'
    outcome = run_launch(*tiny_digits(**overrides), f'--workdir={workdir}', cwd=tmp_path)
    assert_refused(outcome, *fragments)
    assert not list(workdir.glob('checkpoints/*')), 'found out only after training'


_MODES = 'pretrain, linear_eval, fine_tune, eval, knn, logistic, preview, import, export, replay, embed'
_DIGITS = tiny_digits()
_COMMAND_LINES = {
    'nothing': ([], '--config', 'configs/digits.py'),
    'no config': (['--config.batch_size=3'], '--config.batch_size', '--config=FILE'),
    'no config file': (['--config=nope.py'], '--config=nope.py', 'no such file; expected a path', 'digits'),
    'no config file, override': (
        ['--config=nope.py', '--config.batch_size=3'],
        '--config=nope.py',
        'no such file',
    ),
    'a folder': ([f'--config={ROOT}/configs'], 'configs', 'no such file'),
    'empty': (['--config='], '--config=', 'no such file'),
    'preset': (config('byol.py:77'), "configs/byol.py:PRESET, PRESET='77'", '40, 100, 300, 1000'),
    'other preset': (config('cifar10.py:nope'), "PRESET='nope'", 'lars, adam, small'),
    'preset of none': (config('digits.py:x'), 'digits.py:x', 'it has no presets'),
    'mode': ([*_DIGITS, '--mode=train'], "--mode='train'", _MODES),
    'mode with workdir': ([*_DIGITS, '--mode=train', '--workdir=run'], "--mode='train'", _MODES),
    'flag': (['--nope=1'], '--nope: unknown flag', '--help'),
    'misspelt flag': ([*_DIGITS, '--wordkir=x'], '--wordkir: unknown flag', '--workdir'),
    'flag of another type': ([*_DIGITS, '--log_every_seconds=x'], '--log_every_seconds=x', 'a float'),
    'argument': ([*_DIGITS, 'more'], "'more'", '--mode=pretrain'),
    'device': ([*_DIGITS, '--device=abacus'], '--device=abacus', 'auto, cpu, cuda or cuda:N'),
    'other device': ([*_DIGITS, '--device=meta'], '--device=meta', 'auto, cpu, cuda or cuda:N'),
    'absent GPU': ([*_DIGITS, '--device=cuda:99'], '--device=cuda:99', 'GPUs found', 'auto, cpu'),
    'split of another mode': (
        [*_DIGITS, '--mode=knn', '--split=val', '--workdir=run'],
        '--split=val',
        'only with --mode=eval or embed',
    ),
    'output of another mode': (
        [*_DIGITS, '--output=x'],
        '--output=x',
        'only with --mode=export',
        'not --mode=pretrain',
    ),
    'format of another mode': (
        [*_DIGITS, '--mode=replay', '--format=timm', '--workdir=run'],
        '--format=timm',
        'only with --mode=export',
    ),
    'nothing to start from': ([*_DIGITS, '--mode=linear_eval'], '--mode=linear_eval', '--checkpoint=FILE'),
    'empty workdir': (
        [*_DIGITS, '--mode=fine_tune', '--workdir=run'],
        '--workdir=run',
        'no checkpoint of pretrain',
        '--mode=pretrain',
        '--checkpoint=FILE',
    ),
    'no checkpoint': (
        [*_DIGITS, '--mode=eval', '--checkpoint=x.safetensors'],
        '--checkpoint=x.safetensors',
        'no such file',
    ),
    'one checkpoint for two seeds': (
        [*tiny_digits(num_seeds=2), '--mode=eval', '--checkpoint=x'],
        '--checkpoint=x',
        'config.num_seeds=2',
        '--workdir',
    ),
    'digits without a root': (config('folder.py'), "config.dataset.root=''", 'expected a folder'),
}


@pytest.mark.parametrize(
    'argv, fragments', [pytest.param(argv, fragments, id=name) for name, (argv, *fragments) in _COMMAND_LINES.items()]
)
def test_command_line(argv, fragments, tmp_path):
    assert_refused(run_launch(*argv, cwd=tmp_path), *fragments)


def _make_images(root: pathlib.Path, *classes: str) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.new('RGB', (8, 8), 'red').save(root / name / 'image.png')


def _no_images(root):
    _make_images(root / 'train', 'cat', 'dog')
    _make_images(root / 'test', 'cat', 'dog')
    (root / 'train/dog/image.png').rename(root / 'train/dog/image.txt')


def _other_classes(root):
    _make_images(root / 'train', 'cat', 'dog')
    _make_images(root / 'test', 'cat', 'cow')


def _no_test(root):
    _make_images(root / 'train', 'cat', 'dog')
    _make_images(root / 'tset', 'cat', 'dog')


def _damaged_image(root):
    _make_images(root / 'train', 'cat', 'dog')
    _make_images(root / 'test', 'cat', 'dog')
    (root / 'train/dog/image.png').write_text('no image')


@pytest.mark.parametrize(
    'make, fragments',
    [
        (lambda root: None, ['No such file']),
        (pathlib.Path.mkdir, ["there is no folder 'images/train'", 'DIR/train/CLASS/*']),
        (_no_test, ["there is no folder 'images/test'", 'DIR/test/CLASS/*', "found 'tset'"]),
        (_other_classes, ["'cow' (only in test)", "'dog' (only in train)"]),
        (_no_images, ["no images in 'images/train/dog'", '.png']),
        (_damaged_image, ["cannot read the image 'images/train/dog/image.png'"]),
    ],
    ids=['missing', 'empty', 'no test', 'other classes', 'no images', 'damaged image'],
)
def test_folder(make, fragments, tmp_path):
    make(tmp_path / 'images')
    outcome = run_launch(*config('folder.py', dataset__root='images'), cwd=tmp_path)
    assert_refused(outcome, "config.dataset.root='images'", *fragments)


def test_file_in_the_place_of_the_workdir(tmp_path):
    (tmp_path / 'file').write_text('mine')
    for workdir in ('file', 'file/run'):
        outcome = run_launch(*_DIGITS, f'--workdir={workdir}', cwd=tmp_path)
        assert_refused(outcome, f'--workdir={workdir}', 'cannot write')
    assert (tmp_path / 'file').read_text() == 'mine'


def test_loss_that_is_not_finite(tmp_path):
    # Warm-up: the first step has the rate 0, the second one a hopeless rate.
    argv = tiny_digits(
        lr_schedule__warmup_epochs=1.0,
        lr_schedule__base_learning_rate=1e38,
        checkpointing__save_every_steps=1,
        log_every_steps=4,
    )
    outcome = run_launch(*argv, f'--workdir={tmp_path}', cwd=tmp_path)
    assert_refused(outcome, 'expected finite numbers', 'config.lr_schedule.base_learning_rate')
    assert re.search(r'step [1-3]: (loss=(nan|inf)|the parameters after the update)', outcome.stderr)
    first, *_, last = sorted(tmp_path.glob('checkpoints/*'))
    assert first.name == 'pretrain_00000000.safetensors'
    assert str(last) in outcome.stderr
    parameters = safetensors.torch.load_file(first)
    assert all(value.isfinite().all() for value in parameters.values())
    assert not list(tmp_path.glob('summary*'))


def test_views_larger_than_the_memory_on_top_of_an_encoder(tmp_path):
    succeed(*tiny_digits(batch_size=512), '--workdir=run', cwd=tmp_path)
    for mode, size, count, field in (
        *(
            (mode, 9000, 500, 'evaluation.batch_size=500')
            for mode in ('linear_eval', 'eval', 'knn', 'logistic', 'embed')
        ),
        ('fine_tune', 900, 1, 'fine_tune.batch_size=1024'),
    ):
        run = tiny_digits(image_size=size, evaluation__batch_size=count, fine_tune__batch_size=1024)
        outcome = run_launch(*run, '--workdir=run', f'--mode={mode}', cwd=tmp_path)
        assert_refused(outcome, f'config.image_size={size}', f'config.{field} needs about', 'GiB are free')


def test_every_other_name_of_a_field_leads_to_it():
    config = byol.get_config()
    flat = {field.rpartition('.')[2] for field in files.flatten(config.to_dict())}
    for name, meant in MEANT.items():
        assert name not in flat, name
        assert re.search(rf'did you mean config\.(\w+\.)*{meant}\?', str(unknown_field(f'config.{name}', config)))

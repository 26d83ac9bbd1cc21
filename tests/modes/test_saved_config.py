"""`--workdir=W --mode=X` without --config: the config that W was made with, which flags override."""

import html
import json
import re
import shlex

import pytest
import torch

from byol_func.modes import preparing
from byol_func.runtime import precision
from byol_func.utils import checkpointing
from cli import ROOT, run_launch, succeed, tiny_digits
from configs import byol


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A run of two steps with a network that no config file has."""
    path = tmp_path_factory.mktemp('run')
    succeed(*tiny_digits(batch_size=512, image_size=10), f'--workdir={path}', cwd=path)
    return path


def _config_of(workdir, mode):
    return json.loads((workdir / f'config.{mode}.json').read_text())


@pytest.mark.parametrize('mode', ['knn', 'linear_eval'])
def test_a_mode_takes_the_config_of_its_workdir(workdir, mode):
    succeed(f'--workdir={workdir}', f'--mode={mode}', cwd=workdir)
    assert _config_of(workdir, mode) == _config_of(workdir, 'pretrain')


def test_flags_override_it(workdir, tmp_path):
    path = next(workdir.glob('checkpoints/pretrain*'))
    flags = [f'--checkpoint={path}', '--mode=logistic', '--config.evaluation.batch_size=77']
    succeed(*flags, f'--workdir={tmp_path}', cwd=tmp_path)  # The config is the checkpoint's.
    config = _config_of(workdir, 'pretrain')
    config['evaluation']['batch_size'] = 77
    assert _config_of(tmp_path, 'logistic') == config
    succeed(f'--workdir={workdir}', '--mode=logistic', '--config.evaluation.batch_size=77', cwd=workdir)
    succeed(f'--workdir={workdir}', '--mode=logistic', cwd=workdir)  # As the mode was run last.
    assert _config_of(workdir, 'logistic') == config


@pytest.mark.parametrize('prefix', ['', f'{ROOT}/configs/saved.py:'])
def test_a_saved_config_as_config(workdir, tmp_path, prefix):
    succeed(f'--config={prefix}{workdir}/config.pretrain.json', '--workdir=new', cwd=tmp_path)
    assert _config_of(tmp_path / 'new', 'pretrain') == _config_of(workdir, 'pretrain')


def test_a_run_goes_on_without_its_config(workdir):
    outcome = succeed(f'--workdir={workdir}', cwd=workdir)
    assert 'Resuming from' in outcome.stderr
    outcome = run_launch(f'--workdir={workdir}', '--config.batch_size=64', cwd=workdir)
    assert outcome.code == 1 and 'config.batch_size=512, not 64' in outcome.stderr
    first, *others = (workdir / 'commands.txt').read_text().splitlines()
    assert '--config.image_size=10' in first and not any('--config.batch_size=64' in line for line in others)


def test_the_report_shows_every_command(tmp_path):
    first = tiny_digits(batch_size=512, pictures=True, preview__num_images=0)
    for flags in (first, [], []):
        succeed(*flags, f'--workdir={tmp_path}', cwd=tmp_path)
    page = html.unescape(re.sub('</?span>', '', (tmp_path / 'report.html').read_text()))
    assert f'<pre class="command">python launch.py {shlex.join(first)} --workdir={tmp_path}</pre>' in page
    assert f'<pre class="command">python launch.py --workdir={tmp_path}  # 2 times</pre>' in page


@pytest.mark.parametrize(
    'field, value, words',
    [
        ('network.encoder_class', 'ResNet18', "was trained with 'TinyResNet'"),
        ('network.encoder_config.stem', 'imagenet', "was trained with 'cifar'"),
    ],
)
def test_another_encoder_is_named(workdir, field, value, words):
    outcome = run_launch(f'--workdir={workdir}', '--mode=knn', f'--config.{field}={value}', cwd=workdir)
    assert outcome.code == 1 and words in outcome.stderr.splitlines()[-1]


def _everything(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('mode', ['fine_tune', 'knn', 'pretrain', 'linear_eval'])
def test_a_refused_mode_leaves_the_workdir_as_it_was(workdir, mode):
    before = _everything(workdir)
    network = '--config.network.encoder_config.width_multiplier=3.0'
    assert run_launch(f'--workdir={workdir}', f'--mode={mode}', network, cwd=workdir).code == 1
    assert _everything(workdir) == before


@pytest.mark.parametrize('seeds', [1, 2])
@pytest.mark.parametrize('mode', ['fine_tune', 'pretrain'])
def test_a_refused_mode_makes_no_workdir(tmp_path, mode, seeds):
    flags = tiny_digits(num_seeds=seeds, augmentations__view1__random_crop__min_area=-1.0)
    assert run_launch(*flags, '--workdir=new/below', f'--mode={mode}', cwd=tmp_path).code == 1
    assert not list(tmp_path.iterdir())


def test_other_images_are_told(workdir):
    outcome = succeed(f'--workdir={workdir}', '--mode=embed', '--config.image_size=8', cwd=workdir)
    assert 'config.image_size=8, but the encoder was trained with 10' in outcome.stderr


@pytest.mark.parametrize(
    'content, words',
    [
        ('{', 'not JSON'),
        ('[]', 'not the config of a run'),
        ('{"network": {"nope": 1}}', 'config.network.nope=1: unknown field'),
        ('{"network": {}, "batch_size": "many"}', "config.batch_size='many': expected an int"),
        ('{"network": {}, "dataset": 3}', 'config.dataset=3: expected fields'),
    ],
)
def test_what_is_no_config(tmp_path, content, words):
    (tmp_path / 'config.json').write_text(content)
    for flag in (f'--workdir={tmp_path}', f'--config={tmp_path}/config.json'):
        outcome = run_launch(flag, cwd=tmp_path)
        *_, line = outcome.stderr.splitlines()
        assert outcome.code == 1 and line.startswith('Error: --config=') and words in line


def test_a_variant_keeps_its_options(tmp_path):
    options = ['--config.variant=configs/variants/contrast.py', '--config.batch_size=1442']
    succeed(*tiny_digits(), *options, '--workdir=run', cwd=tmp_path)
    before = _config_of(tmp_path / 'run', 'pretrain')
    assert before['variant_config']
    succeed('--workdir=run', cwd=tmp_path)
    assert _config_of(tmp_path / 'run', 'pretrain') == before


def test_a_workdir_without_config(tmp_path):
    outcome = run_launch('--workdir=new', '--mode=knn', cwd=tmp_path)
    assert outcome.code == 1 and '--workdir=new: it holds no config of a run' in outcome.stderr
    assert not (tmp_path / 'new').exists()


def test_the_checkpoint_of_an_import_has_a_config(workdir, tmp_path):
    config = checkpointing.load(next(workdir.glob('checkpoints/pretrain*'))).config
    state = {'w': checkpointing.torch.zeros(1)}
    checkpointing.save(tmp_path / 'checkpoints', state, mode='pretrain', step=0, config=config | {'imported': True})
    outcome = run_launch(f'--workdir={tmp_path}', '--mode=knn', cwd=tmp_path)
    assert outcome.code == 1 and 'does not fit the config: it has no online_params/encoder' in outcome.stderr


@pytest.mark.parametrize('source', ['config.pretrain.json', 'checkpoints'])
def test_auto_is_the_precision_of_the_earlier_run(tmp_path, source):
    """A run that was moved to another machine keeps its precision; no machine chooses tf32 by itself."""
    config = byol.get_config('40')
    config.precision = 'tf32'
    if source == 'checkpoints':
        state = {'x': torch.zeros(1)}
        saved = checkpointing.save(tmp_path, state, mode='pretrain', step=1, config=config.to_dict())
    else:
        saved = tmp_path / source
        saved.write_text(config.to_json())
    config.precision = 'auto'
    try:
        preparing.start(config, torch.device('cpu'), str(saved))
    finally:
        precision.set_backend('float32')
    assert config.precision == 'tf32'


def test_auto_without_an_earlier_run(tmp_path):
    config = byol.get_config('40')
    preparing.start(config, torch.device('cpu'), None)
    assert config.precision == precision.fastest(torch.device('cpu'))
    config.precision = 'auto'
    damaged = tmp_path / 'config.json'
    damaged.write_text('{')
    preparing.start(config, torch.device('cpu'), str(damaged))
    assert config.precision == precision.fastest(torch.device('cpu'))

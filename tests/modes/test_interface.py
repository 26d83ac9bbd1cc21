"""`byol_func.get_config`, `pretrain` and `evaluate` give the numbers of `launch.py`, and can be called repeatedly."""

import json
import re
import subprocess
import sys

import pytest
import torch

import byol_func
import cli
from byol_func.errors import UserError

FIELDS = {name.replace('__', '.'): value for name, value in dict(cli.TINY_RUN, num_epochs=2).items()}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """The programs that `cli` starts have one thread; the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """The same run by the program and, twice, by a call."""
    root = tmp_path_factory.mktemp('interface')
    cli.succeed(*cli.config('digits.py', **dict(cli.TINY_RUN, num_epochs=2)), '--workdir=typed', cwd=root)
    config = byol_func.get_config('digits', FIELDS)
    before = config.to_json()
    called = [byol_func.pretrain(config, root / name, device='cpu') for name in ('first', 'second')]
    assert config.to_json() == before
    return root, called


def _numbers(summary):
    return {key: value for key, value in summary.items() if '/' in key}


def test_a_call_trains_as_the_command_does(results):
    root, called = results
    typed = json.loads((root / 'typed/summary.json').read_text())
    assert _numbers(typed) and all(_numbers(result.summary) == _numbers(typed) for result in called)
    images = torch.rand(2, 1, 8, 8)
    first, second = (result.encoder() for result in called)
    assert torch.equal(first(images), second(images))
    again = byol_func.pretrain(byol_func.get_config('digits', FIELDS), called[0].workdir, device='cpu')
    assert again.encoder().step == first.step, 'the same call finds its run finished'


def test_a_call_measures_as_the_command_does(results):
    root, called = results
    cli.succeed('--workdir=typed', '--mode=knn', cwd=root)
    typed = json.loads((root / 'typed/summary.knn.json').read_text())
    measured = byol_func.evaluate(called[0].workdir, 'knn', device='cpu')
    assert _numbers(measured.summary) == _numbers(typed)
    file = next((called[0].workdir / 'checkpoints').glob('pretrain_*'))
    other = byol_func.evaluate(root / 'apart', 'knn', {'evaluation.batch_size': 7}, checkpoint=file, device='cpu')
    assert other.summary['test/knn_top1'] == typed['test/knn_top1'] and (root / 'apart/summary.json').exists()


def test_mistakes_are_one_line(results, tmp_path):
    _, (result, _) = results
    for call, message in (
        (lambda: byol_func.get_config('digit'), "config 'digit': no such file; did you mean digits?"),
        (lambda: byol_func.get_config('digits:x'), 'config=digits:x: it has no presets'),
        (lambda: byol_func.get_config('saved'), 'config=saved: it needs a preset'),
        (lambda: byol_func.get_config(None), 'get_config(None): expected the name of a config'),
        (lambda: byol_func.get_config('digits', ['num_epochs', 3]), "get_config: ['num_epochs', 3]: expected fields"),
        (lambda: byol_func.get_config('digits', num_epochs=None), 'config.num_epochs=None: expected a float'),
        (lambda: byol_func.pretrain('digits', tmp_path), "pretrain('digits'): expected a config"),
        (lambda: byol_func.load_encoder(tmp_path, 'gpu'), "device='gpu': there is none here"),
        (lambda: byol_func.load_encoder(None), 'path=None: expected the path of a checkpoint'),
        (lambda: byol_func.get_config('cifar10:x'), 'PRESET'),
        (lambda: byol_func.get_config('digits', nmu_epochs=1), 'config.nmu_epochs: unknown field; did you mean'),
        (
            lambda: byol_func.get_config('digits', {'dataset.rot': ''}),
            'config.dataset.rot: unknown field; did you mean',
        ),
        (lambda: byol_func.get_config('digits', {'no.such': 1}), 'config.no.such: unknown field'),
        (lambda: byol_func.get_config('digits', {'num_epochs.x': 1}), 'config.num_epochs.x: unknown field'),
        (lambda: byol_func.get_config('digits', num_epochs='2'), "config.num_epochs='2': expected a float"),
        (lambda: byol_func.get_config('digits', batch_size=0), 'config.batch_size=0: expected'),
        (lambda: byol_func.evaluate(tmp_path, 'knn'), f'workdir={tmp_path}: it holds no config'),
        (lambda: byol_func.evaluate(result.workdir, 'train'), "mode='train'"),
        (lambda: byol_func.pretrain(byol_func.get_config('digits'), tmp_path, device='tpu'), 'device=tpu: expected'),
        (lambda: byol_func.pretrain(byol_func.get_config('digits'), tmp_path, resume='x'), "resume='x'"),
        (
            lambda: byol_func.pretrain(byol_func.get_config('digits', FIELDS), result.workdir, resume='never'),
            'resume=never: ',
        ),
        (
            lambda: byol_func.evaluate(result.workdir, 'knn', checkpoint=tmp_path / 'x.safetensors'),
            f'checkpoint={tmp_path}/x.safetensors: no such file',
        ),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value) and '\n' not in str(caught.value)
        assert not re.search(r'--(config|workdir|checkpoint|resume|device)\b', str(caught.value))


def test_presets_and_names_of_the_command_line():
    config = byol_func.get_config(
        'cifar10:small', {'augmentations_preset': 'none', 'dataset.root': 'DIR'}, num_epochs=3
    )
    assert (config.batch_size, config.num_epochs, config.dataset.root) == (64, 3.0, 'DIR')
    assert config.augmentations.view1.random_crop.apply_prob == 0.0
    path = cli.ROOT / 'configs/variants/simsiam.py'
    assert byol_func.get_config(path).variant.endswith('simsiam.py') and 'pretrain' in dir(byol_func)


def test_some_fields_of_a_section():
    nested = {'dataset': {'root': 'DIR'}, 'linear_eval.lr_schedule': {'warmup_epochs': 0.5}}
    config, plain = byol_func.get_config('digits', nested), byol_func.get_config('digits')
    assert config.dataset.root == 'DIR' and config.linear_eval.lr_schedule.warmup_epochs == 0.5
    config.dataset.root, config.linear_eval.lr_schedule.warmup_epochs = '', plain.linear_eval.lr_schedule.warmup_epochs
    assert config.to_json() == plain.to_json()
    fields = {'linear_eval_preset': 'official', 'linear_eval': {'num_epochs': 7.0}}
    assert byol_func.get_config('digits', fields).linear_eval.num_epochs == 7.0, 'it overrides the preset'
    with pytest.raises(UserError, match='config.dataset.rot: unknown field'):
        byol_func.get_config('digits', dataset={'rot': 'DIR'})


def test_a_short_warm_up_is_told_once_where_it_applies(caplog):
    from byol_func.modes import preparing

    for mode, count in (('pretrain', 1), ('linear_eval', 0), ('knn', 0), ('eval', 0), ('fine_tune', 0)):
        config = byol_func.get_config('digits', num_epochs=1)
        assert not caplog.records
        config.lr_schedule.warmup_epochs = 10.0
        preparing.complete(config, {}, mode)
        assert caplog.text.count('config.lr_schedule.warmup_epochs=10: longer than') == count
        assert config.lr_schedule.warmup_epochs == pytest.approx(0.1)
        caplog.clear()


def test_another_package_called_configs_is_told(tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/__init__.py').write_text('')
    code = (
        f'import sys; import configs; sys.path.insert(0, {str(cli.ROOT)!r})\n'
        "import byol_func\nbyol_func.get_config('digits')\n"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'a package called configs has been imported' in done.stderr.splitlines()[-1]

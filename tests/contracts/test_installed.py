"""The installed package: `byol-func` from any directory, with the configs inside."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tomllib
import zipfile

import pytest

from cli import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def _requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith(('#', '-'))}


def test_dependencies_are_those_of_the_requirements():
    project = PROJECT['project']
    extras = project['optional-dependencies']
    assert {*project['dependencies'], *extras['mlflow']} == _requirements('requirements.txt')
    assert set(extras['dev']) == _requirements('requirements-dev.txt')
    assert set(extras['official']) == _requirements('requirements-official.txt')


def test_every_package_is_installed():
    found = {'.'.join(path.parent.relative_to(ROOT).parts) for path in (ROOT / 'byol_func').rglob('__init__.py')}
    found |= {'byol_func.configs', 'byol_func.configs.variants'}
    assert set(PROJECT['tool']['setuptools']['packages']) == found


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> pathlib.Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for name in ('byol_func', 'configs', 'pyproject.toml', 'README.md', 'LICENSE'):
        (source / name).symlink_to(ROOT / name)
    build = [
        sys.executable,
        '-c',
        'from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))',
    ]
    done = subprocess.run([*build, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'site')
    return folder / 'site'


def _command(installed, *argv, cwd):
    code = f'import sys; sys.path.insert(0, {str(installed)!r}); from byol_func.program import command; command()'
    return subprocess.run([sys.executable, '-P', '-c', code, *argv], cwd=cwd, capture_output=True, text=True)


def test_the_command_finds_its_configs_from_any_directory(installed, tmp_path):
    done = _command(installed, 'configs', cwd=tmp_path)
    assert 'digits' in done.stdout and "BYOL on scikit-learn's handwritten digits" in done.stdout, done.stderr
    assert 'linear_evaluation' not in done.stdout  # Presets, no config.
    for name in ('digits', 'configs/digits.py'):
        done = _command(installed, f'--config={name}', '--config.batch_size=0', cwd=tmp_path)
        assert 'config.batch_size=0: expected at least 2' in done.stderr, done.stderr
    done = _command(installed, '--config=cifar10:small', '--mode=knn', cwd=tmp_path)
    assert '--mode=knn: give --workdir' in done.stderr
    (tmp_path / 'own.py').write_text(
        'from configs import digits\n\n\ndef get_config():\n    return digits.get_config()\n'
    )
    done = _command(installed, '--config=own.py', '--config.image_size=0', cwd=tmp_path)
    assert 'config.image_size=0: expected at least 1' in done.stderr


def test_runs_are_listed(installed, tmp_path):
    assert _command(installed, 'runs', cwd=tmp_path).stdout == 'runs: no runs\n'
    run = tmp_path / 'runs/one'
    run.mkdir(parents=True)
    (run / 'config.json').write_text('{"dataset": {"name": "digits"}, "network": {"encoder_class": "ResNet10"}}')
    (run / 'metrics.jsonl').write_text('{"mode": "pretrain", "step": 3, "epoch": 1.5}\n')
    assert 'runs/one  digits, ResNet10  stopped, epoch 1.5' in _command(installed, 'runs', cwd=tmp_path).stdout
    (run / 'summary.json').write_text('{"mode": "knn", "test/knn_top1": 0.75, "test/pixels_knn_top1": 0.9}')
    assert 'knn finished, epoch 1.5  test/knn_top1 75.00 %' in _command(installed, 'runs', cwd=tmp_path).stdout


def test_a_killed_run_is_not_running_and_other_folders_are_no_runs(installed, tmp_path):
    run, process = tmp_path / 'runs/one', subprocess.Popen(['true'])
    run.mkdir(parents=True)
    (run / 'config.json').write_text('{"dataset": {"name": "digits"}, "network": {"encoder_class": "ResNet10"}}')
    process.wait()
    for number, status in ((process.pid, 'stopped'), (os.getpid(), 'running')):
        (run / '.lock.owner').write_text(json.dumps({'process': number, 'host': socket.gethostname()}))
        for folder in ('runs', 'runs/one'):  # A workdir itself will do.
            listed = _command(installed, 'runs', folder, cwd=tmp_path).stdout
            assert listed.split() == ['runs/one', 'digits,', 'ResNet10', status]
    (tmp_path / 'runs/hub').mkdir()
    (tmp_path / 'runs/hub/config.json').write_text('{"architecture": "resnet50"}')
    assert 'hub' not in _command(installed, 'runs', cwd=tmp_path).stdout
    missing = _command(installed, 'runs', 'nowhere', cwd=tmp_path)
    assert missing.returncode and 'nowhere: no such folder' in missing.stderr


def test_the_lists_explain_themselves(installed, tmp_path):
    listed = _command(installed, 'configs', cwd=tmp_path).stdout
    assert 'Presets: lars, adam, small, cpu.' in listed and 'variants/simsiam' in listed
    assert 'Lists the workdirs' in _command(installed, 'runs', '--help', cwd=tmp_path).stdout
    for words in (['configs', 'foo'], ['runs', '--foo']):
        done = _command(installed, *words, cwd=tmp_path)
        assert done.returncode and 'unrecognized arguments: ' in done.stderr and words[1] in done.stderr


@pytest.mark.parametrize('given, meant', [('digit', 'digits'), ('dino', 'variants/dino'), ('cifar11:small', 'cifar10')])
def test_a_misspelt_config_is_answered_with_the_nearest(installed, tmp_path, given, meant):
    assert f'did you mean {meant}?' in _command(installed, f'--config={given}', cwd=tmp_path).stderr

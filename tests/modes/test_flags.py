"""Every flag is heeded or refused in every mode, and a first look costs nothing."""

import json

import pytest
from absl import flags

from byol_func import modes, program
from byol_func.errors import UserError
from byol_func.modes import usage
from cli import run_launch, succeed, tiny_digits

# Heeded by every mode.
EVERYWHERE = {'config', 'mode', 'workdir', 'device', 'log_every_seconds'}


def test_every_flag_has_its_place():
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(program.__name__)}
    own |= {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(program.__name__, [])}
    assert own == EVERYWHERE | set(modes.HEEDED_BY)
    assert all(set(heeding) < set(modes.MODES) for heeding in modes.HEEDED_BY.values())


@pytest.mark.parametrize('flag', sorted(modes.HEEDED_BY))
@pytest.mark.parametrize('mode', modes.MODES)
def test_a_flag_is_heeded_or_refused(mode, flag):
    if mode in modes.HEEDED_BY[flag]:
        return modes.check_flags(mode, {flag: 'x'})
    with pytest.raises(UserError) as error:
        modes.check_flags(mode, {flag: 'x'})
    assert str(error.value).startswith(f'--{flag}=x: ')


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--checkpoint=nowhere.pth'], '--checkpoint=nowhere.pth: pre-training starts from new weights'),
        (['--mode=preview', '--checkpoint=x'], '--checkpoint=x: only with --mode=linear_eval or fine_tune'),
        (['--mode=knn', '--resume=never', '--workdir=x'], '--resume=never: --mode=knn trains nothing'),
        (['--mode=embed', '--mlflow_tracking_uri=x', '--workdir=x'], '--mlflow_tracking_uri=x: only with'),
        (['--mode=import', '--resume=must', '--checkpoint=x'], '--resume=must: only with'),
    ],
)
def test_what_is_refused(argv, words, tmp_path):
    outcome = run_launch(*tiny_digits(), *argv, cwd=tmp_path)
    assert outcome.code == 1 and f'Error: {words}' in outcome.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('num_epochs, steps', [('0.5', 1), ('2', 5), ('0', 0)])
def test_any_number_of_epochs_will_do(num_epochs, steps, tmp_path):
    flags = tiny_digits(batch_size=512, lr_schedule__warmup_epochs=10.0)
    flags = [flag for flag in flags if 'num_epochs' not in flag]
    outcome = succeed(*flags, f'--config.num_epochs={num_epochs}', '--workdir=run', cwd=tmp_path)
    summary, config = (json.loads((tmp_path / f'run/{name}.json').read_text()) for name in ('summary', 'config'))
    assert summary['steps'] == steps
    assert config['lr_schedule']['warmup_epochs'] == pytest.approx(0.1 * float(num_epochs))
    assert f'longer than config.num_epochs={num_epochs}, shortened' in outcome.stderr
    # Resumed, the warm-up is as it was.
    succeed(*flags, f'--config.num_epochs={num_epochs}', '--workdir=run', cwd=tmp_path)


def test_help_has_every_flag_and_mode(tmp_path):
    outcome = succeed('--help', cwd=tmp_path)
    assert {name for names in usage.GROUPS.values() for name in names} == EVERYWHERE | set(modes.HEEDED_BY)
    assert set(usage.EXAMPLES) == set(modes.MODES)
    for mode, (what, example) in usage.EXAMPLES.items():
        assert f'  {mode}: {what}\n      python launch.py {example}\n' in outcome.stdout
        assert mode == 'pretrain' or f'--mode={mode}' in example
    assert all(len(line) <= 110 for line in outcome.stdout.splitlines())


def test_a_dry_run_tells_the_run_and_writes_nothing(tmp_path):
    outcome = succeed(*tiny_digits(num_seeds=2), '--dry_run', '--workdir=run', cwd=tmp_path)
    assert 'Steps:   11 of 128 images, 0.98 epochs, views of 8 pixels; 2 seeds' in outcome.stdout
    for word in ('TinyResNet', '1 x 8 x 8 pixels', 'GiB used', 'hours for all steps', 'Nothing was written'):
        assert word in outcome.stdout
    assert not list(tmp_path.iterdir())
    outcome = run_launch(*tiny_digits(), '--dry_run', '--mode=knn', '--workdir=run', cwd=tmp_path)
    assert outcome.code == 1 and '--dry_run=True: only with --mode=pretrain' in outcome.stderr


def test_views_far_above_the_source_are_told(tmp_path):
    outcome = succeed(*tiny_digits(batch_size=16, image_size=24), '--dry_run', cwd=tmp_path)
    assert 'config.image_size=24: the images have a side of 8 pixels' in outcome.stderr
    outcome = succeed(*tiny_digits(batch_size=16, image_size=16), '--dry_run', cwd=tmp_path)
    assert 'the images have a side of 8 pixels' not in outcome.stderr


@pytest.mark.parametrize('mode', ['fine_tune', 'linear_eval'])
def test_a_batch_larger_than_the_labelled_part_becomes_the_part(mode, tmp_path):
    own = {f'{mode}__label_fraction': 0.1, f'{mode}__batch_size': 256, f'{mode}__num_epochs': 2}
    flags = tiny_digits(batch_size=1442, **own)
    succeed(*flags, '--workdir=run', cwd=tmp_path)
    outcome = succeed(*flags, '--workdir=run', f'--mode={mode}', cwd=tmp_path)
    assert f'config.{mode}.batch_size=256: only 143 training images, so the batch is reduced to 143' in outcome.stderr
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert (summary['batch_size'], summary['steps']) == (143, 2)
    assert 'Resuming from' in succeed(*flags, '--workdir=run', f'--mode={mode}', cwd=tmp_path).stderr


def test_a_report_that_cannot_be_written_is_the_last_line(tmp_path):
    (tmp_path / 'run/report.html').mkdir(parents=True)
    outcome = run_launch(*tiny_digits(batch_size=1442, pictures=True), '--workdir=run', cwd=tmp_path)
    *_, line = outcome.stderr.splitlines()
    assert outcome.code == 1 and 'are complete, but these could not be written: report.html' in line
    assert (tmp_path / 'run/summary.json').exists() and 'Everything is in run' in outcome.stdout

"""`config.view_size`: pre-training learns from views of one side, and evaluation uses `image_size`."""

import pytest
import torch

from byol_func import byol_experiment
from cli import config, run_launch, tiny_digits
from configs import digits
from image_folders import flags, make_folder


@pytest.mark.parametrize(('view_size', 'side'), [(0, 8), (5, 5), (12, 12)])
def test_views_have_this_side_and_evaluated_images_the_other(view_size, side):
    settings = digits.get_config()
    settings.view_size = view_size
    settings.batch_size = 4
    parts = byol_experiment.make_parts(settings, num_examples=8, num_classes=10, image_shape=(1, 8, 8))
    seen = []
    apply = parts.eval_forward.apply

    def spy(params, state, inputs, is_training):
        seen.append(inputs['images'].shape[-1])
        return apply(params, state, inputs, is_training=is_training)

    experiment = byol_experiment.make_experiment(parts._replace(eval_forward=parts.eval_forward._replace(apply=spy)))
    inputs = dict(images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels=torch.zeros(4, dtype=torch.int64))
    views = parts.postprocess(inputs, experiment.sample(0), presets=parts.presets, image_size=parts.image_size)
    assert {view: views[view].shape[-1] for view in ('view1', 'view2')} == {'view1': side, 'view2': side}
    experiment.predict(experiment.init(), inputs)
    assert seen == [8]


def test_a_streamed_run_learns_from_small_views_and_evaluates_at_image_size(tmp_path):
    make_folder(tmp_path / 'data', lambda rng: (rng.integers(24, 40), 30))
    run = [*flags(tmp_path / 'data', view_size=6, image_size=10), '--device=cpu', '--workdir=run']
    outcome = run_launch(*run, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert 'views of 6 pixels' in outcome.stderr
    outcome = run_launch('--workdir=run', '--mode=knn', '--device=cpu', cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr


def test_a_negative_side_is_refused_and_a_large_one_is_told(tmp_path):
    outcome = run_launch(*tiny_digits(view_size=-1), cwd=tmp_path)
    assert outcome.code == 1 and outcome.stderr.splitlines()[-1].startswith('Error: config.view_size=-1: ')
    outcome = run_launch(*config('digits.py', view_size=64), '--dry_run', '--device=cpu', cwd=tmp_path)
    assert 'config.view_size=64: the images have a side of 8 pixels' in outcome.stderr

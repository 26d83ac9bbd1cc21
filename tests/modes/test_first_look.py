"""`configs/folder.py:small`: a length that fits any folder."""

import pytest

from byol_func.errors import UserError
from byol_func.modes import inputs
from byol_func.utils import schedules
from configs import folder


@pytest.mark.parametrize('num_examples', [500, 2_000, 50_000])
def test_the_small_preset_sees_about_as_many_images_whatever_the_folder(num_examples):
    config = folder.get_config('small')
    share = inputs.shrinkage(config, num_examples)
    steps, warmup = (
        schedules.num_steps(share * epochs, num_examples, config.batch_size)
        for epochs in (config.num_epochs, config.lr_schedule.warmup_epochs)
    )
    assert 0 <= config.max_images - steps * config.batch_size <= config.batch_size
    assert warmup == steps // 10 and config.batch_size < 500 * (1 - config.dataset.val_fraction)


def test_a_limit_that_is_not_reached_or_not_set_changes_nothing():
    config = folder.get_config('small')
    assert inputs.shrinkage(config, 100) == 1.0
    config.max_images = 0
    assert inputs.shrinkage(config, 10**9) == 1.0


def test_an_unknown_preset():
    with pytest.raises(UserError, match='expected one of large, small'):
        folder.get_config('tiny')

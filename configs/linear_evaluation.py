"""Presets of the linear evaluation: official and constant.

A config takes one with `use(config, NAME)`; on the command line `--config.linear_eval_preset=NAME` puts
another in its place, and single fields of `config.linear_eval` given there as well still count:

  python launch.py --config=configs/digits.py --mode=linear_eval --workdir=DIR \\
    --config.linear_eval_preset=constant --config.linear_eval.num_epochs=50

Batch size, cached features and whatever else is not named here stay as the config has them.
"""

import ml_collections

from byol_func.errors import one_of

PRESETS = {
    # 80 epochs, a cosine from 0.2 for a batch of 256: `configs/eval.py` of the official code.
    'official': dict(
        num_epochs=80, optimizer='sgd', lr_schedule=dict(name='cosine', base_learning_rate=0.2, warmup_epochs=0.0)
    ),
    # 25 epochs at 0.1 whatever the batch: that of `cifar10.py:adam`.
    'constant': dict(
        num_epochs=25, optimizer='sgd', lr_schedule=dict(name='constant', base_learning_rate=0.1, warmup_epochs=0.0)
    ),
}


def use(config: ml_collections.ConfigDict, name: str) -> None:
    """Puts a preset in the place of a config's linear evaluation.

    Raises:
      UserError: there is no preset of that name.
    """
    preset = one_of('config.linear_eval_preset', name, PRESETS)
    config.linear_eval_preset = name
    config.linear_eval.update(preset)

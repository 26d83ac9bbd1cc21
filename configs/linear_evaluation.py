r"""Presets of the linear evaluation: official and constant.

A config chooses one with `use(config, NAME)`. `--config.linear_eval_preset=NAME` replaces it on the command
line; fields of `config.linear_eval` that are given beside it override the preset:

  python launch.py --config=configs/digits.py --mode=linear_eval --workdir=DIR \
    --config.linear_eval_preset=constant --config.linear_eval.num_epochs=50

Other fields, such as the batch size and `cache_features`, keep the values of the config.
"""

import ml_collections

from byol_func.errors import one_of

PRESETS = {
    # 80 epochs, a cosine from 0.2 for a batch of 256: `configs/eval.py` of the official code.
    'official': dict(
        num_epochs=80, optimizer='sgd', lr_schedule=dict(name='cosine', base_learning_rate=0.2, warmup_epochs=0.0)
    ),
    # 25 epochs at a rate of 0.1 for any batch size, as in `cifar10.py:adam`.
    'constant': dict(
        num_epochs=25, optimizer='sgd', lr_schedule=dict(name='constant', base_learning_rate=0.1, warmup_epochs=0.0)
    ),
}


def use(config: ml_collections.ConfigDict, name: str) -> None:
    """Replaces the linear evaluation of a config by a preset.

    Raises:
      UserError: `name` is not a preset.
    """
    preset = one_of('config.linear_eval_preset', name, PRESETS)
    config.linear_eval_preset = name
    config.linear_eval.update(preset)

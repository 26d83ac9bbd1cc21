"""The modes of `--mode`: each one is a function that takes a `Run`, in a module of its own.

This module imports nothing large, so that a mistake in a flag is reported before torch is loaded.
"""

from collections.abc import Mapping
from typing import Any

from byol_func.errors import UserError

# Mode -> module and function. These modes write a summary.
MEASURING = {
    'pretrain': 'pretrain.pretrain',
    'linear_eval': 'on_top.linear_eval',
    'fine_tune': 'on_top.fine_tune',
    'eval': 'evaluate.evaluate',
    'knn': 'on_features.run_knn',
    'logistic': 'on_features.run_logistic',
}
# These modes neither train nor measure anything and write no summary.
TOOLS = {
    'preview': 'preview.preview',
    'import': 'import_checkpoint.import_checkpoint',
    'export': 'export.export',
    'replay': 'replay.replay',
    'embed': 'embed.embed',
    'predict': 'predict.predict',
    'similar': 'similar.similar',
    'shards': 'shards.make_shards',
}
MODES = (*MEASURING, *TOOLS)
TRAINING_MODES = ('pretrain', 'linear_eval', 'fine_tune')  # These save checkpoints of their own.
EXPORT_FORMATS = ('official', 'encoder', 'module', 'timm', 'torchvision', 'safetensors', 'onnx', 'hub', 'mlflow')

_FROM_A_CHECKPOINT = ('linear_eval', 'fine_tune', 'eval', 'knn', 'logistic', 'export', 'embed', 'predict', 'similar')
# Flags that only some modes use. The other modes refuse them rather than ignore them silently.
HEEDED_BY = {
    'checkpoint': (*_FROM_A_CHECKPOINT, 'import', 'replay'),
    'resume': ('pretrain', *_FROM_A_CHECKPOINT),
    'split': ('eval', 'embed', 'similar'),
    'images': ('predict', 'similar'),
    'output': ('export', 'predict', 'similar', 'shards'),
    'images_per_shard': ('shards',),
    'format': ('export', 'embed'),
    'push': ('export',),
    'register': ('export',),
    'follow': ('eval',),
    'dry_run': ('pretrain',),
    'tensorboard': (*MEASURING, 'embed'),
    **{f'mlflow_{name}': (*MEASURING, 'export') for name in ('tracking_uri', 'run_id')},
    **{f'mlflow_{name}': tuple(MEASURING) for name in ('experiment_name', 'checkpoints')},
}
_NO_CHECKPOINT = (
    'pre-training starts from new weights, or resumes from the newest checkpoint of --workdir; to continue an official '
    'checkpoint, import it first (--mode=import)'
)


def check_flags(mode: str, given: Mapping[str, Any]) -> None:
    """Checks that a mode uses every flag that was given.

    Args:
      mode: one of `MODES`.
      given: the values of the flags on the command line, by name.

    Raises:
      UserError: the mode does not use one of them.
    """
    for flag, value in given.items():
        heeding = HEEDED_BY.get(flag, MODES)
        if mode not in heeding:
            why = f'only with --mode={" or ".join(heeding)}, not --mode={mode}'
            raise UserError(
                f'--{flag}={value}: {_NO_CHECKPOINT if (flag, mode) == ("checkpoint", "pretrain") else why}'
            )
    if given.get('resume') == 'never' and mode not in TRAINING_MODES:
        raise UserError(f'--resume=never: --mode={mode} trains nothing; expected auto or must')

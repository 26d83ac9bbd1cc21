"""Where a run goes on: the newest checkpoint of its workdir, if that is of the same run."""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from byol_func.loop_config import LoopConfig
from byol_func.utils import checkpointing
from byol_func.utils.helpers import UserError


def restore_latest(loop: LoopConfig, template: Any) -> tuple[Any, int]:
    """The newest state of this mode in the workdir and the next step, or the template and 0.

    Raises:
      UserError: the checkpoint is damaged, does not fit, or was made with another config.
    """
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    if not found:
        return template, 0
    check_continues(loop)
    checkpoint = checkpointing.load(found[-1][1])
    state = checkpointing.restore(checkpoint, template)
    logging.info('Resuming from %s, saved after step %d', checkpoint.path, checkpoint.step)
    return state, checkpoint.step + 1


def check_continues(loop: LoopConfig) -> None:
    """Checks that the workdir's newest checkpoint of this mode, if any, is of the same config.

    Raises:
      UserError: it is of another, or of another encoder.
    """
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    saved = checkpointing.load(found[-1][1]).config if found else loop.config
    other_protocols = [p for p in ('linear_eval', 'fine_tune') if not loop.mode.startswith(p)]
    free = [*FREE_FIELDS, *other_protocols]
    for field, (old, new) in _differences(saved, loop.config, free).items():
        if field != 'backbone':
            what = f'a run with config.{field}={old!r}, not {new!r}; go on with the same value'
        elif new is None:  # The encoder is not known yet.
            continue
        else:
            what = f'a {loop.mode} of another encoder; remove its checkpoints'
        raise UserError(f'--workdir={loop.workdir}: holds {what} or choose another --workdir')


# Fields that may change between a run and its continuation: they do not touch the numbers.
FREE_FIELDS = (
    'augmentations_preset', 'checkpointing', 'compile', 'dataset.cache_dir', 'dataset.max_bad_fraction',
    'dataset.max_gib', 'dataset.num_workers', 'dataset.root', 'eval_every_epochs', 'evaluation',
    'final_linear_eval', 'log_every_steps', 'monitoring', 'num_seeds', 'preview',
)


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any], free: Sequence[str], prefix: str = ''):
    different = {}
    for key in sorted(set(saved) | set(asked)):
        old, new = saved.get(key), asked.get(key)
        if prefix + key in free:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            different |= _differences(old, new, free, f'{prefix}{key}.')
        elif old != new:
            different[prefix + key] = (old, new)
    return different

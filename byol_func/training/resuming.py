"""Resumes a run from the newest good checkpoint in its workdir, if the checkpoint belongs to the same run.

The values of `resume`:
  auto: resume from the newest good checkpoint, or start from scratch if there is none.
  anyway: like `auto`, but accept a different training set.
  must: resume from the newest checkpoint, which must be good.
  never: start from scratch, in a workdir without checkpoints.
"""

import itertools
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from byol_func.data.fingerprint import difference
from byol_func.errors import UserError, counted
from byol_func.runtime import collectives
from byol_func.training import agreement
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import checkpointing, variants
from byol_func.utils.checkpointing import Checkpoint
from byol_func.workdir.files import flatten

RESUME = ('auto', 'must', 'never', 'anyway')
# Suffix of checkpoints that cannot be used; they are left to the user.
UNUSABLE = '.unusable'
_PROTOCOLS = ('linear_eval', 'fine_tune')  # Trained on top of a pre-training, in the same workdir.


def restore_latest(loop: LoopConfig, template: Any, fingerprint: Mapping[str, Any] | None = None) -> tuple[Any, int]:
    """Returns the newest good state of this mode and the next step, or the template and 0.

    All replicas get the state of the first replica, or an error if their own differs. Newer files that cannot be used
    are renamed with the suffix `.unusable`, so that the run does not overwrite them. Without the `fingerprint` of the
    training set it is not checked.

    Raises:
      UserError: no checkpoint can be used as `loop.resume` requires, or it does not fit the template, or it was
        made with another config or on other images.
    """
    state, first_step = _restore_own(loop, template, fingerprint or {})
    config = {name: value for name, value in flatten(loop.config).items() if not name.startswith(FREE_FIELDS)}
    return agreement.agree(state, first_step, config, fingerprint or {})


def _restore_own(loop: LoopConfig, template: Any, fingerprint: Mapping[str, Any]) -> tuple[Any, int]:
    if loop.resume == 'never':
        _refuse(checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode))
        return template, 0
    checkpoint, unusable = newest_good(loop.checkpoint_dir, loop.mode, loop.resume)
    if checkpoint is None:
        return template, 0
    _check_config(loop, checkpoint)
    different = difference(checkpoint.data, fingerprint) if fingerprint else ''
    if different and loop.resume != 'anyway':
        raise UserError(
            f'--workdir={loop.workdir}: holds a run on {different}; resume with the images of that run, or with '
            '--resume=anyway on these, or choose another --workdir'
        )
    state = checkpointing.restore(checkpoint, template)
    if collectives.replica_index() == 0:
        for path in unusable:
            _set_aside(path)
    done = counted(checkpoint.step + 1, 'step')
    logging.info('Resuming from %s, saved after %s', checkpoint.path, done)
    return state, checkpoint.step + 1


def seconds_before(loop: LoopConfig, first_step: int) -> float:
    """Returns the seconds that earlier processes took up to the checkpoint before `first_step`; 0 if it is not known.

    Checkpoints of earlier versions do not hold them. What a process did after its last checkpoint does not count.
    """
    path = checkpointing.file_name(loop.checkpoint_dir, loop.mode, first_step - 1)
    return float(checkpointing.load_scalars(path).get('seconds', 0.0)) if first_step and path.exists() else 0.0


def newest_good(directory: str | os.PathLike, mode: str, resume: str) -> tuple[Checkpoint | None, list[pathlib.Path]]:
    """Returns the newest readable checkpoint of a mode, and the newer files that cannot be read.

    Raises:
      UserError: there are files but none can be read, or `resume` is 'must' and the newest cannot be read.
    """
    unusable, first_error = [], None
    for step, path in reversed(checkpointing.list_checkpoints(directory, mode)):
        try:
            checkpoint = checkpointing.load(path)
            if (checkpoint.mode, checkpoint.step) != (mode, step):
                raise UserError(
                    f'--checkpoint={path}: holds step {checkpoint.step} of {checkpoint.mode}, '
                    'expected those in its name'
                )
        except UserError as error:
            if resume == 'must':
                raise UserError(f'{error}; --resume=auto resumes from an older one') from error
            logging.warning('%s; looking for an older one', error)
            unusable.append(path)
            first_error = first_error or error
        else:
            return checkpoint, unusable
    if first_error:
        raise UserError(
            f'{first_error}; nor is any older checkpoint of {mode} in {directory}; move them away '
            'or choose another --workdir to start from the beginning'
        )
    return None, unusable


def _set_aside(path: pathlib.Path) -> None:
    names = (f'{path.name}{UNUSABLE}{i or ""}' for i in itertools.count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    try:
        path.rename(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f'--workdir={path.parent.parent}: cannot rename {path.name} ({error.strerror})') from error
    logging.warning('Renamed %s to %s', path, target.name)


def check_policy(loops: Sequence[LoopConfig], mode: str) -> None:
    """Checks that the workdirs hold checkpoints of a mode, or none, as `resume` requires.

    Args:
      loops: the loop settings of every seed.
      mode: the mode of the run; pre-training owns all checkpoints of its workdir.

    Raises:
      UserError: --resume=must without checkpoints, or --resume=never with checkpoints.
    """
    pattern = '*.safetensors' if mode == 'pretrain' else f'{mode}*.safetensors'
    found = [(0, path) for loop in loops for path in sorted(pathlib.Path(loop.checkpoint_dir).glob(pattern))]
    if loops[0].resume == 'must' and not found:
        directory = loops[0].checkpoint_dir
        raise UserError(f'--resume=must: expected a checkpoint of {mode} in {directory}, found none')
    if loops[0].resume == 'never':
        _refuse(found)


def _refuse(found: Sequence[tuple[int, pathlib.Path]]) -> None:
    for _, path in found[-1:]:
        raise UserError(
            f'--resume=never: {path.parent} holds {path.name}, which a new run would overwrite; '
            'choose another --workdir or move the checkpoints away'
        )


def check_continues(loop: LoopConfig) -> None:
    """Checks that the workdir's newest good checkpoint of this mode, if any, has the same config.

    Raises:
      UserError: it has another config or another encoder, or there are checkpoints but none is good.
    """
    if loop.resume != 'never':
        checkpoint, _ = newest_good(loop.checkpoint_dir, loop.mode, loop.resume)
        if checkpoint is not None:
            _check_config(loop, checkpoint)


def _check_config(loop: LoopConfig, checkpoint: Checkpoint) -> None:
    other_protocols = [p for p in _PROTOCOLS if not loop.mode.startswith(p)]
    free = [*FREE_FIELDS, *other_protocols, *(() if loop.mode == 'pretrain' else ('init_from', 'init_digest'))]
    different = differences(checkpoint.config, loop.config, free)
    if 'init_digest' not in different:
        different.pop('init_from', None)  # The same file, in another place.
    elif 'init_from' in different:
        different.pop('init_digest')
    if 'variant_digest' not in different:
        different.pop('variant', None)  # The same file, in another place.
    for field, (old, new) in different.items():
        if field == 'variant_digest':
            what = f'a run from before an edit of {_how_to_undo(loop, variants.edited(old, new))},'
        elif field == 'init_digest':
            what = f'a run that started from another file of the name config.init_from={loop.config["init_from"]!r};'
        elif field not in FOUND:
            what = f'a run with config.{field}={old!r}, not {new!r}; resume with the same value'
        elif old is None or new is None:  # Not known yet.
            continue
        else:
            what = f'a {loop.mode} of another {FOUND[field]}; remove its checkpoints'
        raise UserError(f'--workdir={loop.workdir}: holds {what} or {_elsewhere(loop)}')


def _how_to_undo(loop: LoopConfig, edited: Sequence[str]) -> str:
    """Returns the edited files of an update rule, and what to do; the workdir holds a copy of the rule's own file."""
    path, copy = loop.config['variant'], os.path.join(loop.workdir, 'variant.py')
    own = variants.stored_path(variants.find(path))
    has_copy = own in edited and os.path.exists(copy)
    others = [file for file in edited if not (has_copy and file == own)]
    undo = [f'copy {copy} back over {path}'] if has_copy else []
    undo += [f'undo the edit of {", ".join(others)}'] if others else []
    return f'{", ".join(edited)}; {" and ".join(undo)}'


def _elsewhere(loop: LoopConfig) -> str:
    """Returns advice on keeping both runs: flags that start the protocol in a workdir of its own."""
    mode = next((mode for mode in _PROTOCOLS if loop.mode.startswith(mode)), '')
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, 'pretrain') if mode else []
    if not found:
        return 'choose another --workdir'
    parent, name = os.path.split(os.path.normpath(loop.workdir))
    seed = loop.seed_index is not None and parent  # There, each seed is a run of its own.
    base, below = (parent, name) if seed else (os.path.normpath(loop.workdir), '')
    free = next(path for i in itertools.count(2) if not os.path.exists(path := os.path.join(f'{base}-{i}', below)))
    flags = [f'--mode={mode}', f'--workdir={os.path.normpath(free)}', f'--checkpoint={found[-1][1]}']
    flags += ['--config.num_seeds=1', f'--config.random_seed={loop.seed}'] if seed else []
    return f'keep both by running the same command with {shlex.join(flags)}'


# Fields that a training adds to its config once they are known. The user does not set them, but a resumed run must
# agree on them.
FOUND = {'backbone': 'encoder', 'chosen': 'learning rate or weight decay, which a sweep chose'}
# Fields that may change when a run is resumed, because they do not affect its numbers.
FREE_FIELDS = (
    'augmentations_preset',
    'checkpointing',
    'compile',
    'dataset.allow_empty',
    'dataset.cache_dir',
    'dataset.max_bad_fraction',
    'dataset.max_gib',
    'dataset.num_workers',
    'dataset.root',
    'eval_every_epochs',
    'evaluation',
    'final_linear_eval',
    'gradient_bucket_mb',
    'imported',
    'linear_eval.compare_pixels',
    'linear_eval_preset',
    'log_every_steps',
    'monitoring',
    'num_seeds',
    'pictures',
    'preview',
)

# Defaults for fields that earlier versions did not have; they describe the behaviour of those versions.
_BEFORE: Mapping[str, Any] = {
    'accumulate_steps': 1,
    'max_images': 0,
    'dataset.exif_orientation': False,
    'dataset.value_range': [],
    'dataset.channels': 0,
    'network.norm': 'batch_norm',
    'network.head_norm': 'batch_norm',
    'network.projector_depth': 2,
    'network.predictor_depth': 2,
    'variant_config': {},
}
# Names for the same thing: earlier versions read Imagenette as a folder. A fingerprint compares the images.
_ALIKE: Mapping[str, Sequence[Any]] = {'dataset.name': ('folder', 'imagenette')}


def differences(
    saved: Mapping[str, Any], asked: Mapping[str, Any], free: Sequence[str], prefix: str = ''
) -> dict[str, tuple[Any, Any]]:
    """Returns field -> (saved, asked) for every field in which two configs differ, except the free ones."""
    different: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(saved) | set(asked)):
        old, new = saved.get(key, _BEFORE.get(prefix + key)), asked.get(key)
        # An unused field that a later version added, or an argument of an optimiser that it added.
        later = key not in saved and (new == '' or prefix.endswith('optimizer_config.'))
        if prefix + key in free or later:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            different |= differences(old, new, free, f'{prefix}{key}.')
        elif old != new and not all(value in _ALIKE.get(prefix + key, ()) for value in (old, new)):
            different[prefix + key] = (old, new)
    return different

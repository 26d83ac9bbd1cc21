"""Finds the config that a workdir or a checkpoint was made with."""

import os
import pathlib


def find_config(workdir: str | None, checkpoint: str | None, mode: str) -> str | None:
    """Finds the file whose config `mode` starts with when the user names no config.

    The candidates, in this order, are the config of this mode's latest run in the workdir, the config of its
    pre-training, the config of its latest run of any mode, the last checkpoint in the workdir by name (such as
    --mode=import writes) and --checkpoint, a file or a workdir.

    Returns:
      The path of a config*.json or of a checkpoint; None if there is neither.
    """
    if workdir:
        folder = pathlib.Path(workdir)
        for name in (f'config.{mode}.json', 'config.pretrain.json', 'config.json'):
            if (folder / name).is_file():
                return os.fspath(folder / name)
        found = sorted((folder / 'checkpoints').glob('*.safetensors'))
        if found:
            return os.fspath(found[-1])
    if checkpoint and os.path.isdir(checkpoint):
        return find_config(checkpoint, None, mode)
    return checkpoint

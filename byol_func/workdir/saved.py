"""Finds the config that a workdir or a checkpoint was made with."""

import os
import pathlib


def find_config(workdir: str | None, checkpoint: str | None, mode: str) -> str | None:
    """The file that holds the config to start `mode` with where the user names none.

    It is the config of the latest run of this mode in the workdir, or else that of the pre-training,
    or else that of the run that came last; without any, the newest checkpoint of the workdir, as
    --mode=import leaves it. A workdir that has neither leaves the file of --checkpoint.

    Returns:
      The path of a config*.json or of a checkpoint; None where there is neither.
    """
    if workdir:
        folder = pathlib.Path(workdir)
        for name in (f'config.{mode}.json', 'config.pretrain.json', 'config.json'):
            if (folder / name).is_file():
                return os.fspath(folder / name)
        found = sorted((folder / 'checkpoints').glob('*.safetensors'))
        if found:
            return os.fspath(found[-1])
    return checkpoint

"""`mlflow.json` of a workdir: records the run of every mode on every tracking server."""

import json
import os
import pathlib
from typing import Any

from byol_func.workdir import files


class RunFile:
    """The entries `{'uri', 'run_id', 'config'}` of every mode: the latest one and those on other servers.

    The latest entry of a mode is stored at the mode's top level, where earlier versions look for it; the
    other entries are in its list `elsewhere`.

    Args:
      workdir: the folder of the file.
      is_follower: selects the separate file for followers, which write at the same time as the training.
    """

    def __init__(self, workdir: str | os.PathLike, is_follower: bool = False):
        self._path = pathlib.Path(workdir, 'mlflow.follow.json' if is_follower else 'mlflow.json')

    def find(self, mode: str, uri: str) -> dict[str, Any] | None:
        """Returns the entry of a mode on one server, or None."""
        return next((entry for entry in self._entries(mode) if entry.get('uri') == uri), None)

    def elsewhere(self, mode: str, uri: str) -> list[dict[str, Any]]:
        """Returns the entries of a mode on all other servers."""
        return [entry for entry in self._entries(mode) if entry.get('uri') != uri]

    def add(self, mode: str, uri: str, run_id: str, config: str) -> None:
        """Writes the entry of a run, replacing an entry of the same mode on the same server.

        Raises:
          UserError: the file cannot be written.
        """
        entry: dict[str, Any] = {'uri': uri, 'run_id': run_id, 'config': config}
        if others := self.elsewhere(mode, uri):
            entry |= {'elsewhere': others}
        files.write_json(self._path, {**self._read(), mode: entry})

    def _entries(self, mode: str) -> list[dict[str, Any]]:
        latest = dict(self._read().get(mode, {}))
        others = latest.pop('elsewhere', [])
        return [entry for entry in (latest, *others) if entry.get('run_id')]

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}

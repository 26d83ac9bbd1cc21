"""`mlflow.json` of a workdir: which runs of which tracking servers are those of its modes."""

import json
import os
import pathlib
from typing import Any

from byol_func.workdir import files


class RunFile:
    """Entries `{'uri', 'run_id', 'config'}` of every mode, the latest and those of other servers.

    The latest entry of a mode stands at its top level, where earlier versions look for it; the others are
    in its list `elsewhere`.

    Args:
      workdir: whose file it is.
      is_follower: a follower works at the same time as the training, so its runs have a file of their own.
    """

    def __init__(self, workdir: str | os.PathLike, is_follower: bool = False):
        self._path = pathlib.Path(workdir, 'mlflow.follow.json' if is_follower else 'mlflow.json')

    def find(self, mode: str, uri: str) -> dict[str, Any] | None:
        """The entry of a mode on one server, or None."""
        return next((entry for entry in self._entries(mode) if entry.get('uri') == uri), None)

    def elsewhere(self, mode: str, uri: str) -> list[dict[str, Any]]:
        """The entries of a mode on other servers."""
        return [entry for entry in self._entries(mode) if entry.get('uri') != uri]

    def add(self, mode: str, uri: str, run_id: str, config: str) -> None:
        """Writes the entry of a run; it replaces that of the same mode on the same server.

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

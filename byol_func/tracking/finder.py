"""Finds the mlflow run that a mode continues, or the parent and experiment for a new one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from byol_func.console import readable
from byol_func.errors import UserError, redact
from byol_func.tracking.client import artifact_location, make_client, one_line
from byol_func.tracking.run_file import RunFile
from byol_func.utils import checkpointing
from byol_func.workdir.run import Run

FOLLOWER = 'follow'  # The mode name of a follower's run.
_CONTINUED = ('pretrain', 'linear_eval', 'fine_tune', FOLLOWER)  # Other modes never resume: each start makes a new run.
PARENT = 'mlflow.parentRunId'  # The tag by which mlflow nests runs.
_MAX_TAG = 5000  # Characters, a limit of mlflow.


class Place(NamedTuple):
    """The run to continue (or None), the run to nest a new one under (or None), and the experiment."""

    own: Any
    parent: Any
    experiment_id: str


class Finder:
    """Looks for the run of one mode (or of `FOLLOWER`) of a workdir on the tracking server.

    `parent` returns the run of all seeds, if this run is one of several seeds.
    """

    def __init__(self, run: Run, mode: str, client: Any, parent: Callable[[], Any] | None):
        assert run.tracking is not None
        self._run, self._mode, self._client, self._parent = run, mode, client, parent
        self._tracking = run.tracking
        self._place = redact(run.tracking.uri)  # The form for files and messages.
        self._runs = RunFile(run.workdir, is_follower=mode == FOLLOWER)

    def look_up(self) -> Place:
        """Returns the existing run, or the parent and experiment for a new one.

        Raises:
          UserError: the run to nest under does not exist, or the experiment was deleted or refused.
        """
        if own := self._own_run():
            return Place(own, None, own.info.experiment_id)
        if self._parent:
            parent = self._parent()
            return Place(None, parent, parent.info.experiment_id)
        parent = self.find_parent()
        return Place(None, parent, parent.info.experiment_id if parent else self._experiment_id())

    def find_parent(self) -> Any:
        """Returns the run of --mlflow_run_id, or that of the pre-training; None if there is none.

        Raises:
          UserError: the run of --mlflow_run_id does not exist.
        """
        asked = self._tracking.run_id
        parent_id = asked or (self._run_of_pretraining() if self._mode != 'pretrain' else None)
        parent = self._find_run(parent_id) if parent_id else None
        if asked and not parent:
            raise UserError(f'--mlflow_run_id={asked}: no such run in {self._place}; expected the id of a run there')
        return parent

    def _own_run(self) -> Any:
        """Returns the mlflow run to continue, or None."""
        entry = self._runs.find(self._mode, self._place)
        saved = checkpointing.list_checkpoints(os.path.join(self._run.workdir, 'checkpoints'), self._mode)
        if self._mode not in _CONTINUED or not entry or not (saved or entry.get('config') == self._digest()):
            return None
        run = self._find_run(entry['run_id'])
        if run is None:
            logging.warning('mlflow run %s of this workdir is gone; a new one replaces it', entry['run_id'])
        return run

    def new_run(self, place: Place) -> Any:
        """Creates the mlflow run at its place."""
        config, workdir = self._run.config, os.path.abspath(self._run.workdir)
        name, parent = os.path.basename(workdir), place.parent
        tags = {
            'mode': self._mode,
            'dataset': config.dataset.name,
            'encoder': config.network.encoder_class,
            'seed': str(config.random_seed),
            'num_seeds': str(config.num_seeds),
            'workdir': workdir,
            'command': self._run.command,
            'mlflow.source.name': 'launch.py',
            'mlflow.source.type': 'LOCAL',
            **({PARENT: parent.info.run_id} if parent else {}),
        }
        return self._client.create_run(
            place.experiment_id,
            tags={key: readable(value)[:_MAX_TAG] for key, value in tags.items()},
            run_name=readable(name if self._mode == 'pretrain' else f'{name} {self._mode}'),
        )

    def remember(self, run_id: str) -> None:
        """Records the run of this mode, and ends its earlier runs that any server still shows as running.

        The lock of the workdir says that none of them is; followers take no lock, so others may run beside them.
        """
        before = None if self._mode == FOLLOWER else self._runs.find(self._mode, self._place)
        self._runs.add(self._mode, self._place, run_id, self._digest())
        for entry in (before, *self._runs.elsewhere(self._mode, self._place)):
            if entry and entry['run_id'] != run_id:
                self._end(entry, run_id)

    def _end(self, entry: dict[str, Any], run_id: str) -> None:
        """Ends the run of an entry, which run `run_id` follows, if it is still shown as running."""
        try:
            client = self._client if entry['uri'] == self._place else make_client(entry['uri'])
            if client.get_run(entry['run_id']).info.status == 'RUNNING':
                client.set_tag(entry['run_id'], 'continued_as', f'{run_id} in {self._place}')
                client.set_terminated(entry['run_id'], 'KILLED')
        except Exception as error:  # The server may be gone, or need a password, which is not stored.
            logging.warning(
                'mlflow run %s in %s may still be shown as running (%s)', entry['run_id'], entry['uri'], one_line(error)
            )

    def _run_of_pretraining(self) -> str | None:
        places = [self._run.workdir]
        if self._run.checkpoint:
            places = [os.path.dirname(os.path.dirname(os.path.abspath(self._run.checkpoint)))]
        entries = [RunFile(place).find('pretrain', self._place) for place in places]
        return next((entry['run_id'] for entry in entries if entry), None)

    def _find_run(self, run_id: str) -> Any:
        """Returns the run, or None if it does not exist or was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ('RESOURCE_DOES_NOT_EXIST', 'INVALID_PARAMETER_VALUE'):
                return None
            raise
        return run if run.info.lifecycle_stage == 'active' else None

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._tracking.experiment_name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # Another process may have created it just now.
                return self._client.create_experiment(name, artifact_location(self._tracking.uri))
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != 'active':
            raise UserError(
                f'--mlflow_experiment_name={name}: deleted or refused by {self._place}; choose another name'
            )
        return found.experiment_id

    def _digest(self) -> str:
        """Returns a hash of the config, which tells apart runs with different configs."""
        return hashlib.blake2b(json.dumps(self._run.plain_config(), sort_keys=True).encode(), digest_size=8).hexdigest()

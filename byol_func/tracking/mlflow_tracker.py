"""Optional tracking with mlflow, which is imported only if `--mlflow_tracking_uri` is given.

A thread reads the lines that the training appends to `metrics.jsonl` and sends them in batches. The file
is the buffer: the training never waits for a server, a server that comes back receives all it missed,
and a resumed run sends the metrics that the server does not have yet. With `--mode=eval --follow` the
file is `eval.jsonl`.
"""

import os
import pathlib
import threading
import time
from typing import Any

from absl import logging

from byol_func.console import readable
from byol_func.errors import UserError, redact
from byol_func.tracking.client import LOGIN, Voice, asks_for_login, make_client, one_line
from byol_func.tracking.finder import FOLLOWER, PARENT, Finder, Place
from byol_func.tracking.tail import file_time, of_mode, own_files, results
from byol_func.utils import checkpointing
from byol_func.workdir.files import flatten
from byol_func.workdir.run import Run

_EVERY_SECONDS, _MOST_SECONDS = 2.0, 60.0  # Interval between reads of the file; its maximum while no server answers.
_PATIENCE = 20.0  # Seconds that the end of a run waits for an answer,
_SLOWEST = 1e6  # plus the time that an upload takes at this many bytes per second.
_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 1000, 100, 6000  # mlflow's limits: per request, and length of a parameter.
_OLD_MAX_VALUE = 250  # Length of a parameter before mlflow 1.28.


def start(run: Run, mode: str, parent: Any) -> 'Tracker | None':
    """Returns the tracker of a mode; None without `run.tracking`.

    A resumed run continues its own mlflow run, which is recorded in `mlflow.json` of the workdir. A new
    run is nested under `parent`, else under `--mlflow_run_id`, else under the pre-training of the
    workdir (with a checkpoint, of the checkpoint's workdir), if that was tracked in the same place.

    Raises:
      UserError: mlflow is not installed, there is no such run, or the place cannot be used. A server
        that does not answer is not an error: the tracker tries again while the run goes on.
    """
    return Tracker(run, mode, parent) if run.tracking else None


class Tracker:
    """One mlflow run and the thread that sends to it."""

    def __init__(self, run: Run, mode: str, parent: 'Tracker | None'):
        self._run, self._mode, self._parent = run, mode, parent
        assert run.tracking is not None
        self._tracking = run.tracking
        self._uri = run.tracking.uri
        self._client: Any = parent._client if parent else make_client(self._uri)
        self._config = run.plain_config()
        self._finder = Finder(run, mode, self._client, parent.connect if parent else None)
        self._tail = of_mode(run, mode)
        self._pending: list[Any] = []  # Metrics that were read but not accepted by the server yet.
        self._sent: dict[str, set[int]] = {}  # name -> steps that the server has.
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._status = 'RUNNING'
        self._started = file_time(run.workdir)
        self._answers, self._is_down = 0, False  # Number of successful requests; whether the last attempt failed.
        self._voice: Voice = parent._voice if parent else Voice()
        self._patience = _PATIENCE
        self._place: Place | None = None
        self._found: Any = None  # The mlflow run, once found or created.
        self._caught_up = False
        if parent is None:
            self._first_contact()
        self._thread = threading.Thread(target=self._work, name=f'mlflow {mode}', daemon=True)
        self._thread.start()

    def _first_contact(self) -> None:
        """Looks up the place of the run once, to report mistakes of the user before the work starts."""
        from mlflow.exceptions import MlflowException

        try:
            place = self._finder.look_up()
            # A follower looks again later: the training to nest under may not have started yet.
            self._place = None if self._mode == FOLLOWER else place
        except (MlflowException, OSError) as error:
            is_local = not self._uri.startswith(('http:', 'https:'))
            refused = ('INVALID_PARAMETER_VALUE', 'PERMISSION_DENIED', 'UNAUTHENTICATED', 'NOT_FOUND')
            if is_local or getattr(error, 'error_code', None) in refused:
                reason = LOGIN if asks_for_login(error) else one_line(error)
                raise UserError(f'--mlflow_tracking_uri={redact(self._uri)}: {reason}') from error
            self._warn(error)

    def connect(self) -> Any:
        """Returns the mlflow run, which the first call looks up or creates.

        Raises:
          UserError: the run to nest under does not exist.
          mlflow.exceptions.MlflowException: the server does not answer or refuses the request.
        """
        with self._lock:
            if not self._found:
                self._place = self._place or self._finder.look_up()
                self._found = self._place.own or self._finder.new_run(self._place)
                self._finder.remember(self._found.info.run_id)
                logging.info('mlflow run %s in %s', self._found.info.run_id, redact(self._uri))
            return self._found

    def _catch_up(self) -> None:
        """Sends the config, and asks for the metrics that the server has from an earlier process."""
        from mlflow.entities import Param

        run_id, data = self._found.info.run_id, self._found.data
        # mlflow does not allow a run to change its parameters.
        flat = {k: readable(str(v))[:_MAX_VALUE] for k, v in flatten(self._config).items()}
        params = [Param(k, v) for k, v in flat.items() if k not in data.params]
        for i in range(0, len(params), _MAX_PARAMS):
            self._send_params(run_id, params[i : i + _MAX_PARAMS])
        for name in data.metrics:
            if name not in self._sent:
                self._sent[name] = {metric.step for metric in self._client.get_metric_history(run_id, name)}
                self._answers += 1
        if self._found.info.status != 'RUNNING':
            self._client.update_run(run_id, status='RUNNING')
        self._caught_up = True

    def _nest(self) -> None:
        """Nests the run of a follower under that of the training, which may begin to be tracked after it."""
        if self._mode == FOLLOWER and PARENT not in self._found.data.tags and (parent := self._finder.find_parent()):
            self._client.set_tag(self._found.info.run_id, PARENT, parent.info.run_id)
            self._found = self._client.get_run(self._found.info.run_id)

    def _send_params(self, run_id: str, params: list[Any]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(run_id, params=params)
        except MlflowException as error:  # An older server accepts only shorter values.
            if error.error_code != 'INVALID_PARAMETER_VALUE':
                raise
            self._client.log_batch(run_id, params=[Param(p.key, p.value[:_OLD_MAX_VALUE]) for p in params])

    def _work(self) -> None:
        """The body of the thread: sends metrics until the run is closed."""
        wait = 0.0
        while True:
            closing = self._closing.wait(wait)
            try:
                if self._mode != FOLLOWER or self._tail.path.exists():
                    self.connect()
                    if not self._caught_up:
                        self._catch_up()
                    self._nest()
                    while self._send_metrics():
                        self._answers += 1
                    if closing:
                        self._finish()
                wait, self._is_down = _EVERY_SECONDS, False
            except Exception as error:  # No error of tracking may stop the training.
                self._is_down = True
                self._warn(error)
                wait = min(2 * max(wait, _EVERY_SECONDS), _MOST_SECONDS)
            if closing:
                return

    def _send_metrics(self) -> bool:
        """Sends one batch; False if there is nothing to send."""
        from mlflow.entities import Metric

        if not self._pending:
            now = int(time.time() * 1000)  # Kept when sending again: mlflow ignores an identical point.
            for record in self._tail.read():
                for name, value in record.scalars.items():
                    if record.step not in self._sent.setdefault(name, set()):
                        self._sent[name].add(record.step)
                        self._pending.append(Metric(name, value, now, record.step))
        if not self._pending:
            return False
        batch = self._pending[:_MAX_METRICS]
        self._client.log_batch(self._found.info.run_id, metrics=batch)
        del self._pending[: len(batch)]
        return True

    def _finish(self) -> None:
        """Sends the results of a run that finished; sends the files and the status of every run."""
        from mlflow.entities import Metric, RunTag

        run_id, workdir, mode = self._found.info.run_id, self._run.workdir, self._mode
        if self._status == 'FINISHED':
            steps, metrics, chosen = results(workdir, mode, self._started)
            known = self._client.get_run(run_id).data.metrics
            now = int(time.time() * 1000)
            new = [Metric(k, v, now, steps) for k, v in metrics.items() if known.get(k) != v]
            self._client.log_batch(run_id, metrics=new, tags=[RunTag(k, v) for k, v in chosen.items()])
        for path in own_files(workdir, mode, self._started):
            self._upload(path)
        if self._tracking.checkpoints:
            for _, path in checkpointing.list_checkpoints(os.path.join(workdir, 'checkpoints'), mode)[-1:]:
                self._upload(path, 'checkpoints')
        self._client.set_terminated(run_id, self._status)

    def _upload(self, path: pathlib.Path, folder: str | None = None) -> None:
        self._patience = _PATIENCE + path.stat().st_size / _SLOWEST
        self._client.log_artifact(self._found.info.run_id, str(path), folder)
        self._answers += 1

    def close(self, status: str) -> None:
        """Sends the rest, as long as the server answers, and ends the run as FINISHED, FAILED or KILLED."""
        self._status = status
        self._closing.set()
        answers, since = self._answers, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < self._patience:
            self._thread.join(0.2)
            if self._answers != answers:
                answers, since = self._answers, time.monotonic()
        if self._thread.is_alive() or self._is_down:
            self._voice.say_once(
                '%s has not received everything that is in %s; the same command, started again, sends the rest',
                redact(self._uri),
                self._run.workdir,
            )

    def _warn(self, error: Exception) -> None:
        if asks_for_login(error):
            self._voice.say_once(
                f'%s {LOGIN}; the run continues, and the same command, started again, sends the missing data',
                redact(self._uri),
            )
            return
        self._voice.say_once(
            '%s accepts no data (%s); the run continues and sends the missing data later',
            redact(self._uri),
            one_line(error),
        )

"""Tracking with mlflow, an option: only `--mlflow_tracking_uri` makes anything here import it.

A thread reads what the training appends to `metrics.jsonl` and sends it in batches. The file is the
buffer: the training waits for no server, a server that comes back gets what it missed, and a run
that is resumed sends what the server does not have yet.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import re
import threading
import time
from typing import Any

from absl import logging

from byol_func import reporting
from byol_func.runs import Run
from byol_func.runtime import collectives
from byol_func.tracking_files import MetricsTail, final_metrics, flatten, own_files
from byol_func.utils import checkpointing
from byol_func.utils.helpers import UserError

# Unless the user has set them: fail soon, this module tries again by itself; no word to third
# parties; the folder of an older mlflow still opens.
_ENVIRONMENT = {
    'MLFLOW_HTTP_REQUEST_TIMEOUT': '5',
    'MLFLOW_HTTP_REQUEST_MAX_RETRIES': '0',
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT': 'true',
    'MLFLOW_ALLOW_FILE_STORE': 'true',
    'GIT_PYTHON_REFRESH': 'quiet',
}
_EVERY_SECONDS, _MOST_SECONDS = 2.0, 60.0  # Between two looks at the file; while nobody answers.
_PATIENCE = 20.0  # Seconds without an answer after which the end of a run waits no longer.
_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 1000, 100, 6000  # Of one request, and of a parameter, by mlflow.
_CONTINUED = ('pretrain', 'linear_eval', 'fine_tune')  # Other modes are done in one go: a new run each time.
_RUN_FILE = 'mlflow.json'  # The runs of a workdir: mode -> uri, run_id, config.


@contextlib.contextmanager
def track(run: Run, mode: str, parent: 'Tracker | None' = None) -> Iterator['Tracker | None']:
    """Tracks what happens inside of the `with`; does nothing without `run.tracking`.

    A resumed run goes on with its own mlflow run, which stands in `mlflow.json` of the workdir. A new
    one is nested under `parent`, else under `--mlflow_run_id`, else under the pre-training of the
    workdir or of the checkpoint's, if that was tracked in the same place.

    Raises:
      UserError: mlflow is not installed, there is no such run, or the place cannot be used. A server
        that does not answer is no error: it is asked again while the work goes on.
    """
    if run.tracking is None or collectives.replica_index() != 0:
        yield None
        return
    tracker = Tracker(run, mode, parent)
    status = 'FAILED'
    try:
        yield tracker
        status = 'FINISHED'
    except (KeyboardInterrupt, SystemExit):
        status = 'KILLED'
        raise
    finally:
        tracker.close(status)


class Tracker:
    """One mlflow run, and the thread that feeds it."""

    def __init__(self, run: Run, mode: str, parent: 'Tracker | None'):
        self._run, self._mode, self._parent = run, mode, parent
        self._uri = run.tracking.uri
        self._place = redact(self._uri)  # In files and messages.
        self._client = parent._client if parent else _client(self._uri)
        self._config = run.plain_config()
        own = (mode, 'linear_eval') if mode == 'pretrain' and run.config.final_linear_eval else (mode,)
        self._tail = MetricsTail(os.path.join(run.workdir, 'metrics.jsonl'), own)
        self._pending: list[Any] = []  # Metrics that have been read and not been taken yet.
        self._sent: dict[str, set[int]] = {}  # name -> steps that the server has.
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._status = 'RUNNING'
        self._started = time.time()
        self._answers, self._is_down = 0, False  # Requests that went well; whether the last try failed.
        self._voice = parent._voice if parent else _Voice()
        self.run_id: str | None = None
        if parent is None or parent.run_id:  # What is known to be down is asked in the background.
            self._first_contact()
        self._thread = threading.Thread(target=self._work, name=f'mlflow {mode}', daemon=True)
        self._thread.start()

    def _first_contact(self) -> None:
        """Finds the mistakes of a user before the work starts."""
        from mlflow.exceptions import MlflowException

        try:
            self.connect()
        except (MlflowException, OSError) as error:
            is_local = not self._uri.startswith(('http:', 'https:'))
            refused = ('INVALID_PARAMETER_VALUE', 'PERMISSION_DENIED', 'UNAUTHENTICATED', 'NOT_FOUND')
            if is_local or getattr(error, 'error_code', None) in refused:
                raise UserError(f'--mlflow_tracking_uri={self._place}: {_one_line(error)}') from error
            self._warn(error)

    def connect(self) -> str:
        """The id of the run, which is looked up or made on the first call.

        Raises:
          UserError: the run to nest under does not exist.
          mlflow.exceptions.MlflowException: no answer, or a refusal.
        """
        with self._lock:
            if not self.run_id:
                own = self._own_run()
                run = own or self._new_run()
                if own:
                    for name in own.data.metrics:
                        history = self._client.get_metric_history(own.info.run_id, name)
                        self._sent[name] = {metric.step for metric in history}
                    self._client.update_run(own.info.run_id, status='RUNNING')
                self._log_params(run)
                self.run_id = run.info.run_id
                logging.info('mlflow run %s in %s', self.run_id, self._place)
            return self.run_id

    def _own_run(self) -> Any:
        """The run that this one continues, or None."""
        entry = _read_runs(self._run.workdir).get(self._mode, {})
        saved = checkpointing.list_checkpoints(os.path.join(self._run.workdir, 'checkpoints'), self._mode)
        is_same = saved or entry.get('config') == self._digest()
        if self._mode not in _CONTINUED or entry.get('uri') != self._place or not is_same:
            return None
        run = self._find_run(entry['run_id'])
        if run is None:
            logging.warning('mlflow run %s of this workdir is gone; a new one takes its place', entry['run_id'])
        return run

    def _new_run(self) -> Any:
        tracking, config, workdir = self._run.tracking, self._run.config, os.path.abspath(self._run.workdir)
        parent_id, asked = self._parent.connect() if self._parent else tracking.run_id, not self._parent
        if not parent_id and self._mode != 'pretrain':
            parent_id, asked = self._run_of_pretraining(), False
        parent = self._find_run(parent_id) if parent_id else None
        if parent_id and not parent and asked:
            raise UserError(
                f'--mlflow_run_id={parent_id}: no such run in {self._place}; expected the id of a run there')
        name = os.path.basename(workdir)
        tags = {
            'mode': self._mode, 'dataset': config.dataset.name, 'encoder': config.network.encoder_class,
            'seed': str(config.random_seed), 'num_seeds': str(config.num_seeds), 'workdir': workdir,
            'command': self._run.command, 'mlflow.source.name': 'launch.py', 'mlflow.source.type': 'LOCAL',
            **({'mlflow.parentRunId': parent.info.run_id} if parent else {}),
        }
        run = self._client.create_run(
            parent.info.experiment_id if parent else self._experiment_id(), tags=tags,
            run_name=name if self._mode == 'pretrain' else f'{name} {self._mode}',
        )
        entry = {'uri': self._place, 'run_id': run.info.run_id, 'config': self._digest()}
        reporting.write_json(
            os.path.join(workdir, _RUN_FILE), {**_read_runs(workdir), self._mode: entry})
        return run

    def _run_of_pretraining(self) -> str | None:
        places = [self._run.workdir]
        if self._run.checkpoint:
            places = [os.path.dirname(os.path.dirname(os.path.abspath(self._run.checkpoint)))]
        entries = [_read_runs(place).get('pretrain', {}) for place in places]
        return next((e['run_id'] for e in entries if e.get('uri') == self._place), None)

    def _find_run(self, run_id: str) -> Any:
        """The run, or None where there is none or it was deleted."""
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

        name = self._run.tracking.experiment_name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # Another process may be faster.
                return self._client.create_experiment(name)
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != 'active':
            raise UserError(
                f'--mlflow_experiment_name={name}: deleted or refused by {self._place}; choose another name')
        return found.experiment_id

    def _digest(self) -> str:
        """Tells the config of one run from that of another."""
        return hashlib.blake2b(json.dumps(self._config, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _log_params(self, run: Any) -> None:
        """The flattened config; what a continued run has already cannot be changed there."""
        from mlflow.entities import Param

        flat = {k: str(v)[:_MAX_VALUE] for k, v in flatten(self._config).items()}
        params = [Param(k, v) for k, v in flat.items() if k not in run.data.params]
        for i in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[i : i + _MAX_PARAMS])

    def _work(self) -> None:
        """The thread: sends until the run is closed."""
        wait = _EVERY_SECONDS
        while True:
            closing = self._closing.wait(wait)
            try:
                self.connect()
                while self._send_metrics():
                    self._answers += 1
                if closing:
                    self._finish()
                wait, self._is_down = _EVERY_SECONDS, False
            except Exception as error:  # Whatever it is, the training does not depend on it.
                self._is_down = True
                self._warn(error)
                wait = min(2 * wait, _MOST_SECONDS)
            if closing:
                return

    def _send_metrics(self) -> bool:
        """Sends one batch; False if there is nothing to send."""
        from mlflow.entities import Metric

        if not self._pending:
            now = int(time.time() * 1000)  # Kept for a second try: the same point again is no double.
            for record in self._tail.read():
                for name, value in record.scalars.items():
                    if record.step not in self._sent.setdefault(name, set()):
                        self._sent[name].add(record.step)
                        self._pending.append(Metric(name, value, now, record.step))
        if not self._pending:
            return False
        batch = self._pending[:_MAX_METRICS]
        self._client.log_batch(self.run_id, metrics=batch)
        del self._pending[: len(batch)]
        return True

    def _finish(self) -> None:
        """The final metrics, the files and the state of a run."""
        from mlflow.entities import Metric

        steps, metrics = final_metrics(self._run.workdir, self._mode)
        known = self._client.get_run(self.run_id).data.metrics
        now = int(time.time() * 1000)
        new = [Metric(k, v, now, steps) for k, v in metrics.items() if known.get(k) != v]
        self._client.log_batch(self.run_id, metrics=new)
        for path in own_files(self._run.workdir, self._mode, self._started):
            self._answers += 1
            self._client.log_artifact(self.run_id, str(path))
        if self._run.tracking.checkpoints:
            directory = os.path.join(self._run.workdir, 'checkpoints')
            for _, path in checkpointing.list_checkpoints(directory, self._mode)[-1:]:
                self._client.log_artifact(self.run_id, str(path), 'checkpoints')
        self._client.set_terminated(self.run_id, self._status)

    def close(self, status: str) -> None:
        """Sends what is left, unless nobody answers, and ends the run as FINISHED, FAILED or KILLED."""
        self._status = status
        self._closing.set()
        patience = 30 * _PATIENCE if self._run.tracking.checkpoints else _PATIENCE
        answers, since = self._answers, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < patience:
            self._thread.join(0.2)
            if self._answers != answers:
                answers, since = self._answers, time.monotonic()
        if self._thread.is_alive() or self._is_down:
            self._voice.say_once(
                '%s has not got everything of %s, where all of it is; the same command, started again, sends the rest',
                self._place, self._run.workdir)

    def _warn(self, error: Exception) -> None:
        self._voice.say_once(
            '%s does not take what is sent (%s); the work goes on, and what is missing there is sent later',
            self._place, _one_line(error))


class _Voice:
    """Warnings, each of them once, whichever of the seeds comes to it first."""

    def __init__(self):
        self._said: set[str] = set()

    def say_once(self, words: str, *values: Any) -> None:
        if words not in self._said:
            self._said.add(words)
            logging.warning(words, *values)


def redact(uri: str) -> str:
    """The text without the name and password of 'scheme://name:password@host'."""
    return re.sub(r'(?<=://)[^/\s@]+@', '', uri)


def _one_line(error: Exception) -> str:
    text = redact(' '.join(str(error).split()))
    return text if len(text) < 200 else f'{text[:200]} ...'


def _client(uri: str) -> Any:
    """A client of mlflow, which is imported here for the first time.

    Raises:
      UserError: it is not installed, or cannot do anything with `uri`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise UserError(
            f'--mlflow_tracking_uri={redact(uri)}: mlflow cannot be imported ({error}); '
            'pip install mlflow, or leave the flag out'
        ) from error
    try:
        return mlflow.MlflowClient(uri)
    except Exception as error:  # SQLAlchemy's, the operating system's or mlflow's own.
        raise UserError(
            f'--mlflow_tracking_uri={redact(uri)}: cannot be used ({_one_line(error)}); expected sqlite:///FILE, '
            'a folder or http://HOST:PORT'
        ) from error


def _read_runs(workdir: str) -> dict[str, Any]:
    try:
        return json.loads(pathlib.Path(workdir, _RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}

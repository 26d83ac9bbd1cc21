"""`--mode=eval --follow`: a separate process that evaluates a pre-training while it runs.

Counterpart of the official `eval_worker` mode. The follower reads the checkpoints of the workdir and
appends one JSON object per checkpoint to `eval.jsonl` in the workdir: `mode` ('eval'), `step`, `epoch`,
`checkpoint`, and the metrics of `monitoring.make_evaluation`. It takes no lock and, while the training
runs, writes no other file, so it does not disturb the training. The pre-training draws the follower's
curve into `curves.png` and the report when it ends; if the follower finishes later, it redraws both.
With `--mlflow_tracking_uri` the follower logs to an MLflow run of its own, nested under that of the
pre-training.
"""

import json
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from byol_func.errors import UserError
from byol_func.modes import checkpoints, drawing, inputs, monitoring
from byol_func.runtime import transfer
from byol_func.tracking import finder, tracker
from byol_func.utils import checkpointing
from byol_func.workdir import files
from byol_func.workdir.run import Run

_POLL_SECONDS = 1.0
_MODE = 'pretrain'


def check(run: Run) -> None:
    """Raises a UserError if --follow cannot be combined with the other flags."""
    if run.checkpoint:
        raise UserError(f'--follow: expected --workdir, not --checkpoint={run.checkpoint}')
    if run.split:
        raise UserError(f'--follow: expected config.dataset.eval_split, not --split={run.split}')


def follow(run: Run, seed_runs: list[Run]) -> None:
    """Evaluates every checkpoint of the runs, one per seed, as it appears, until the last step or an interrupt.

    Checkpoints that are already in `eval.jsonl` are not evaluated again. If several checkpoints are waiting, the newest
    comes first. A checkpoint that the training removes before its turn is skipped.

    Raises:
      UserError: a checkpoint does not fit the config, there are no labels, or `eval.jsonl` cannot be written.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Handled like Ctrl-C.
    try:
        for one in seed_runs:
            with tracker.track(one, finder.FOLLOWER):
                _follow_run(one)
            _draw(one)
        if len(seed_runs) > 1:
            _draw(run)
    except KeyboardInterrupt:
        logging.info('Stopped following; the same command continues')
    finally:
        signal.signal(signal.SIGTERM, before)


def _draw(run: Run) -> None:
    """Redraws the curves and the report if the training has already ended and will not draw them itself."""
    if os.path.exists(os.path.join(run.workdir, f'summary.{_MODE}.json')):
        drawing.draw_run(run, _MODE)


def _follow_run(run: Run) -> None:
    train, test = inputs.load_labelled_data(run)
    experiment = inputs.make_byol(run.config, train)
    evaluation = monitoring.make_evaluation(run.config, experiment, train, test)
    template, last_step = experiment.init(), experiment.max_steps - 1
    path = pathlib.Path(run.workdir, 'eval.jsonl')
    split = run.config.dataset.eval_split
    done = {record['step'] for record in files.read_records(path)}
    logging.info('Following %s; results go to %s', run.workdir, path)
    for step, file in _new_checkpoints(os.path.join(run.workdir, 'checkpoints'), done, last_step):
        try:
            checkpoint = checkpointing.load(file)
        except UserError:
            if file.exists():
                raise
            continue  # The training has removed it in the meantime.
        if run.config.dataset.eval_split == 'val':
            checkpoints.check_held_out(run.config, checkpoint)
        checkpoints.check_classes(checkpoint, train)
        # The evaluation uses only the online network.
        online = {
            name: checkpointing.restore(checkpoint, getattr(template, name), prefix=f'{name}/')
            for name in ('online_params', 'online_state')
        }
        state = template._replace(**transfer.place(online, run.device))
        metrics = evaluation(state, step)
        epoch = (step + 1) * experiment.batch_size / train.num_examples
        record = {'mode': 'eval', 'step': step, 'epoch': epoch, 'checkpoint': file.name, **metrics}
        _append(path, record)
        logging.info(
            'Step %d, epoch %.1f: online classifier %.2f %%, k-NN %.2f %% of the %s set',
            step,
            epoch,
            100 * metrics[f'{split}/online_top1'],
            100 * metrics[f'{split}/online_knn_top1'],
            split,
        )
    logging.info('Step %d, the last of %s, is done', last_step, run.workdir)


def _new_checkpoints(directory: str, done: set[int], last_step: int) -> Iterator[tuple[int, pathlib.Path]]:
    """Yields (step, path) of every checkpoint that is not done, the newest first.

    It ends once the checkpoint of the last step and all others that are still present have been yielded.
    """
    done = set(done)
    waits = False
    while True:
        found = [c for c in checkpointing.list_checkpoints(directory, _MODE) if c[0] not in done]
        if found:
            done.add(found[-1][0])
            waits = False
            yield found[-1]
            continue
        if last_step in done:
            return
        if not waits:
            logging.info('Waiting for a checkpoint in %s; press Ctrl-C to stop', directory)
            waits = True
        time.sleep(_POLL_SECONDS)


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    with files.reporting_errors(path):
        whole = not path.exists() or path.read_bytes()[-1:] in (b'', b'\n')
        with open(path, 'a') as file:
            file.write(('' if whole else '\n') + json.dumps(record) + '\n')

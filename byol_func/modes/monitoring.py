"""Probes that evaluate a network and check its health while BYOL trains.

The probes write separate lines to `metrics.jsonl`. Every `config.eval_every_epochs` they record
`test/online_top1`, `test/online_top5`, `test/online_loss` and `test/online_knn_top1` (`val/...` if
`config.dataset.eval_split` is val). Every `config.monitoring.health_every_steps` they record `health/NAME`
for each measure of `evaluation.health.panel`, and `health/collapsed`, 0 or 1. Both kinds are also recorded
after the last step. The summary lists the collapses:

    "collapses": [{"step": 149, "measure": "projection_spread", "value": 0.002, "recovered_step": null}]

In the summary of several seeds, each collapse also has the `seed` it belongs to.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
import tqdm
from absl import logging
from ml_collections import ConfigDict

from byol_func import console
from byol_func.evaluation import health, knn
from byol_func.experiment import Batch, Experiment
from byol_func.main_loop import Probe, eval_loop
from byol_func.modes.inputs import embed, encoder_part, shrinkage
from byol_func.runtime import collectives, prng
from byol_func.utils import dataset
from byol_func.workdir import files
from byol_func.workdir.run import Run

# Fixed settings of k-NN during training, for comparing one step with another.
_K, _TEMPERATURE = 20, 0.07

Evaluation = Callable[[Any, int], dict[str, float]]


def make_probes(
    run: Run, experiment: Experiment, train: dataset.Examples, evaluation: Evaluation | None
) -> list[Probe]:
    """Returns the probes of a pre-training; `evaluation` is the result of `make_evaluation`, None without labels."""
    probes = [_health_probe(run, experiment)]
    if evaluation is not None:
        every = experiment.max_steps  # Probes always run after the last step.
        if run.config.eval_every_epochs:
            every = round(
                shrinkage(run.config, train.num_examples)
                * run.config.eval_every_epochs
                * train.num_examples
                / experiment.batch_size
            )
        probes.append(Probe(max(every, 1), lambda state, step, draws, inputs: evaluation(state, step)))
    return probes


def make_evaluation(
    config: ConfigDict, experiment: Experiment, train: dataset.Examples, test: dataset.Examples
) -> Evaluation:
    """Returns a function that evaluates k-NN and, if there is one, the online classifier on the evaluation set.

    k-NN searches a fixed random sample of `config.monitoring.knn_bank_size` training images, by the cosine
    similarity of their embeddings. k is 20, or the size of the sample if that is smaller, and the temperature
    of the votes is 0.07. The result differs from the top-1 of --mode=knn, which uses all training images and
    chooses k and the temperature.

    Returns:
      (state, step) -> `SPLIT/online_top1`, `_top5`, `_loss` and `_knn_top1`; a repeated call for the same step
      returns the cached result.
    """
    size = min(config.monitoring.knn_bank_size, train.num_examples)
    chosen = torch.randperm(train.num_examples, generator=prng.fold_in(0, 'knn_bank'))[:size].sort().values
    name = f'{config.dataset.eval_split}/online'
    last: tuple[int | None, dict[str, float]] = (None, {})

    def evaluation(state: Any, step: int) -> dict[str, float]:
        nonlocal last
        if last[0] != step:
            last = (step, measure(state))
        return last[1]

    def measure(state: Any) -> dict[str, float]:
        # Moving averages may differ between replicas, which share the evaluation of one network.
        state = state._replace(online_state=collectives.of_first_replica(state.online_state))
        online = {}
        if 'classifier' in state.online_params:  # Images without labels train none.
            found = eval_loop(experiment.evaluate, state, test, config.evaluation.batch_size)
            names = {'top1': 'top1_accuracy', 'top5': 'top5_accuracy', 'loss': 'eval_loss'}
            online = {f'{name}_{short}': found[long] for short, long in names.items()}
        # Selected again each time: a copy of the images would occupy the device for the whole run.
        bank = train if size == train.num_examples else train.take(chosen)
        encoder = encoder_part(state.online_params), encoder_part(state.online_state)
        queries, voters = (embed(config, data, *encoder) for data in (test, bank))
        return {
            **online,
            f'{name}_knn_top1': knn.accuracy(
                queries.embeddings,
                queries.labels,
                voters.embeddings,
                voters.labels,
                num_classes=train.num_classes,
                k=_K,
                temperature=_TEMPERATURE,
                watch=lambda items, total: console.watch(items, 'Nearest neighbours', total, unit='block'),
            ),
        }

    return evaluation


def _health_probe(run: Run, experiment: Experiment) -> Probe:
    images = run.config.monitoring.health_images
    micro_batch = experiment.batch_size // (collectives.num_replicas() * run.config.accumulate_steps)
    if images > micro_batch:
        images -= images % micro_batch
    watch = CollapseWatch(run.workdir, 'pretrain')

    def measure(state: Any, step: int, draws: Any, inputs: Batch) -> dict[str, float]:
        draws, inputs = optree.tree_map(lambda x: x[:images], (draws, inputs))
        global_step = torch.full((), step, device=inputs['labels'].device)
        found = health.panel(experiment, state, global_step, draws, inputs)
        values = torch.stack([value.detach().double() for value in found.values()])
        scalars = dict(zip(found, values.tolist(), strict=True))
        if scalars.get('grad_norm/predictor') == 0.0:  # The loss of this variant does not use the predictor.
            scalars.pop('cosine', None)
        collapsed = watch.look(step, scalars)
        return {**{f'health/{name}': value for name, value in scalars.items()}, 'health/collapsed': float(collapsed)}

    return Probe(run.config.monitoring.health_every_steps, measure)


class CollapseWatch:
    """Logs a message when a network collapses and when it recovers."""

    def __init__(self, workdir: str, mode: str):
        collapses = read_collapses(workdir, mode)
        # A resumed run does not repeat the warning.
        self._since = collapses[-1]['step'] if collapses and collapses[-1]['recovered_step'] is None else None

    def look(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Returns whether the network is collapsed, given the numbers of a health panel, and logs any change."""
        sign = health.collapse_sign(scalars, already=self._since is not None)
        if sign and self._since is None:
            self._since = step
            _say(logging.WARNING, f'Step {step}: the network has collapsed, {_describe(sign)}. {_ADVICE}')
        elif not sign and self._since is not None:
            spread = scalars['projection_spread']
            _say(
                logging.INFO,
                f'Step {step}: the network has recovered from the collapse of step {self._since}, the spread of its '
                f'projections is {spread:.0%} of the maximum',
            )
            self._since = None
        return sign is not None


_ADVICE = (
    'It no longer tells images apart. Often the learning rate or the weight decay is too '
    'large, or config.base_target_ema too small.'
)


def _describe(sign: health.Sign) -> str:
    if sign.measure == 'projection_spread':
        return (
            f'its projections are nearly equal: their spread is {sign.value:.1%} of 1/sqrt(D), below '
            f'{sign.threshold:.0%} (health/{sign.measure})'
        )
    return (
        f'its embeddings lie on one line: effective rank {sign.value:.2f}, below {sign.threshold} '
        f'(health/{sign.measure})'
    )


def _say(level: int, message: str) -> None:
    if collectives.replica_index() == 0:
        with tqdm.tqdm.external_write_mode(file=sys.stderr):  # Keeps the message out of a progress bar.
            logging.log(level, message)


def read_collapses(workdir: str, mode: str) -> list[dict[str, Any]]:
    """Reads the collapses recorded in `metrics.jsonl`, in order, including those before the run was resumed.

    Returns:
      For each collapse the `step` after which it was detected, the `measure` that showed it, the `value` of
      that measure, and `recovered_step`, which is None if the network has not recovered.
    """
    collapses: list[dict[str, Any]] = []
    for record in files.read_records(pathlib.Path(workdir, 'metrics.jsonl')):
        if record['mode'] != mode or 'health/collapsed' not in record:
            continue
        lasts = bool(collapses) and collapses[-1]['recovered_step'] is None
        if record['health/collapsed'] and not lasts:
            scalars = {name.removeprefix('health/'): value for name, value in record.items()}
            sign = health.collapse_sign(scalars)
            assert sign is not None  # `collapsed` was computed from the same numbers.
            collapses.append(dict(step=record['step'], measure=sign.measure, value=sign.value, recovered_step=None))
        elif lasts and not record['health/collapsed']:
            collapses[-1]['recovered_step'] = record['step']
    return collapses

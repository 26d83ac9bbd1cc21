"""What `--mode` does: pretrain, linear_eval, fine_tune and eval, each one function of a run."""

from collections.abc import Mapping
import hashlib
import os
from typing import Any

from absl import logging
import optree
import torch

from byol_func import byol_experiment, eval_experiment, main_loop, runs
from byol_func.evaluation import features
from byol_func.runs import Run
from byol_func.runtime import collectives
from byol_func.runtime.precision import DTYPES
from byol_func.utils import augmentations, checkpointing, dataset, networks
from byol_func.utils.helpers import UserError, one_of

# Passes in training mode that give an untrained encoder its moving averages (decay 0.9).
_CALIBRATION_BATCHES = 50


def run_mode(mode: str, run: Run) -> dict[str, Any]:
    """Runs a mode, once or for every seed, and writes its summary.

    With `config.num_seeds` > 1 seed i runs with `random_seed + i` in the folder `seed_i` of the
    workdir, and the summary holds means, standard deviations and values of the metrics.

    Returns:
      The summary.

    Raises:
      UserError: whatever the user can put right.
    """
    function = one_of('--mode', mode, _MODES)
    num_seeds = run.config.num_seeds
    if num_seeds > 1 and run.checkpoint:
        raise UserError(
            f'--checkpoint={run.checkpoint}: one file for config.num_seeds={num_seeds}; '
            'give --workdir, or --config.num_seeds=1'
        )
    seed_runs = [run.of_seed(i) for i in range(num_seeds)] if num_seeds > 1 else [run]
    for seed_run in seed_runs:  # Refused before anything is written.
        main_loop.check_continues(seed_run.loop(mode, compiled=False))
    summaries = []
    for i, seed_run in enumerate(seed_runs):
        if num_seeds > 1:
            logging.info('Seed %d of %d', i + 1, num_seeds)
        runs.write_config(seed_run, mode)
        summaries.append(function(seed_run))
        runs.write_summary(seed_run, mode, summaries[-1])
    if num_seeds > 1:
        runs.write_config(run, mode)
        runs.write_summary(run, mode, runs.merge_seeds(summaries))
    summary = runs.merge_seeds(summaries) if num_seeds > 1 else summaries[0]
    if collectives.replica_index() == 0:
        print(runs.closing_words(summary, run.workdir))
    return summary


def pretrain(run: Run) -> dict[str, Any]:
    """BYOL; at the end the online classifier on the test set and, if asked, linear evaluation."""
    train, test = _load_data(run)
    if run.config.final_linear_eval:  # Found out before the training rather than after it.
        dataset.check_batch_size(
            'config.linear_eval.batch_size', run.config.linear_eval.batch_size, train.num_examples
        )
    experiment = _byol(run, train)
    result = main_loop.train_loop(experiment, train, run.loop('pretrain', run.config.compile))
    online = main_loop.eval_loop(
        experiment.evaluate, result.state, test, run.config.evaluation.batch_size
    )
    metrics = {
        **{f'train/{name}': value for name, value in result.logs.items()},
        'test/online_top1': online['top1_accuracy'],
        'test/online_top5': online['top5_accuracy'],
        'test/online_loss': online['eval_loss'],
    }
    if run.config.final_linear_eval:
        encoder = _encoder_part(result.state.online_params), _encoder_part(result.state.online_state)
        metrics |= _evaluate_encoder(run, 'linear_eval', train, test, *encoder)[0]
    return runs.summarize(run, 'pretrain', train, experiment, result, metrics)


def linear_eval(run: Run) -> dict[str, Any]:
    """A linear classifier on the frozen encoder of a checkpoint (section 4.1 of the paper)."""
    return _train_from_checkpoint(run, 'linear_eval')


def fine_tune(run: Run) -> dict[str, Any]:
    """Encoder and classifier trained together from a checkpoint (section 4.2 of the paper)."""
    return _train_from_checkpoint(run, 'fine_tune')


def evaluate(run: Run) -> dict[str, Any]:
    """The classifier of any checkpoint on the test set, nothing trained."""
    checkpoint = _find_checkpoint(run, ('fine_tune', 'linear_eval', 'pretrain'))
    train, test = _load_data(run)
    if checkpoint.mode == 'pretrain':
        experiment, name = _byol(run, train), 'online'
        state = checkpointing.restore(checkpoint, experiment.init())
    else:
        backbone = _backbone(run, train)
        encoder = backbone.init(torch.Generator())
        experiment = eval_experiment.make(
            run.config, checkpoint.mode, *encoder, **_facts(train, train.images.shape[1:])
        )
        name = {'linear_eval': 'linear', 'fine_tune': 'fine_tuned'}[checkpoint.mode]
        state = checkpointing.restore(checkpoint, experiment.init())
    state = _to_device(state, run.device)
    scalars = main_loop.eval_loop(
        experiment.evaluate, state, test, run.config.evaluation.batch_size
    )
    metrics = {
        f'test/{name}_top1': scalars['top1_accuracy'],
        f'test/{name}_top5': scalars['top5_accuracy'],
        f'test/{name}_loss': scalars['eval_loss'],
    }
    summary = runs.summarize(run, 'eval', train, experiment, None, metrics)
    return {**summary, 'checkpoint': checkpoint.path, 'steps': checkpoint.step + 1}


_MODES = {'pretrain': pretrain, 'linear_eval': linear_eval, 'fine_tune': fine_tune, 'eval': evaluate}
MODES = tuple(_MODES)


def _train_from_checkpoint(run: Run, mode: str) -> dict[str, Any]:
    checkpoint = _find_checkpoint(run, ('pretrain',))
    train, test = _load_data(run)
    params, state = _backbone(run, train).init(torch.Generator())
    params = checkpointing.restore(checkpoint, params, prefix='online_params/')
    state = checkpointing.restore(checkpoint, state, prefix='online_state/')
    metrics, experiment, result = _evaluate_encoder(run, mode, train, test, params, state)
    summary = runs.summarize(run, mode, train, experiment, result, metrics)
    return {**summary, 'checkpoint': checkpoint.path}


def _evaluate_encoder(run: Run, mode: str, train, test, params, state):
    """Trains on top of an encoder, and for comparison on top of an untrained one."""
    eval_config = run.config[mode]
    params, state = _to_device((params, state), run.device)
    top1 = {'linear_eval': 'linear_top1', 'fine_tune': 'fine_tuned_top1'}[mode]
    metrics = {}
    if eval_config.compare_untrained:
        untrained = _untrained_encoder(run, train)
        scalars, *_ = _train_and_test(run, mode, train, test, *untrained, untrained=True)
        metrics[f'test/untrained_{top1}'] = scalars['top1_accuracy']
    scalars, experiment, result = _train_and_test(run, mode, train, test, params, state)
    metrics |= {
        f'test/{top1}': scalars['top1_accuracy'],
        f'test/{top1[:-1]}5': scalars['top5_accuracy'],
        f'test/{top1[:-5]}_loss': scalars['eval_loss'],
        **{f'train/{top1[:-5]}_{name}': value for name, value in result.logs.items()},
    }
    return metrics, experiment, result


def _train_and_test(run: Run, mode: str, train, test, params, state, untrained: bool = False):
    eval_config = run.config[mode]
    backbone = _fingerprint((params, state))
    if eval_config.cache_features:
        train, test = (_embed(run, split, params, state) for split in (train, test))
    experiment = eval_experiment.make(
        run.config, mode, params, state, **_facts(train, train.images.shape[1:])
    )
    # One linear layer on cached embeddings is not worth the compiler's time.
    compiled = run.config.compile and not eval_config.cache_features
    loop = run.loop(f'{mode}_untrained' if untrained else mode, compiled)
    loop = loop._replace(config=loop.config | {'backbone': backbone})
    result = main_loop.train_loop(experiment, train, loop)
    scalars = main_loop.eval_loop(
        experiment.evaluate, result.state, test, run.config.evaluation.batch_size
    )
    return scalars, experiment, result


def _fingerprint(tree: Any) -> str:
    """Tells one encoder from another, so that no evaluation goes on with that of an earlier one."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in optree.tree_leaves(tree):
        digest.update(leaf.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _embed(run: Run, data: dataset.Dataset, params, state) -> dataset.Dataset:
    return features.extract(
        _backbone(run, data), params, state, data,
        preprocess=lambda images: augmentations.center_crop(
            images, run.config.image_size, run.config.eval_crop_fraction
        ),
        batch_size=run.config.evaluation.batch_size,
    )


def _untrained_encoder(run: Run, train: dataset.Dataset):
    """The encoder before its first step, with moving averages of the training images."""
    backbone = _backbone(run, train)
    initial = _byol(run, train).init()
    params = _to_device(_encoder_part(initial.online_params), run.device)
    state = _to_device(_encoder_part(initial.online_state), run.device)
    batch_size = min(run.config.batch_size, 256, train.num_examples)
    batches = (
        augmentations.center_crop(
            dataset.train_batch(
                train, step, seed=run.config.random_seed, batch_size=batch_size
            )['images'],
            run.config.image_size, run.config.eval_crop_fraction,
        )
        for step in range(_CALIBRATION_BATCHES)
    )
    return params, features.calibrate(backbone, params, state, batches)


def _encoder_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {'encoder': tree['encoder']}


def _to_device(tree: Any, device: torch.device) -> Any:
    return optree.tree_map(lambda x: x.to(device), tree)


def _load_data(run: Run) -> tuple[dataset.Dataset, dataset.Dataset]:
    with collectives.first_replica_first():
        train, test = (dataset.load(split, **run.config.dataset) for split in ('train', 'test'))
    return dataset.to_device(train, run.device), dataset.to_device(test, run.device)


def _facts(data: dataset.Dataset, image_shape) -> dict[str, Any]:
    return dict(
        num_examples=data.num_examples, num_classes=data.num_classes, image_shape=tuple(image_shape)
    )


def _byol(run: Run, data: dataset.Dataset) -> byol_experiment.Experiment:
    return byol_experiment.make(run.config, **_facts(data, data.images.shape[1:]))


def _backbone(run: Run, data: dataset.Dataset) -> networks.Network:
    network = run.config.network.to_dict()
    names = ('encoder_class', 'encoder_config', 'bn_config')
    return eval_experiment.make_backbone(
        **{name: network[name] for name in names}, in_channels=data.images.shape[1],
        compute_dtype=DTYPES[run.config.precision],
    )


def _find_checkpoint(run: Run, modes: tuple[str, ...]) -> checkpointing.Checkpoint:
    """The file of --checkpoint, or the newest of the workdir; the first mode that has one."""
    path = run.checkpoint
    if not path:
        directory = os.path.join(run.workdir, 'checkpoints')
        found = [checkpointing.list_checkpoints(directory, mode) for mode in modes]
        path = next((files[-1][1] for files in found if files), None)
        if path is None:
            raise UserError(
                f'--workdir={run.workdir}: no checkpoint of {" or ".join(modes)} in {directory}; '
                'run --mode=pretrain first or give --checkpoint=FILE'
            )
    checkpoint = checkpointing.load(path)
    if checkpoint.mode not in modes:
        raise UserError(
            f'--checkpoint={path}: written by --mode={checkpoint.mode}, expected one of {", ".join(modes)}'
        )
    return checkpoint

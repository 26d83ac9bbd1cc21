"""`--mode=eval`: the classifier of a checkpoint on the test set."""

from typing import Any

import torch

from byol_func import eval_experiment, main_loop, runs
from byol_func.modes import common
from byol_func.runs import Run
from byol_func.utils import checkpointing


def evaluate(run: Run) -> dict[str, Any]:
    """The classifier of any checkpoint on the test set, nothing trained."""
    checkpoint = common.find_checkpoint(run, ('fine_tune', 'linear_eval', 'pretrain'))
    train, test = common.load_labelled_data(run)
    if checkpoint.mode == 'pretrain':
        experiment, name = common.make_byol(run, train), 'online'
        state = checkpointing.restore(checkpoint, experiment.init())
    else:
        backbone = common.make_backbone(run, train)
        encoder = backbone.init(torch.Generator())
        experiment = eval_experiment.make(
            run.config, checkpoint.mode, *encoder, **common.facts(train, train.image_shape)
        )
        name = {'linear_eval': 'linear', 'fine_tune': 'fine_tuned'}[checkpoint.mode]
        state = checkpointing.restore(checkpoint, experiment.init())
    state = common.to_device(state, run.device)
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

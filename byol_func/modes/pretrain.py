"""`--mode=pretrain`: BYOL itself."""

from typing import Any

from byol_func import main_loop, runs
from byol_func.modes import common, monitoring, on_top, preview
from byol_func.runs import Run
from byol_func.utils import dataset


def pretrain(run: Run) -> dict[str, Any]:
    """BYOL; at the end the online classifier on the test set and, if asked, linear evaluation.

    Without labels there is neither.
    """
    train, test = common.load_data(run)
    evaluates = run.config.final_linear_eval and test is not None
    if evaluates:  # Found out before the training rather than after it.
        dataset.check_batch_size(
            'config.linear_eval.batch_size', run.config.linear_eval.batch_size, train.num_examples
        )
    experiment = common.make_byol(run, train)
    preview.write_sheet(run, experiment, train)
    evaluation = monitoring.make_evaluation(run, experiment, train, test) if test is not None else None
    probes = monitoring.make_probes(run, experiment, train, evaluation)
    result = main_loop.train_loop(experiment, train, run.loop('pretrain', run.config.compile), probes)
    metrics = {f'train/{name}': value for name, value in result.logs.items()}
    if test is not None:
        metrics |= evaluation(result.state, experiment.max_steps - 1)
    if evaluates:
        encoder = common.encoder_part(result.state.online_params), common.encoder_part(result.state.online_state)
        metrics |= on_top.evaluate_encoder(run, 'linear_eval', train, test, *encoder)[0]
    summary = runs.summarize(run, 'pretrain', train, experiment, result, metrics)
    return {**summary, 'collapses': monitoring.read_collapses(run.workdir, 'pretrain')}

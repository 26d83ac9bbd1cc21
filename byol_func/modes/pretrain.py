"""`--mode=pretrain`: trains BYOL."""

from typing import Any

from absl import logging

from byol_func import main_loop
from byol_func.modes import drawing, init_from, inputs, monitoring, on_top, preview, sizes, update_rules
from byol_func.runtime import collectives
from byol_func.training import loop_config
from byol_func.workdir import summaries
from byol_func.workdir.run import Run


def pretrain(run: Run) -> dict[str, Any]:
    """Trains BYOL, then evaluates the online classifier and, if the config asks for it, runs linear evaluation.

    Without labels, both evaluations are skipped. If the data set has labels for other images than those it is trained
    on, only the online classifier is.
    """
    train, test = inputs.load_data(run, to_pretrain=True)
    labelled, test = inputs.load_beside(run, train, test)
    evaluates = run.config.final_linear_eval and test is not None
    if evaluates:  # Mistakes are reported before the pre-training, not after it.
        on_top.check_protocol(run.config, 'linear_eval', labelled)
    sizes.check_image_size(run, train)
    experiment = inputs.make_byol(run.config, train)
    sizes.check_memory(run, experiment, train)
    if collectives.replica_index() == 0 and run.is_first_seed:
        for line in sizes.outline(run, experiment, train, test).splitlines():
            logging.info('%s', line)
    experiment = init_from.start_from(run, experiment)
    preview.write_sheet(run, experiment, train)
    evaluation = monitoring.make_evaluation(run.config, experiment, labelled, test) if test is not None else None
    probes = monitoring.make_probes(run, experiment, train, evaluation)
    loop = loop_config.of_run(run, 'pretrain', run.config.compile)
    with update_rules.mistakes(run.config.variant):
        result = main_loop.train_loop(experiment, train, loop, probes)
    metrics = {f'train/{name}': value for name, value in result.logs.items()}
    if evaluation is not None:
        metrics |= evaluation(result.state, experiment.max_steps - 1)
    encoder = inputs.encoder_part(result.state.online_params), inputs.encoder_part(result.state.online_state)
    seen = train if test is None else test
    looked = inputs.look_at_embeddings(run.config, seen, *encoder)
    drawing.draw_encoder(run, seen, *encoder)
    chosen = {}
    if evaluates:
        part = inputs.labelled_part(run.config, 'linear_eval', labelled)
        outcome = on_top.evaluate_encoder(run, 'linear_eval', part, test, *encoder)
        metrics |= outcome.metrics
        chosen = outcome.chosen
    elif test is not None and train.num_classes:
        drawing.draw_classifier(run, 'online', experiment, result.state, test)
    summary = summaries.summarize(run, 'pretrain', train, summaries.length_of(experiment, train), result, metrics)
    return {**summary, **chosen, **looked, 'collapses': monitoring.read_collapses(run.workdir, 'pretrain')}

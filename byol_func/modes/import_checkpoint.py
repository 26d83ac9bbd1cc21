"""`--mode=import`: converts a checkpoint of the official code into one of this code."""

from byol_func.bridge.official import read, to_state
from byol_func.errors import UserError, counted, one_of
from byol_func.utils import checkpointing
from byol_func.workdir.run import Run


def import_checkpoint(run: Run) -> None:
    """Converts the official checkpoint in --checkpoint and saves it to the workdir, where every mode finds it.

    Raises:
      UserError: the file is not an official checkpoint or does not fit the config, or the workdir already has
        checkpoints.
    """
    if not run.checkpoint:
        raise UserError('--checkpoint: required by --mode=import, a file such as pretrain.pkl of the official code')
    directory = f'{run.workdir}/checkpoints'
    if found := checkpointing.list_checkpoints(directory, 'pretrain'):
        raise UserError(f'--workdir={run.workdir}: already holds {found[-1][1].name}; choose another --workdir')
    official = read(run.checkpoint)
    one_of('config.optimizer', run.config.optimizer, ('lars',))  # The optimiser of the official code.
    config = run.plain_config()
    state = to_state(official, config['network'])
    # The config says how to continue training; the data that the checkpoint was trained on is unknown.
    config['imported'] = True
    path = checkpointing.save(directory, state, mode='pretrain', step=official.step, config=config)
    network = official.network
    one_seed = ' --config.num_seeds=1' if run.config.num_seeds > 1 else ''
    print(
        f'{path}: {network["encoder_class"]} of width {network["encoder_config"]["width_multiplier"]:g}, '
        f'saved at the official step {official.step} (the first is 0), with a classifier of '
        f'{counted(network["num_classes"], "class")}.\n'
        f'Continue with --workdir={run.workdir}{one_seed} and --mode=linear_eval, fine_tune, eval or pretrain.'
    )

"""`--mode=export`: a checkpoint of ours for the official code and for other libraries."""

import os

import torch

from byol_func import import_official
from byol_func.byol_experiment import ByolState, make_network
from byol_func.modes import common
from byol_func.runs import Run
from byol_func.utils import checkpointing, optimizers
from byol_func.utils.helpers import UserError, one_of


def export(run: Run) -> None:
    """Writes the pre-training of a workdir, or of --checkpoint, to --output in the --format asked for.

    The network is the one in the checkpoint, whatever the config says.

    Raises:
      UserError: there is no checkpoint, the format has no such network, or the file is there already.
    """
    function = one_of('--format', run.format, _FORMATS)
    if not run.output:
        raise UserError('--output: required by --mode=export, the file to write')
    if os.path.exists(run.output):
        raise UserError(f'--output={run.output}: is there already; remove it or choose another name')
    checkpoint = common.find_checkpoint(run, ('pretrain',))
    print(function(run, checkpoint))


def load_state(checkpoint: checkpointing.Checkpoint) -> ByolState:
    """The state of a pre-training, by the config that was saved with it."""
    config = checkpoint.config
    in_channels = checkpoint.tensors['online_params/encoder/initial_conv/w'].shape[1]
    num_classes = checkpoint.tensors['online_params/classifier/w'].shape[1]
    forward = make_network(**config['network'], num_classes=num_classes, in_channels=in_channels)
    params, state = forward.init(torch.Generator())
    optimizer = optimizers.make_optimizer(config['optimizer'], config['optimizer_config'])
    template = ByolState(params, params, state, state, optimizer(0.0).init(params))
    return checkpointing.restore(checkpoint, template)


def _official(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    state, network = load_state(checkpoint), checkpoint.config['network']
    import_official.write(run.output, state, step=checkpoint.step, network=network)
    momentum = '' if checkpoint.config['optimizer'] == 'lars' else ' Its momentum of LARS is zero.'
    return (
        f'{run.output}: {network["encoder_class"]}, saved after step {checkpoint.step}. The official code '
        f'takes it as <checkpoint_root>/pretrain.pkl.{momentum}'
    )


_FORMATS = {'official': _official}
FORMATS = tuple(_FORMATS)

"""The text of --help: each mode with an example command, and the flags grouped by purpose."""

import textwrap
from collections.abc import Mapping

_WIDTH = 100
GROUPS = {
    'What to run': ('mode', 'config', 'device', 'dry_run'),
    'Where to write and where to start': ('workdir', 'resume', 'checkpoint'),
    'For some modes': ('split', 'images', 'follow', 'output', 'format', 'push', 'register', 'images_per_shard'),
    'Logging and tracking': (
        'log_every_seconds',
        'tensorboard',
        'mlflow_tracking_uri',
        'mlflow_experiment_name',
        'mlflow_run_id',
        'mlflow_checkpoints',
    ),
}
# Mode -> what it does, and the flags of an example command.
EXAMPLES = {
    'pretrain': ('train BYOL', '--config=configs/folder.py --config.dataset.root=DIR --workdir=RUN'),
    'linear_eval': ('train a linear classifier on the frozen encoder', '--workdir=RUN --mode=linear_eval'),
    'fine_tune': (
        'train encoder and classifier on a part of the labels',
        '--workdir=RUN --mode=fine_tune --config.fine_tune.label_fraction=0.1',
    ),
    'eval': ('measure the classifier of a checkpoint, class by class', '--workdir=RUN --mode=eval --split=test'),
    'knn': ('classify by nearest neighbours among the embeddings', '--workdir=RUN --mode=knn'),
    'logistic': ('classify by logistic regression on the embeddings', '--workdir=RUN --mode=logistic'),
    'preview': ('draw the augmented views of some images', '--config=configs/digits.py --mode=preview --workdir=RUN'),
    'import': (
        'convert a checkpoint of the official code',
        '--config=configs/byol.py --mode=import --checkpoint=pretrain.pkl --workdir=RUN',
    ),
    'export': (
        'write the encoder for other programs',
        '--workdir=RUN --mode=export --format=timm --output=encoder.safetensors',
    ),
    'replay': ('repeat a step whose numbers were not finite', '--workdir=RUN --mode=replay'),
    'embed': ('write the embeddings of all images', '--workdir=RUN --mode=embed'),
    'predict': ('classify images without labels', '--workdir=RUN --mode=predict --images=PHOTOS'),
    'similar': (
        'find the images that look most like those in --images',
        '--workdir=RUN --mode=similar --images=PHOTO.jpg',
    ),
    'shards': (
        'write the images of a folder as tar shards',
        '--config=configs/folder.py --config.dataset.root=DIR --mode=shards --output=SHARDS',
    ),
}


def usage(program: str, flags: Mapping[str, tuple[str, str]]) -> str:
    """Returns the full text of --help.

    Args:
      program: the command that starts the program, such as 'python launch.py'.
      flags: name -> (default value, explanation) for every flag.
    """
    lines = [
        f'{program} --config=FILE [--config.FIELD=VALUE ...] [--mode=MODE] [--workdir=RUN] ...',
        '',
        *_wrap(
            'A config is a file of configs/. Single fields are set by --config.FIELD=VALUE, such as '
            '--config.batch_size=256 or --config.network.encoder_class=ResNet50; configs/byol.py explains every '
            'field. With the workdir of an earlier run, its config is the default.',
            '',
        ),
        '',
        'Modes, with an example of each',
    ]
    for mode, (what, example) in EXAMPLES.items():
        lines += [f'  {mode}: {what}', f'      {program} {example}']
    for title, names in GROUPS.items():
        lines += ['', title]
        for name in names:
            default, text = flags[name]
            given = f' (default: {default})' if default not in ('', 'None') else ''
            lines += _wrap(f'--{name}{given}: {text}', '  ')
    return '\n'.join(lines)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=f'{indent}    ' if indent else '')

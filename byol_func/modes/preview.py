"""`--mode=preview`: draws a contact sheet of the augmentations without training; every pre-training draws it too."""

import os

import optree
import torch

from byol_func.errors import UserError, counted
from byol_func.experiment import Experiment
from byol_func.modes.inputs import load_data, make_byol
from byol_func.report import curves
from byol_func.report.contact_sheet import contact_sheet
from byol_func.runtime import atomic, collectives
from byol_func.runtime.windows import crop_windows
from byol_func.training import loop_config, resuming
from byol_func.utils import dataset
from byol_func.workdir import files
from byol_func.workdir.run import Run

FILE = 'augmentations.png'
_SIDE = 256  # Side, in pixels, of the centre squares that are shown if the images have different sizes.


def preview(run: Run) -> None:
    """Draws the views that pre-training would see in its first steps, without training.

    Raises:
      UserError: `config.preview.num_images` is 0, the workdir holds a run with another config, the data
        cannot be loaded, or the file cannot be written.
    """
    if not run.config.preview.num_images:
        raise UserError('config.preview.num_images=0: expected 1 to 64 for --mode=preview')
    first = run.of_seed(0) if run.config.num_seeds > 1 else run
    resuming.check_continues(loop_config.of_run(first, 'pretrain', compiled=False))
    train, _ = load_data(run, to_pretrain=True)
    path = write_sheet(first, make_byol(first.config, train), train)
    if path:
        print(f'{path}: the views of the first steps, and the draws that produced them.')


def write_sheet(run: Run, experiment: Experiment, data: dataset.Examples) -> str | None:
    """Writes `augmentations.png` into the workdir and returns its path; None if `config.preview.num_images` is 0.

    The sheet shows the first images of step 0. Column i shows them with the draws of step i - 1, computed on the CPU by
    the experiment's own `sample` and `postprocess`. The state of the run is not changed. Only the first replica writes.

    Raises:
      UserError: the file cannot be written.
    """
    config = run.config
    num_images = min(config.preview.num_images, experiment.batch_size)
    if not num_images or collectives.replica_index() != 0:
        return None
    indices = dataset.batch_indices(
        0, seed=config.random_seed, num_examples=data.num_examples, batch_size=experiment.batch_size
    )
    inputs = _read(data, indices[:num_images])
    draws = [
        optree.tree_map(lambda x: x[:num_images], experiment.sample(step)) for step in range(config.preview.num_draws)
    ]
    postprocess = experiment.postprocess
    assert postprocess is not None and experiment.relative_crops is not None  # Every pre-training experiment has both.
    if None in data.image_shape:  # The size of an image is not known when `sample` draws.
        for step, of_step in enumerate(draws):
            for view, crops in experiment.relative_crops(step).items():
                windows = crop_windows(crops[:num_images], (_SIDE, _SIDE))
                of_step[view] = of_step[view]._replace(crop=windows)
    sheet = contact_sheet(
        inputs['images'],
        draws,
        [postprocess(inputs, d) for d in draws],
        config.augmentations.to_dict(),
        title=_title(config, num_images),
        captions=[data.class_names[label] if data.class_names else '' for label in inputs['labels'].tolist()],
    )
    path = os.path.join(run.workdir, FILE)
    with files.reporting_errors(path), atomic.replacing(path) as temporary:
        sheet.save(temporary, format='PNG')
    return path


def _read(data: dataset.Examples, indices: torch.Tensor) -> dataset.Batch:
    """Returns images and labels on the CPU; images of different sizes are cut to their centre squares."""
    if isinstance(data, dataset.Stream):
        data = data._replace(form=data.form._replace(source_size=data.source_size or _SIDE))
    return {name: values.cpu() for name, values in data.batch(indices).items()}


def _title(config, num_images: int) -> str:
    last = config.preview.num_draws - 1
    steps = f'the steps 0 to {last}' if last else 'step 0'
    return f'{curves.data_name(config)}: the first {counted(num_images, "image")} of step 0, with the draws of {steps}'

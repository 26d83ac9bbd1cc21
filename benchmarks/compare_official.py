"""Trains the official JAX code and this code from the same state, on the same images and augmentations.

  git clone --depth 1 https://github.com/google-deepmind/deepmind-research
  pip install -r requirements-dev.txt -r requirements-official.txt
  python benchmarks/compare_official.py --official=deepmind-research
  python benchmarks/compare_official.py --official=deepmind-research --encoder=ResNet18 --batch_size=64 --float64

The official code initialises the networks and writes a checkpoint; this code imports it, and then both
train independently for --steps updates. Every image is cropped once, with this code's crop (the official
crop uses TensorFlow); then the same random draws go through the official operators on one side and through
ours on the other. After each update every tensor of both states is compared. Finally both are timed, each
in its own process. Runs on a CPU.

In float32 the two sides round differently, by a relative 1e-7. Sooner or later that moves a unit across the
kink of its ReLU, and from then on the curves diverge like those of two seeds. --float64 shows the differences
that remain without this rounding.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import optree
import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import comparison_report as report  # noqa: E402
import measuring  # noqa: E402
from byol_func import byol_experiment
from byol_func.bridge.official import read, to_state
from byol_func.errors import UserError  # noqa: E402
from byol_func.experiment import assemble
from byol_func.modes import config_checks  # noqa: E402
from byol_func.runtime import compilation, memory  # noqa: E402
from byol_func.utils import augmentations, dataset  # noqa: E402
from byol_func.utils.checkpointing import leaf_names  # noqa: E402
from configs import byol as byol_config  # noqa: E402

FLAGS = flags.FLAGS
SIDES = ('official', 'ours')
flags.DEFINE_string('official', None, 'A checkout of deepmind-research.', required=True)
flags.DEFINE_string('encoder', 'TinyResNet', 'An encoder class that both have.')
flags.DEFINE_bool('resnet_v2', False, 'Version 2 of the encoder.')
flags.DEFINE_integer('width', 1, 'Its width multiplier.')
flags.DEFINE_string('images', None, 'A folder DIR/train/CLASS/*; without it the digits of scikit-learn.')
flags.DEFINE_integer('image_size', 32, 'Side of the views in pixels.')
flags.DEFINE_integer('batch_size', 32, 'Images per step.')
flags.DEFINE_integer('steps', 10, 'Updates to compare.')
flags.DEFINE_integer('hidden_size', 512, 'Hidden size of projector and predictor.')
flags.DEFINE_integer('output_size', 128, 'Their output size.')
flags.DEFINE_float('learning_rate', 3.2, 'Base learning rate; large, so that a few steps move something.')
flags.DEFINE_float('eta', 1e-3, 'Trust coefficient of LARS.')
flags.DEFINE_float('weight_decay', 1e-3, 'Weight decay.')
flags.DEFINE_float('base_target_ema', 0.97, 'Base tau.')
flags.DEFINE_integer('warmup_steps', 0, 'Steps of linear warm-up.')
flags.DEFINE_integer('seed', 0, 'Of initialisation, images and draws.')
flags.DEFINE_bool('float64', False, 'Both in float64: what is left then is not rounding.')
flags.DEFINE_bool('compile', True, 'Compile our step for the timing.')
flags.DEFINE_float('seconds', 10.0, 'Length of a stretch of the timing; 0, or float64: no timing.')
flags.DEFINE_enum('time', None, list(SIDES), 'Do nothing but time this side, and print its rates as JSON.')
flags.DEFINE_string('output', None, 'A folder for the table, the curves and all numbers as JSON.')

# Names of the trees in the table: first those of the state, then those of the parameters by module.
_GROUPS = {
    'gradients': ('gradients', ''),
    'encoder': ('online_params', 'encoder'),
    'projector': ('online_params', 'projector'),
    'predictor': ('online_params', 'predictor'),
    'classifier': ('online_params', 'classifier'),
    'BatchNorm': ('online_state', ''),
    'momentum': ('momentum', ''),
    'target': ('target_params', ''),
    'target BatchNorm': ('target_state', ''),
}


def our_config():
    """Returns the config of our side; one epoch is one step, so that epochs count the official steps."""
    config = byol_config.get_config('1000')
    config.random_seed, config.batch_size = FLAGS.seed, FLAGS.batch_size
    config.num_epochs = FLAGS.steps
    config.base_target_ema, config.image_size = FLAGS.base_target_ema, FLAGS.image_size
    config.precision = 'float32'
    config.dataset.name = 'folder' if FLAGS.images else 'digits'
    config.dataset.root = FLAGS.images or ''
    config.dataset.source_size = FLAGS.image_size if FLAGS.images else 0
    config.dataset.max_gib = 16.0
    network = config.network
    network.encoder_class = FLAGS.encoder
    network.encoder_config.update(resnet_v2=FLAGS.resnet_v2, width_multiplier=float(FLAGS.width))
    network.projector_hidden_size = network.predictor_hidden_size = FLAGS.hidden_size
    network.projector_output_size = FLAGS.output_size
    config.optimizer_config.lars.update(weight_decay=FLAGS.weight_decay, eta=FLAGS.eta)
    config.lr_schedule.update(base_learning_rate=FLAGS.learning_rate, warmup_epochs=float(FLAGS.warmup_steps))
    return config


def official_config(num_classes: int) -> dict:
    """Returns the same experiment as a config of the official code."""
    return dict(
        random_seed=FLAGS.seed,
        num_classes=num_classes,
        batch_size=FLAGS.batch_size,
        max_steps=FLAGS.steps,
        enable_double_transpose=False,
        base_target_ema=FLAGS.base_target_ema,
        network_config=dict(
            projector_hidden_size=FLAGS.hidden_size,
            projector_output_size=FLAGS.output_size,
            predictor_hidden_size=FLAGS.hidden_size,
            encoder_class=FLAGS.encoder,
            encoder_config=dict(resnet_v2=FLAGS.resnet_v2, width_multiplier=FLAGS.width),
            bn_config=dict(decay_rate=0.9, eps=1e-5, cross_replica_axis='i', create_scale=True, create_offset=True),
        ),
        optimizer_config=dict(weight_decay=FLAGS.weight_decay, eta=FLAGS.eta, momentum=0.9),
        lr_schedule_config=dict(base_learning_rate=FLAGS.learning_rate, warmup_steps=FLAGS.warmup_steps),
        evaluation_config=dict(subset='test', batch_size=100),
        checkpointing_config=dict(
            use_checkpointing=False, checkpoint_dir=None, save_checkpoint_interval=0, filename='x'
        ),
    )


class Ours:
    """Our experiment, started from an official checkpoint and trained on given views."""

    def __init__(self, config, data: dataset.Dataset, checkpoint: bytes):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, 'pretrain.pkl')
            path.write_bytes(checkpoint)
            state = to_state(read(path), config.network.to_dict())
        dtype = torch.float64 if FLAGS.float64 else torch.float32
        self.state = optree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, state)
        experiment = byol_experiment.make(
            config,
            num_examples=config.batch_size,
            num_classes=data.num_classes,
            image_shape=(3, *data.images.shape[2:]),
        )
        assert experiment.max_steps == FLAGS.steps
        self.with_augmentation = experiment.update
        given_views = assemble(experiment.parts._replace(postprocess=lambda inputs, draws: inputs))
        self._loss_fn = given_views.loss_fn
        self.update = lambda state, step, views: given_views.update_fn(state, step, None, views)
        self.sample = experiment.sample

    def step(self, step: int, views):
        """Does one update and returns its logs."""
        self.state, logs = self.update(self.state, _step(step), views)
        return {name: float(value) for name, value in logs.items()}

    def trees(self, views=None):
        """Returns the trees of our state, as `Official.trees` does for the official one."""
        momentum = next(s.mu for s in self.state.opt_state if hasattr(s, 'mu'))
        trees = {**{name: getattr(self.state, name) for name in self.state._fields[:4]}, 'momentum': momentum}
        if views is not None:
            trees['gradients'], _ = torch.func.grad(self._loss_fn, has_aux=True)(*self.state[:4], None, views)
        return {
            name: dict(zip(leaf_names(tree), optree.tree_leaves(tree), strict=True)) for name, tree in trees.items()
        }


def _step(step: int) -> torch.Tensor:
    """Returns the step index as a tensor; with --float64 it is float64, so that schedules use float64 as in JAX."""
    return torch.tensor(step, dtype=torch.float64 if FLAGS.float64 else None)


def make_views(experiment: Ours, config, data, step: int, official_code):
    """Returns the views of a step from the operators of both sides, and their crops.

    Returns:
      Our views `[B, 3, S, S]`, the official views `[B, S, S, 3]`, and the official inputs before augmentation.
    """
    batch = dataset.train_batch(data, step, seed=FLAGS.seed, batch_size=FLAGS.batch_size)
    presets = config.augmentations.to_dict()
    dtype = torch.float64 if FLAGS.float64 else torch.float32
    draws = optree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, experiment.sample(step))
    crops = {
        view: augmentations.random_crop(batch['images'], draws[view].crop.float(), FLAGS.image_size).to(dtype)
        for view in ('view1', 'view2')
    }
    labels = {'labels': batch['labels']}
    ours = augmentations.postprocess({**crops, **labels}, draws, presets)
    nhwc = lambda x: np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    before = {**{view: nhwc(crop) for view, crop in crops.items()}, 'labels': batch['labels'].numpy().astype(np.int32)}
    official = {
        **before,
        **{
            view: official_code.augment(
                before[view], {k: v.numpy() for k, v in draws[view]._asdict().items()}, presets[view]
            )
            for view in ('view1', 'view2')
        },
    }
    return ours, official, before


def differences(ours, official, views) -> dict[str, tuple[float, float]]:
    """Returns the largest difference in each group, absolute and relative to the group's largest element.

    Args:
      ours: our trees, from `Ours.trees`, with or without gradients.
      official: the official trees, from `Official.trees`.
      views: the views of both sides, or None.
    """
    found = {'views': _largest(*views)} if views else {}
    norm = lambda tree: torch.stack([x.double().square().sum() for x in tree.values()]).sum().sqrt()[None]
    if 'gradients' in ours:
        a, b = ({'norm': norm(side['gradients'])} for side in (ours, official))
        found['gradient norm'] = _largest(a, b)
    for group, (tree, module) in _GROUPS.items():
        if tree not in ours:
            continue
        a, b = ({name: x for name, x in side[tree].items() if name.startswith(module)} for side in (ours, official))
        found[group] = _largest(a, b)
    return found


def _largest(ours, official) -> tuple[float, float]:
    assert ours.keys() == official.keys(), sorted(ours.keys() ^ official.keys())
    pairs = [(x.double(), official[name].double()) for name, x in ours.items() if x.is_floating_point()]
    difference = max((x - y).abs().max().item() for x, y in pairs)
    largest = max(y.abs().max().item() for _, y in pairs)
    return difference, difference / max(largest, 1e-30)


def compare(ours: Ours, official, config, data, official_code):
    """Trains both sides; yields the logs of both and the differences after each step."""
    for step in range(FLAGS.steps):
        our_views, official_views, _ = make_views(ours, config, data, step, official_code)
        nchw = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        pixels = tuple(
            {name: views[name] if side == 0 else nchw(views[name]) for name in ('view1', 'view2')}
            for side, views in enumerate((our_views, official_views))
        )
        gradients = ours.trees(our_views)['gradients'], official.trees(official_views)['gradients']
        logs = ours.step(step, our_views), official.step(step, official_views)
        trees = tuple({**side.trees(), 'gradients': g} for side, g in zip((ours, official), gradients, strict=False))
        yield step, logs, differences(*trees, pixels)


def time_both() -> dict[str, dict[str, float]]:
    """Runs `time_side` for each side in its own process, so that they do not share threads and memory."""
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], '--steps=1', f'--time={side}']
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(process.stdout.splitlines()[-1])
    return found


def time_side(side: str, ours: Ours, official, config, data, official_code) -> dict[str, float]:
    """Returns the images per second of one update of a side, with and without augmentation."""
    draws = ours.sample(0)
    our_views, _, before = make_views(ours, config, data, 0, official_code)
    batch = dataset.train_batch(data, 0, seed=FLAGS.seed, batch_size=FLAGS.batch_size)
    device, step = torch.device('cpu'), torch.tensor(0)  # The speed of a step does not depend on its index.

    if side == 'ours':
        memory.keep_freed_memory()  # As in launch.py.

    def our_step(update, *inputs):
        state = optree.tree_map(torch.clone, ours.state)
        compiled = compilation.compile_update(update, compiled=FLAGS.compile)

        def run():
            nonlocal state
            state, _ = compiled(state, step, *inputs)

        return run

    steps = {
        'official': lambda: (official.augmented_step(before), official.plain_step(before)),
        'ours': lambda: (our_step(ours.with_augmentation, draws, batch), our_step(ours.update, our_views)),
    }[side]()
    return {
        name: FLAGS.batch_size / measuring.median(measuring.seconds_per_call(run, device, 3, FLAGS.seconds, warm_up=2))
        for name, run in zip(('augmentation and update', 'update alone'), steps, strict=True)
    }


def load_images(config) -> dataset.Dataset:
    """Returns the training images with three channels."""
    data, _ = dataset.load_train_and_test(**config.dataset)
    if data.images.shape[1] == 1:  # The official networks require three channels.
        data = data._replace(images=data.images.expand(-1, 3, -1, -1).contiguous())
    return data


def main(argv: list[str]) -> None:
    """Runs the comparison, prints and plots it, and times both sides."""
    del argv
    try:
        import official_code
    except ImportError as error:
        sys.exit(f'Error: {error}; pip install -r requirements-official.txt')
    official_code.jax.config.update('jax_enable_x64', FLAGS.float64)
    official_code.restore_old_jax()
    try:
        official_code.add_checkout(FLAGS.official)
        run(official_code)
    except (UserError, FileNotFoundError) as error:
        sys.exit(f'Error: {error}')


def run(official_code) -> None:
    """Runs the comparison once the official code can be imported."""
    official_code.check_encoder(FLAGS.encoder)
    config = our_config()
    config_checks.check_values(config)
    data = load_images(config)
    official = official_code.Official(official_config(data.num_classes), FLAGS.image_size)
    ours = Ours(config, data, official.checkpoint())
    if FLAGS.time:
        print(json.dumps(time_side(FLAGS.time, ours, official, config, data, official_code)))
        return
    lines, records, start = [], [], official.trees()

    def say(text=''):
        print(text, flush=True)
        lines.append(text)

    machine, versions = measuring.machine(torch.device('cpu')), official_code.versions()
    title = (
        f'{FLAGS.encoder}{" v2" if FLAGS.resnet_v2 else ""}, width {FLAGS.width}, {FLAGS.image_size} px, '
        f'batch {FLAGS.batch_size}, {"float64" if FLAGS.float64 else "float32"}'
    )
    rates: dict[str, dict[str, float]] = {}

    def save(is_drawn: bool) -> None:
        """Writes the results so far, so that an interrupted comparison keeps its finished steps."""
        if FLAGS.output:
            command = ' '.join(['python benchmarks/compare_official.py', *sys.argv[1:]])
            numbers = dict(command=command, machine=machine, versions=versions, images_per_second=rates, steps=records)
            report.write(pathlib.Path(FLAGS.output), title, [command, '', *lines], numbers, is_drawn)

    say(f'{title}; {FLAGS.images or "digits"}, seed {FLAGS.seed}')
    say(
        f'{machine["device"]}, {machine["threads"]} threads; torch {machine["torch"]}, '
        + ', '.join(f'{name} {version}' for name, version in versions.items())
    )
    say('Both start from one official checkpoint and train on their own. Relative to the largest element of a group.\n')
    say(report.header())
    for step, (our_logs, official_logs), found in compare(ours, official, config, data, official_code):
        records.append({'step': step, 'ours': our_logs, 'official': official_logs, 'differences': found})
        say(report.row(step + 1, our_logs, official_logs, found))
        save(is_drawn=False)
    moved = differences(official.trees(), start, None)
    del moved['momentum']  # It starts at zero.
    say('\n' + report.closing_table(records, moved))
    save(is_drawn=True)
    rates |= time_both() if FLAGS.seconds and not FLAGS.float64 else {}
    if rates:
        rows = [
            [name, *(rates[side][name] for side in SIDES), rates['ours'][name] / rate]
            for name, rate in rates['official'].items()
        ]
        headers = ['one step', 'official, images/s', 'ours', 'ours / official']
        say('\n' + tabulate.tabulate(rows, headers, floatfmt=('', '.1f', '.1f', '.2f')))
        say("Ours crops too; the official crop is TensorFlow's and not part of its step.")
    save(is_drawn=True)


if __name__ == '__main__':
    app.run(main)

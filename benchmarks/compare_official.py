"""Trains the official JAX code and this code from the same state, on the same images and augmentations.

  git clone --depth 1 https://github.com/google-deepmind/deepmind-research
  pip install -r requirements-dev.txt -r requirements-official.txt
  python benchmarks/compare_official.py --official=deepmind-research --float64 --steps=30 --eta=0.02
  python benchmarks/compare_official.py --official=deepmind-research --encoder=ResNet18 --batch_size=64
  python benchmarks/compare_official.py --official=deepmind-research --preset=300 --float64 --batch_size=8
  python benchmarks/compare_official.py --official=deepmind-research --protocol=fine_tune --float64 --steps=30
  python benchmarks/compare_official.py --official=deepmind-research --seeds=4 --steps=1000

The official code initialises the networks and writes a checkpoint; this code imports it, and then both train
independently for --steps updates. Every image is cropped once, with this code's crop (the official crop uses
TensorFlow); then the same random draws go through the official operators on one side and through ours on the other.
After each update every tensor of both states is compared. A verdict in words comes last. Runs on a CPU.

In float32 the two sides round differently, by a relative 1e-7. Sooner or later that moves a unit across the kink of
its ReLU, and from then on the curves diverge like those of two seeds. The official code does the same to itself when
one image is moved by one unit in the last place, and that is what the verdict measures ours against. --float64 shows
the differences that remain without this rounding.

--preset takes every value from the official config of 40, 100, 300 or 1000 epochs and from ours of the same name.
Flags that are given override both: a smaller batch, encoder or head. The updates are spread over the whole schedule.
--protocol=linear_eval or fine_tune compares the updates of training on top of an encoder, with the published values.
--seeds=N compares curves instead: the official code from N seeds, ours from the first.
"""

import json
import pathlib
import subprocess
import sys
import textwrap

import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import comparison_report as report
import measuring
import verdict
from byol_func.errors import UserError
from byol_func.modes import config_checks
from byol_func.utils import dataset
from configs import byol as byol_config

FLAGS = flags.FLAGS
SIDES = ('official', 'ours')
PROTOCOLS = {'linear_eval': 'a linear classifier on it', 'fine_tune': 'it together with a classifier'}
flags.DEFINE_string('official', None, 'A checkout of deepmind-research.', required=True)
flags.DEFINE_enum('preset', None, ['40', '100', '300', '1000'], 'A published configuration, by its epochs.')
flags.DEFINE_enum('protocol', None, list(PROTOCOLS), 'Compare this instead of the pre-training.')
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
flags.DEFINE_integer('seeds', 0, 'Compare curves only: the official code from so many seeds, ours from the first.')
flags.DEFINE_bool('float64', False, 'Both in float64: what is left then is not rounding.')
flags.DEFINE_bool('compile', True, 'Compile our step for the timing.')
flags.DEFINE_float('seconds', 0.0, 'Time both sides too, in stretches of this length; not in float64.')
flags.DEFINE_enum('time', None, list(SIDES), 'Do nothing but time this side, and print its rates as JSON.')
flags.DEFINE_string('output', None, 'A folder for report.html, the table, the curves and all numbers as JSON.')


def _network_flags() -> dict:
    """Returns the flags that shape the network, in the names of the official config."""
    return dict(
        projector_hidden_size=FLAGS.hidden_size,
        projector_output_size=FLAGS.output_size,
        predictor_hidden_size=FLAGS.hidden_size,
        encoder_class=FLAGS.encoder,
        encoder_config=dict(resnet_v2=FLAGS.resnet_v2, width_multiplier=FLAGS.width),
    )


_SHAPES = {  # Flag -> the fields of the official network config that it sets.
    'hidden_size': ('projector_hidden_size', 'predictor_hidden_size'),
    'output_size': ('projector_output_size',),
    'encoder': ('encoder_class',),
    'resnet_v2': ('encoder_config',),
    'width': ('encoder_config',),
}


def _network() -> dict:
    """Returns the fields of the network that differ from the published ones: all, or with --preset those given."""
    fields = _network_flags()
    chosen = {field for flag, names in _SHAPES.items() if not FLAGS.preset or FLAGS[flag].present for field in names}
    return {field: value for field, value in fields.items() if field in chosen}


def our_config():
    """Returns the config of our side; without --preset one epoch is one step, as the official code counts steps."""
    config = byol_config.get_config(FLAGS.preset or '1000')
    config.random_seed, config.batch_size, config.image_size = FLAGS.seed, FLAGS.batch_size, FLAGS.image_size
    config.precision = 'float32'
    config.dataset.name = 'folder' if FLAGS.images else 'digits'
    config.dataset.root = FLAGS.images or ''
    config.dataset.source_size = FLAGS.image_size if FLAGS.images else 0
    config.dataset.max_gib = 16.0
    config.network.update(_network())
    config.network.encoder_config.width_multiplier = float(config.network.encoder_config.width_multiplier)
    if not FLAGS.preset:
        config.num_epochs, config.base_target_ema = float(FLAGS.steps), FLAGS.base_target_ema
        config.optimizer_config.lars.update(weight_decay=FLAGS.weight_decay, eta=FLAGS.eta)
        config.lr_schedule.update(base_learning_rate=FLAGS.learning_rate, warmup_epochs=float(FLAGS.warmup_steps))
    return config


def official_config(num_classes: int, official_code) -> dict:
    """Returns the same experiment as a config of the official code."""
    config = official_code.published_config(int(FLAGS.preset or 1000), FLAGS.batch_size)
    config.update(random_seed=FLAGS.seed, num_classes=num_classes)
    config['network_config'].update(_network())
    config['checkpointing_config']['use_checkpointing'] = False
    if not FLAGS.preset:
        config.update(max_steps=FLAGS.steps, base_target_ema=FLAGS.base_target_ema)
        config['optimizer_config'].update(weight_decay=FLAGS.weight_decay, eta=FLAGS.eta)
        config['lr_schedule_config'] = dict(base_learning_rate=FLAGS.learning_rate, warmup_steps=FLAGS.warmup_steps)
    return config


def load_images(config) -> dataset.Dataset:
    """Returns the training images with three channels."""
    data, _ = dataset.load_train_and_test(**config.dataset)
    if data.images.shape[1] == 1:  # The official networks require three channels.
        data = data._replace(images=data.images.expand(-1, 3, -1, -1).contiguous())
    return data


class Output:
    """Prints lines and writes all results to the folder --output as they come."""

    def __init__(self, title: str, versions: dict[str, str]):
        self.title, self.lines, self.numbers = title, [], {}
        self._command = ' '.join(['python benchmarks/compare_official.py', *sys.argv[1:]])
        self._about = {**measuring.machine(torch.device('cpu')), **versions}
        self.folder = pathlib.Path(FLAGS.output) if FLAGS.output else None
        self.say(f'{title}; {FLAGS.images or "digits"}, seed {FLAGS.seed}')
        self.say(f'{self._about["device"]}, {self._about["threads"]} threads')
        self.say(', '.join(f'{name} {version}' for name, version in {'torch': torch.__version__, **versions}.items()))

    def say(self, text: str = '') -> None:
        """Prints lines; a sentence is wrapped to 100 columns."""
        for line in text.split('\n'):
            for part in textwrap.wrap(line, 100) if len(line) > 100 else [line]:
                print(part, flush=True)
                self.lines.append(part)

    def save(self) -> None:
        """Writes the log and the numbers so far, so that an interrupted comparison keeps its finished steps."""
        if self.folder:
            numbers = dict(command=self._command, machine=self._about, **self.numbers)
            report.write(self.folder, [self._command, '', *self.lines], numbers)

    def save_page(self, verdicts: list[verdict.Verdict], method: str, rows=(), heads=()) -> None:
        """Writes report.html; curves.png has to be there."""
        self.save()
        if self.folder:
            report.write_page(
                self.folder,
                title=self.title,
                verdicts=[v.sentence for v in verdicts],
                method=method,
                rows=rows,
                heads=heads,
                command=self._command,
                environment=self._about,
                log='\n'.join(self.lines),
            )


def compare_updates(out: Output, sides, ours, official, data, official_code) -> None:
    """Compares every tensor after each update and gives the verdict."""
    start = 'the encoder of a short official pre-training' if FLAGS.protocol else 'one official checkpoint'
    spread = f' The {FLAGS.steps} updates are spread over the {ours.max_steps} of the schedule.'
    method = (
        f'Both codes start from {start}, see the same images and random draws, and train '
        f'{PROTOCOLS.get(FLAGS.protocol, "on their own")}.{spread if FLAGS.preset or FLAGS.protocol else ""}'
    )
    precision = 'float64' if FLAGS.float64 else 'float32'
    steps = [i * ours.max_steps // FLAGS.steps for i in range(FLAGS.steps)]
    records, start = [], official.trees()
    out.say(f'{method}\n')
    for record in sides.compare(ours, official, data, official_code, steps, FLAGS.seed):
        records.append(record)
        out.say(f'{report.header(record)}\n' * (len(records) == 1) + report.row(record, len(records)))
        out.numbers = {'precision': precision, **report.packed(records)}
        out.save()
    moved = sides.differences(start, official.trees())
    moved = {group: value for group, value in moved.items() if 'momentum' not in group}  # It starts at zero.
    rows, heads = report.groups(records, moved), report.headers(records)
    out.say(f'\n{report.table(rows, heads)}')
    out.say('itself: the official code to itself, with one image moved by one unit in the last place')
    found = verdict.judge(records, precision)
    out.numbers['verdict'] = found._asdict()
    out.say(f'\n{found.sentence}')
    if out.folder:
        report.plot_updates(out.folder / 'curves.png', out.title, records)
    out.save_page([found], method, rows, heads)


def compare_seeds(out: Output, sides, ours, official, data, official_code) -> None:
    """Compares the curves of the official code from several seeds with ours and gives the verdict."""
    seeds = list(range(FLAGS.seed, FLAGS.seed + FLAGS.seeds))
    method = (
        f'The official code from {len(seeds)} seeds, each with its own initial state, images and draws, and this code '
        'from the official initial state of the first, on the same images and draws.'
    )
    out.say(method)
    words = {'repr_loss': 'loss of the representation', 'classif_loss': 'cross entropy of the classifier'}
    curves: dict[str, dict[str, list[float]]] = {what: {} for what in words.values()}
    out.numbers['curves'] = curves
    for record in sides.train_over_seeds(ours, official, data, official_code, seeds):
        step = record.pop('step')
        for log, what in words.items():
            for name, logs in record.items():
                curves[what].setdefault(name, []).append(round(logs[log], 5))
        if (step + 1) % 50 == 0 or step == 0:
            losses = ', '.join(f'{name}: {logs["repr_loss"]:.3f}' for name, logs in record.items())
            out.say(f'update {step + 1}: {losses}')
            out.save()
    found = [verdict.judge_curves(of_log, what) for what, of_log in curves.items()]
    out.numbers['verdicts'] = [v._asdict() for v in found]
    out.say()
    for v in found:
        out.say(v.sentence)
    if out.folder:
        report.plot_seeds(out.folder / 'curves.png', out.title, curves)
    out.save_page(found, method)


def time_both() -> dict[str, dict[str, float]]:
    """Times each side in its own process, so that they do not share threads and memory."""
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], f'--time={side}']
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(process.stdout.splitlines()[-1])
    return found


def say_rates(out: Output) -> None:
    """Times both sides and prints their rates."""
    rates = time_both()
    out.numbers['images_per_second'] = rates
    rows = [
        [name, *(rates[side][name] for side in SIDES), rates['ours'][name] / rate]
        for name, rate in rates['official'].items()
    ]
    headers = ['one step', 'official, images/s', 'ours', 'ours / official']
    out.say('\n' + tabulate.tabulate(rows, headers, floatfmt=('', '.1f', '.1f', '.2f')))
    out.say("Ours crops too; the official crop is TensorFlow's and not part of its step.")
    out.save()


def run(official_code) -> None:
    """Runs the comparison once the official code can be imported."""
    import side_by_side as sides

    official_code.check_encoder(FLAGS.encoder)
    if FLAGS.protocol and (FLAGS.seeds or FLAGS.seconds or FLAGS.time):
        raise UserError(
            f'--protocol={FLAGS.protocol}: expected neither --seeds nor --seconds, which are for pre-training'
        )
    config = our_config()
    config_checks.check_values(config)
    data = load_images(config)
    theirs = official_config(data.num_classes, official_code)
    official = official_code.Official(theirs, FLAGS.image_size)
    dtype = torch.float64 if FLAGS.float64 else torch.float32
    num_examples = official_code.images_of_imagenet() if FLAGS.preset else FLAGS.batch_size
    ours = sides.Ours(config, data, official.checkpoint(), num_examples, dtype)
    assert ours.max_steps == theirs['max_steps']
    if FLAGS.protocol:
        import protocols

        ours, official = protocols.start(FLAGS.protocol, ours, official, data, FLAGS.seed)
    if FLAGS.time:
        views = ours.make_views(data, 0, official_code, FLAGS.seed)
        batch = dataset.train_batch(data, 0, seed=FLAGS.seed, batch_size=FLAGS.batch_size)
        limits = dict(compiled=FLAGS.compile, seconds=FLAGS.seconds)
        print(json.dumps(sides.rates(FLAGS.time, ours, official, views, batch, **limits)))
        return
    encoder = theirs['network_config']
    title = (
        f'{f"Preset of {FLAGS.preset} epochs: " if FLAGS.preset else ""}'
        f'{f"{FLAGS.protocol}: " if FLAGS.protocol else ""}{encoder["encoder_class"]}'
        f'{" v2" if encoder["encoder_config"]["resnet_v2"] else ""}, '
        f'width {encoder["encoder_config"]["width_multiplier"]}, {FLAGS.image_size} px, '
        f'batch {FLAGS.batch_size}, {"float64" if FLAGS.float64 else "float32"}'
    )
    out = Output(title, official_code.versions())
    (compare_seeds if FLAGS.seeds else compare_updates)(out, sides, ours, official, data, official_code)
    if FLAGS.seconds and not FLAGS.float64:
        say_rates(out)


def main(argv: list[str]) -> None:
    """Imports the official code and runs the comparison."""
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


if __name__ == '__main__':
    app.run(main)

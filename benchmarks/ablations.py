"""Repeats the ablations of the BYOL paper at small scale, to see which design choices matter.

  python benchmarks/ablations.py --table=target --root=DIR --out=OUT

Tables of the paper (arXiv 2006.07733): target (5a), heads (14a, and row 7 of 5b), views (17), batch and loss (5b);
norms: the abstract of "BYOL works even without batch statistics" (arXiv 2010.10241), four times as long here.
For every row and seed a narrow ResNet-10 is trained for 1,560 steps of 64 images on 20,000 images of CIFAR-10, with
views of 16 x 16 pixels without blur, and evaluated at 24 x 24 by a linear classifier on the frozen encoder. The
batches have no numbers of the paper beside them: table 16 averages the gradients of several batches for each step
(`configs/variants/accumulation.py`), while here every batch makes a step. Finished runs are skipped, so repeating the
command resumes the table; several processes can share OUT if their --seeds differ. Writes OUT/ablations_TABLE.json,
.txt and .png.
"""

import json
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

import matplotlib
import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import launch  # noqa: E402
from byol_func.errors import UserError  # noqa: E402
from byol_func.modes import config_checks, running  # noqa: E402
from byol_func.workdir.run import Run  # noqa: E402
from configs import byol as byol_config  # noqa: E402
from configs import cifar10  # noqa: E402

del launch  # Importing it defines the flags of the modes.
FLAGS = flags.FLAGS
flags.DEFINE_enum('table', 'target', ('target', 'heads', 'views', 'norms', 'batch', 'loss'), 'Which ablation.')
flags.DEFINE_string('root', '~/data', 'Where torchvision keeps CIFAR-10, or a folder with train/CLASS/*.')
flags.DEFINE_string('out', 'runs/ablations', 'Where runs and tables are written.')
flags.DEFINE_list('seeds', ['0', '1', '2'], 'The seeds to train now; the table takes all that are there.')


class Row(NamedTuple):
    """A row of a table: its config fields (or a variant with its options) and the paper's top-1 on ImageNet."""

    name: str
    fields: dict[str, Any]
    paper: float | None = None


def variant(name: str, **options) -> dict[str, Any]:
    """Returns the config fields that select an update rule from configs/variants."""
    return {'variant': f'configs/variants/{name}.py', 'variant_config': options}


def _contrast(**options) -> dict[str, Any]:
    return variant('contrast', temperature=0.1, **options)  # That of table 5b.


def _of_both_views(fields: dict[str, Any]) -> dict[str, Any]:
    return {f'augmentations.{view}.{name}': value for view in ('view1', 'view2') for name, value in fields.items()}


_LONGER = {'num_epochs': 20, 'base_target_ema': 0.97}  # A network with group norm collapses first, and needs longer.
_GROUP_NORM = {'network.norm': 'group_norm', 'network.head_norm': 'group_norm'}
_NO_COLOR, _NO_SOLARIZE = {'color_transform.apply_prob': 0.0}, {'solarize.apply_prob': 0.0}
_NO_FLIP, _NO_GRAYSCALE = {'random_flip': False}, {'color_transform.to_grayscale_prob': 0.0}
TABLES = {
    'target': [
        Row('random network, tau 1', variant('random_target'), 18.8),
        Row('moving average, base tau 0.999', dict(base_target_ema=0.999), 69.8),
        Row('moving average, base tau 0.99', dict(base_target_ema=0.99), 72.5),
        Row('moving average, base tau 0.9', dict(base_target_ema=0.9), 68.4),
        Row('stop-gradient of the online network, tau 0', variant('tau_zero'), 0.3),
    ],
    'heads': [
        Row('projector 2, predictor 2', {}, 72.5),
        Row('no predictor', {'network.predictor_depth': 0}, 0.2),
        Row('predictor 1', {'network.predictor_depth': 1}, 71.5),
        Row('predictor 3', {'network.predictor_depth': 3}, 71.4),
        Row('projector 1', {'network.projector_depth': 1}, 65.0),
        Row('projector 3', {'network.projector_depth': 3}, 72.1),
        Row('no projector', {'network.projector_depth': 0}),
    ],
    'views': [
        Row('all but blur', {}, 71.2),
        Row('all but blur and grayscale', _of_both_views(_NO_GRAYSCALE)),
        Row('all but blur and colour', _of_both_views(_NO_COLOR)),
        Row('crop and colour', _of_both_views(_NO_FLIP | _NO_SOLARIZE), 70.7),
        Row('crop and flip', _of_both_views(_NO_COLOR | _NO_SOLARIZE), 60.1),
        Row('crop', _of_both_views(_NO_FLIP | _NO_COLOR | _NO_SOLARIZE), 59.4),
    ],
    'norms': [
        Row('batch norm', _LONGER, 74.3),
        Row(
            'group norm, standardised weights',
            {**_LONGER, **_GROUP_NORM, 'lr_schedule.base_learning_rate': 8e-3},
            73.9,
        ),
    ],
    'batch': [Row(f'batch {size}', dict(batch_size=size)) for size in (512, 256, 128, 64, 32, 16)],
    'loss': [
        Row('BYOL: predictor, target, beta 0', _contrast(beta=0.0), 72.5),
        Row('predictor, target, beta 1', _contrast(beta=1.0), 70.9),
        Row('target, beta 1', _contrast(beta=1.0, predictor=False), 70.7),
        Row('SimCLR: beta 1', _contrast(beta=1.0, predictor=False, target=False), 69.4),
        Row('predictor, beta 1', _contrast(beta=1.0, target=False), 69.1),
        Row('predictor, beta 0', _contrast(beta=0.0, target=False), 0.3),
        Row('target, beta 0', _contrast(beta=0.0, predictor=False), 0.2),
        Row('neither, beta 0', _contrast(beta=0.0, predictor=False, target=False), 0.1),
    ],
}


def make_config(table: str, row: Row, seed: int):
    """Returns the config of a run."""
    config = cifar10.get_config('small')
    root = pathlib.Path(FLAGS.root).expanduser()
    config.dataset.root, config.dataset.fraction = str(root), 0.4
    if (root / 'train').is_dir():
        config.dataset.name, config.dataset.source_size = 'folder', 32
    config.image_size, config.view_size = 24, 16
    config.random_seed, config.num_seeds = seed, 1
    config.num_epochs, config.batch_size = 5, 64
    config.base_target_ema = 0.99  # As in the paper's ablations.
    network = config.network
    network.encoder_config.width_multiplier = 0.125
    network.projector_hidden_size = network.predictor_hidden_size = 256
    network.projector_output_size = 64
    config.final_linear_eval, config.linear_eval.compare_untrained = True, True
    config.linear_eval.num_epochs = 10
    config.eval_every_epochs, config.pictures, config.preview.num_images = 0.0, False, 0
    config.monitoring.health_every_steps, config.monitoring.knn_bank_size = 50, 5_000
    fields = dict(row.fields)
    options = fields.pop('variant_config', {})
    config.update_from_flattened_dict(fields)
    config.variant_config.update(options)
    config.precision = 'float32'
    reference = byol_config.get_config()
    config_checks.check_variant(config, reference)
    config_checks.check_fields(config, reference)
    config_checks.check_values(config)
    return config


def folder(table: str, row: Row, seed: int) -> pathlib.Path:
    """Returns the workdir of a run."""
    name = ''.join(c if c.isalnum() else '_' for c in row.name)
    return pathlib.Path(FLAGS.out, table, name, f'seed_{seed}')


def train(table: str, row: Row, seed: int) -> None:
    """Trains one run, unless it is finished already."""
    workdir = folder(table, row, seed)
    if not (workdir / 'summary.pretrain.json').exists():
        run = Run(make_config(table, row, seed), str(workdir), torch.device('cpu'), None, 60.0)
        running.run_mode('pretrain', run)


def results(table: str) -> list[dict[str, Any]]:
    """Returns, for each row, the linear and k-NN accuracies in percent, the number of collapses, and the minutes."""
    found = []
    for row in TABLES[table]:
        paths = sorted(folder(table, row, 0).parent.glob('seed_*/summary.pretrain.json'))
        summaries = [json.loads(path.read_text()) for path in paths]
        top1 = [100 * summary['test/linear_top1'] for summary in summaries]
        last = [collapses[-1:] for summary in summaries if (collapses := summary['collapses'])]
        found.append(
            {
                'row': row.name,
                'paper_top1': row.paper,
                'top1': top1,
                'untrained': [100 * summary['test/untrained_linear_top1'] for summary in summaries],
                'mean': statistics.fmean(top1) if top1 else None,
                'std': statistics.stdev(top1) if len(top1) > 1 else None,
                'knn': [100 * summary['test/online_knn_top1'] for summary in summaries],
                'collapsed': sum(collapse[0]['recovered_step'] is None for collapse in last),
                'collapsed_for_a_while': len(last),
                'minutes': sum(summary['seconds'] for summary in summaries) / 60,
            }
        )
    return found


def agreement(found: list[dict[str, Any]]) -> str:
    """Returns a sentence that says which pairs of rows have the same order here as in the paper."""
    known = [row for row in found if row['paper_top1'] is not None and row['mean'] is not None]
    same, other = [], []
    for i, a in enumerate(known):
        for b in known[i + 1 :]:
            agrees = (a['mean'] - b['mean']) * (a['paper_top1'] - b['paper_top1']) > 0
            spread = max((a['std'] or 0.0), (b['std'] or 0.0))
            within = '' if abs(a['mean'] - b['mean']) > spread else ', within the spread'
            (same if agrees else other).append(f'"{a["row"]}" and "{b["row"]}"{within}')
    disagreeing = f' It does not for {"; ".join(other)}.' if other else ''
    return f"The order of {len(same)} of {len(same) + len(other)} pairs of rows agrees with the paper's.{disagreeing}"


def write(table: str, found: list[dict[str, Any]]) -> None:
    """Prints the table and writes it as JSON, text and picture."""
    out = pathlib.Path(FLAGS.out)
    rows = [
        [
            row['row'],
            '-' if row['mean'] is None else f'{row["mean"]:.1f}',
            '-' if row['std'] is None else f'{row["std"]:.1f}',
            f'{statistics.fmean(row["knn"]):.1f}' if row['knn'] else '-',
            f'{row["collapsed"]} of {len(row["top1"])}',
            f'{row["minutes"]:.1f}',
            '-' if row['paper_top1'] is None else f'{row["paper_top1"]:.1f}',
        ]
        for row in found
    ]
    headers = [table, 'linear top-1 %', 'std', 'k-NN %', 'collapsed', 'minutes', 'paper (ImageNet)']
    text = tabulate.tabulate(rows, headers, disable_numparse=True, colalign=('left', *['right'] * 6))
    untrained = [top1 for row in found for top1 in row['untrained']]
    untrained_line = (
        f'A linear classifier on the untrained encoders: {statistics.fmean(untrained):.1f} %.' if untrained else ''
    )
    text = f'{text}\n\n{untrained_line}\n{agreement(found)}\n'
    print(text)
    (out / f'ablations_{table}.txt').write_text(text)
    (out / f'ablations_{table}.json').write_text(json.dumps(found, indent=2) + '\n')
    draw(table, [row for row in found if row['mean'] is not None], out / f'ablations_{table}.png')


def draw(table: str, found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws bars of the mean accuracies, with a dot for every seed, beside bars of the paper's accuracies."""
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.6 * len(found)), layout='constrained')
    places = range(len(found))
    axes.barh([p - 0.2 for p in places], [row['mean'] for row in found], 0.38, color='#0072b2', label='here, mean')
    for place, row in zip(places, found, strict=True):
        axes.plot(row['top1'], [place - 0.2] * len(row['top1']), 'o', color='#1d2733', markersize=4)
        if row['paper_top1'] is not None:
            axes.barh(place + 0.2, row['paper_top1'], 0.38, color='#e69f00', label='' if place else 'paper, ImageNet')
    axes.set_yticks(list(places), [row['row'] for row in found])
    axes.axvline(
        statistics.fmean(top1 for row in found for top1 in row['untrained']), color='#1d2733', ls=':', label='untrained'
    )
    axes.invert_yaxis()
    axes.set_xlabel('top-1 of a linear classifier, %')
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Trains the missing runs and writes the table."""
    del argv
    rows = TABLES[FLAGS.table]
    pathlib.Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
    try:
        for seed in map(int, filter(None, FLAGS.seeds)):
            for row in rows:
                train(FLAGS.table, row, seed)
    except UserError as error:
        sys.exit(f'Error: {error}')
    write(FLAGS.table, results(FLAGS.table))


if __name__ == '__main__':
    app.run(main)

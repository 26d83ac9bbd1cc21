"""Trains every update rule of configs/variants on the digits, with BYOL beside them.

  python benchmarks/gallery.py --out=OUT
  python benchmarks/gallery.py --write

The settings are those of configs/digits.py, but for the epochs and the warm-up. Images of 8 x 8 pixels cannot rank
methods: a frozen random target does as well there as BYOL. The table shows that each rule trains, whether its
projections spread, and roughly where it lands. Finished runs are skipped, so repeating the command goes on. Writes
OUT/gallery.json, gallery.txt and log.txt. --write copies the numbers of benchmarks/results/variants_digits
into the docstrings of the rules.
"""

import argparse
import contextlib
import json
import logging
import pathlib
import re
import sys
from typing import Any

import tabulate
from absl import logging as absl_logging

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import byol_func  # noqa: E402
from byol_func.report import curves  # noqa: E402

RULES = ROOT / 'configs' / 'variants'
RESULTS = ROOT / 'benchmarks' / 'results' / 'variants_digits'
EPOCHS = 8
FIELDS = {
    'num_epochs': EPOCHS,
    'num_seeds': 1,
    'lr_schedule.warmup_epochs': 1.0,
    'eval_every_epochs': 0.0,
    'monitoring.knn_bank_size': 1442,
    'linear_eval.compare_pixels': False,
    'linear_eval.compare_untrained': False,
    'pictures': False,
    'preview.num_images': 0,
    'precision': 'float32',
    'compile': False,
}
_GROUP_NORM = {'network.norm': 'group_norm', 'network.head_norm': 'group_norm'}
# Why group_norm collapses on the digits: row -> the rule and the fields in which it differs from the others.
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    'group_norm, batch_norm in the heads': ('group_norm', {'network.head_norm': 'batch_norm'}),
    'group_norm, LARS at rate 1': ('group_norm', {'optimizer': 'lars', 'lr_schedule.base_learning_rate': 1.0}),
    'group_norm, rate / 16': ('group_norm', {'lr_schedule.base_learning_rate': 5e-4}),
    'group_norm, rate / 16, predictor x 10': (
        'predictor_rate',
        {**_GROUP_NORM, 'lr_schedule.base_learning_rate': 5e-4},
    ),
}
_SHOWN = {'linear': 'test/linear_top1', 'k-NN': 'test/online_knn_top1', 'untrained': 'test/untrained_linear_top1'}
_LINE = re.compile(r'(?<=\n)Here:      .*\n')


def names() -> list[str]:
    """Returns the rows of the table: BYOL, the rules of the gallery, the probes."""
    return ['BYOL', *sorted(path.stem for path in RULES.glob('*.py') if path.stem != '__init__'), *PROBES]


def train(name: str, workdir: pathlib.Path) -> None:
    """Trains a rule and evaluates its encoder, unless it is done; `log.txt` takes what it says."""
    if (workdir / 'summary.pretrain.json').exists():
        return
    rule, fields = PROBES.get(name, (name, {}))
    config = byol_func.get_config('digits' if name == 'BYOL' else str(RULES / f'{rule}.py'), FIELDS | fields)
    if name == 'BYOL':
        config.linear_eval.compare_untrained = True
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / 'log.txt', 'a') as log, contextlib.redirect_stdout(log):
        handler = logging.StreamHandler(log)
        absl_logging.get_absl_logger().addHandler(handler)
        byol_func.pretrain(config, workdir, device='cpu')
        absl_logging.get_absl_logger().removeHandler(handler)


def measure(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns accuracies in percent, the last spread of the projections (0..1), and the seed."""
    summary = json.loads((workdir / 'summary.pretrain.json').read_text())
    found = {label: round(100 * summary[name], 2) for label, name in _SHOWN.items() if name in summary}
    spreads = curves.read_metrics(workdir)['pretrain']['health/projection_spread'].values
    return found | {'spread': spreads[-1], 'repr_loss': summary['train/repr_loss'], 'seed': summary['seed']}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the measurements as text."""
    rows = [
        [
            name,
            *(f'{row[label]:.1f}' for label in ('linear', 'k-NN')),
            f'{row["spread"]:.2f}',
            f'{row["repr_loss"]:.3g}',
        ]
        for name, row in found.items()
    ]
    headers = [f'digits, {EPOCHS} epochs, one seed', 'linear top-1 %', 'k-NN %', 'spread', 'its own loss']
    text = tabulate.tabulate(rows, headers, disable_numparse=True, colalign=('left', *['right'] * 4))
    return f'{text}\n\nA linear classifier on the untrained encoder of BYOL: {found["BYOL"]["untrained"]:.1f} %.\n'


def sentence(found: dict[str, dict[str, Any]], name: str) -> str:
    """Returns the line of a rule's docstring."""
    numbers = [
        f'{found[rule]["linear"]:.1f} % linear, {found[rule]["k-NN"]:.1f} % k-NN, spread {found[rule]["spread"]:.2f}'
        for rule in (name, 'BYOL')
    ]
    return f'Here:      digits, {EPOCHS} epochs, one seed: {numbers[0]} (BYOL: {numbers[1].replace(" linear", "")}).\n'


def described(text: str, line: str) -> str:
    """Returns the source of a rule with the line below the command of its docstring."""
    text = _LINE.sub('', text, count=1)
    return re.sub(r'(?<=\n)Command:   .*\n', lambda match: match[0] + line, text, count=1)


def main() -> None:
    """Trains what is missing and writes the table, or writes the docstrings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, default='runs/gallery', help='where runs and tables are written')
    parser.add_argument('--write', action='store_true', help='train nothing; write the docstrings')
    arguments = parser.parse_args()
    if arguments.write:
        found = json.loads((RESULTS / 'gallery.json').read_text())
        for name in set(names()[1:]) - set(PROBES):
            path = RULES / f'{name}.py'
            path.write_text(described(path.read_text(), sentence(found, name)))
        return
    absl_logging.set_verbosity(absl_logging.INFO)
    found = {}
    for name in names():
        train(name, arguments.out / name)
        found[name] = measure(arguments.out / name)
        (arguments.out / 'gallery.json').write_text(json.dumps(found, indent=2) + '\n')
        (arguments.out / 'gallery.txt').write_text(table(found))
    logs = ''.join(f'{name}\n\n{(arguments.out / name / "log.txt").read_text()}\n' for name in found)
    (arguments.out / 'log.txt').write_text(logs.replace(str(arguments.out), 'runs/gallery'))
    print(table(found))


if __name__ == '__main__':
    main()

"""Publishes the encoder of a finished run beside its result: `encoder.safetensors` and a model card.

    python benchmarks/model_cards.py --workdir=runs/digits --name=digits_cpu

The result must be in benchmarks/results/NAME already (`results_table.py --add`). Every number of the card is read from
the result's summaries, the recipe from the config in the file.
"""

import argparse
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import results_table  # noqa: E402
from byol_func.modes import hub  # noqa: E402
from byol_func.training import resuming  # noqa: E402
from byol_func.utils import checkpointing  # noqa: E402

FILE, CARD = 'encoder.safetensors', 'MODEL_CARD.md'

# Name of the data in the table of results, without what stands in brackets -> source and terms.
_DATA = {
    'digits': (
        'Optical recognition of handwritten digits, 8 x 8 pixels, as scikit-learn contains it '
        '(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0)'
    ),
    'CIFAR-10': (
        'CIFAR-10 (A. Krizhevsky, *Learning multiple layers of features from tiny images*, 2009), '
        'which states no licence'
    ),
    'EMNIST letters': (
        'EMNIST letters (G. Cohen et al., arXiv 1702.05373), made from NIST Special Database 19, a work of the '
        'government of the United States'
    ),
}
_MEASURES = {
    'linear': 'linear classifier on the frozen encoder',
    'k-NN': 'k nearest neighbours',
    'untrained': 'linear classifier on the untrained encoder',
    'pixels, logistic': 'logistic regression on raw pixels',
    'pixels, k-NN': 'nearest neighbours of raw pixels',
}


def write_encoder(workdir: pathlib.Path, name: str) -> None:
    """Writes the encoder of a workdir's newest checkpoint to a result, without the paths of this machine."""
    checkpoint, _ = resuming.newest_good(workdir / 'checkpoints', 'pretrain', resume='must')
    assert checkpoint is not None
    checkpointing.write(hub.published(checkpoint, str(results_table.RESULTS / name / FILE)))


def card(name: str) -> str:
    """Returns the model card of a result."""
    path = results_table.RESULTS / name / FILE
    encoder, summary = checkpointing.load(path), results_table.read_results()[name]
    row, config = results_table.full_row(name, summary), encoder.config
    count = sum(t.numel() for key, t in encoder.tensors.items() if key.startswith('online_params/'))
    first = encoder.tensors['online_params/encoder/initial_conv/w']
    size, colours = config['image_size'], 'RGB' if first.shape[1] == 3 else 'grey'
    return hub.card(
        f'{row["data"]}: {row["encoder"]} trained by BYOL',
        f'`{FILE}` holds the encoder of the result [{name}](.): {count / 1e6:.2f} million parameters, float32, '
        f'{path.stat().st_size / 2**20:.1f} MiB. It turns {colours} images into '
        f'{summary["embeddings"]["features"]} features; it was evaluated at {size} x {size} pixels.',
        example='import byol_func\n\n'
        f"encoder = byol_func.load_encoder('benchmarks/results/{name}/{FILE}')\n"
        "features = encoder.embed(['image.png'])  # float32 [1, D]; PIL images and tensors work too",
        accuracies={words: row[column] for column, words in _MEASURES.items() if row[column]},
        facts=_facts(row, config, summary),
        weights=path,
        closing='No label reached the encoder. It is small and was trained briefly: use it to try the tools and '
        'to compare with, not where accuracy matters.',
    )


def _facts(row: dict[str, str], config: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    data = row['data'].partition(' (')[0]
    return {
        'Data': _DATA[data],
        **({'Note': row['note']} if row['note'] else {}),
        'Recipe': hub.recipe(config, float(row['epochs'])),
        'Command': row['command'],
        'Machine': f'{row["machine"]}; {row["device"]}, {row["training"]} of training',
        'Licence of the weights': hub.LICENCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=pathlib.Path, help='the finished pre-training; without it, only the card')
    parser.add_argument('--name', required=True, help='the folder in benchmarks/results')
    arguments = parser.parse_args()
    if arguments.workdir:
        write_encoder(arguments.workdir, arguments.name)
    (results_table.RESULTS / arguments.name / CARD).write_text(card(arguments.name))


if __name__ == '__main__':
    main()

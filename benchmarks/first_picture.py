"""Draws the picture at the top of README.md: accuracy over epochs beside the map of the embeddings.

python benchmarks/first_picture.py --result=digits_cpu
"""

import argparse
import json
import pathlib
import statistics

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / 'results'
_CURVES = {
    'online_knn_top1': 'nearest neighbours',
    'online_top1': 'online classifier',
    'top1_accuracy': 'online classifier, training batch',
}
_LINES = {
    'linear_top1': ('linear, after BYOL', '-'),
    'untrained_linear_top1': 'linear, untrained encoder',
    'pixels_logistic_top1': 'logistic regression on pixels',
}


def read_curves(folder: pathlib.Path, split: str) -> dict[str, tuple[list[float], list[float]]]:
    """Returns label -> (epochs, percent) for every accuracy of the pre-training, averaged over the seeds."""
    points: dict[str, dict[float, list[float]]] = {}
    for path in folder.glob('metrics*.jsonl'):
        for record in map(json.loads, path.read_text().splitlines()):
            for name, label in _CURVES.items():
                value = record.get(f'{split}/{name}', record.get(name))
                if record['mode'] == 'pretrain' and value is not None:
                    points.setdefault(label, {}).setdefault(record['epoch'], []).append(100 * value)
    means = {
        label: {epoch: statistics.mean(at) for epoch, at in sorted(all_.items())} for label, all_ in points.items()
    }
    curves = {label: (list(mean), list(mean.values())) for label, mean in means.items() if len(mean) > 1}
    if len(curves) > 1:
        curves.pop(_CURVES['top1_accuracy'], None)
    return curves


def draw(name: str, path: pathlib.Path) -> None:
    """Draws the picture of one result."""
    folder = RESULTS / name
    summary = json.loads((folder / 'summary.json').read_text())
    split = summary['eval_split']
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.15), layout='constrained')
    for label, (epochs, values) in read_curves(folder, split).items():
        left.plot(epochs, values, marker='o' if len(epochs) < 30 else None, label=label)
    colours = iter(('black', 'tab:gray', 'tab:red'))
    for metric, label in _LINES.items():
        colour = next(colours)
        text, style = label if isinstance(label, tuple) else (label, '--')
        if (value := summary.get(f'{split}/{metric}')) is not None:
            left.axhline(
                100 * value, color=colour, linestyle=style, linewidth=1.2, label=f'{text}: {100 * value:.1f} %'
            )
    left.set(xlabel='epoch of pre-training', ylabel=f'{split} top-1 accuracy, %', ylim=(0, 101))
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc='lower right')
    right.imshow(plt.imread(folder / 'embedding_map.png'))
    right.axis('off')
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--result', default='digits_cpu', help='a folder below benchmarks/results')
    draw(parser.parse_args().result, RESULTS / 'first_picture.png')


if __name__ == '__main__':
    main()

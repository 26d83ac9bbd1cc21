"""Draws the curves of a run: `python benchmarks/plot_curves.py WORKDIR OUT.png` (needs matplotlib)."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def plot(workdir: str, out: str) -> None:
    """BYOL's loss, the online classifier's accuracy and the learning rate over epochs, side by side."""
    workdir = pathlib.Path(workdir)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record['mode'] == 'pretrain']
    summary = json.loads((workdir / 'summary.pretrain.json').read_text())
    epochs = [record['epoch'] for record in records]
    panels = (
        ('repr_loss', "BYOL's loss (0 to 8)"),
        ('top1_accuracy', 'online top-1, training batch'),
        ('learning_rate', 'learning rate'),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout='constrained')
    for axis, (name, title) in zip(axes, panels, strict=True):
        axis.plot(epochs, [record[name] for record in records])
        axis.set(title=title, xlabel='epoch')
        axis.grid(alpha=0.3)
    figure.suptitle(f'{summary["encoder"]} on {summary["dataset"]}, seed {summary["seed"]}')
    figure.savefig(out, dpi=120)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('usage: python benchmarks/plot_curves.py WORKDIR OUT.png')
    plot(*sys.argv[1:])

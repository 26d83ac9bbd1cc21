"""Measures how far float32 rounds the gradients of the official code and of this code, at the same states.

  git clone --depth 1 https://github.com/google-deepmind/deepmind-research
  pip install -r requirements-dev.txt -r requirements-official.txt
  python benchmarks/rounding.py --official=deepmind-research --steps=200 --every=10

The official code trains TinyResNet in float32 on the digits. At every tenth state, both codes compute the gradients of
that state in float32, on the same views, and this code computes them in float64, in which both agree to 1e-14 (see
`compare_official.py`). The table shows the relative error of each, the norm of its difference to float64 over the norm
of the gradients, and how the ratio of the two is spread.
"""

import pathlib
import sys

import numpy as np
import tabulate
import torch
from absl import app

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import compare_official

FLAGS = compare_official.FLAGS
compare_official.flags.DEFINE_integer('every', 10, 'Updates between the states that are looked at.')


def error(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Returns the norm of the difference over the norm of `exact`, over all tensors together."""
    difference = sum(float((gradients[name].double() - value).square().sum()) for name, value in exact.items())
    return (difference / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


def in_float64(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the views with their pixels in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in views.items()}


def main(argv: list[str]) -> None:
    """Trains the official code and prints a row for each state."""
    del argv
    import official_code
    import side_by_side as sides

    official_code.restore_old_jax()
    official_code.add_checkout(FLAGS.official)
    config = compare_official.our_config()
    data = compare_official.load_images(config)
    theirs = compare_official.official_config(data.num_classes, official_code)
    official = official_code.Official(theirs, FLAGS.image_size)
    rows = []
    for step in range(FLAGS.steps):
        same_views = sides.Ours(config, data, official.checkpoint(), FLAGS.batch_size, torch.float32)
        views = same_views.make_views(data, step, official_code, FLAGS.seed)
        if step % FLAGS.every == 0:
            # Both get the views of the official operators, so that only the gradients differ.
            given = {n: torch.from_numpy(x) for n, x in views.official.items()}
            given = {n: x.permute(0, 3, 1, 2).contiguous() if n != 'labels' else x.long() for n, x in given.items()}
            exact = sides.Ours(config, data, official.checkpoint(), FLAGS.batch_size, torch.float64)
            reference = exact.trees(in_float64(given))['gradients']
            ours = error(same_views.trees(given)['gradients'], reference)
            other = error(official.trees(views.official)['gradients'], reference)
            rows.append((step, other, ours, ours / other))
            print(f'state {step}: official {other:.2e}, ours {ours:.2e}, ratio {ours / other:.2f}', flush=True)
        official.step(step, views.official)
    columns = np.array(rows)[:, 1:]
    names = ('official', 'ours', 'ratio')
    table = [[name, *np.quantile(columns[:, i], (0.1, 0.5, 0.9))] for i, name in enumerate(names)]
    heads = [f'relative error at {len(rows)} states', '10 %', 'median', '90 %']
    print('\n' + tabulate.tabulate(table, heads, floatfmt='.2e'))
    better = int((columns[:, 2] < 1).sum())
    print(f'\nours is the smaller at {better} of {len(rows)} states; {official_code.versions()}')


if __name__ == '__main__':
    app.run(main)

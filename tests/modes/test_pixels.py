"""`config.linear_eval.compare_pixels`: the baselines on raw pixels."""

import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from byol_func.errors import UserError
from byol_func.modes import on_top, pixels
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from cli import succeed, tiny_digits
from configs import digits


def _run(**fields) -> Run:
    config = digits.get_config()
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return Run(config=config, workdir='', device=torch.device('cpu'), checkpoint=None, log_every_seconds=1.0)


@pytest.fixture(scope='module')
def sets():
    return dataset.load_train_and_test(**digits.get_config().dataset)


def test_digits_give_what_scikit_learn_gives(sets):
    found = pixels.baselines(_run().config, 'linear_eval', *sets)
    (x, y), (x_test, y_test) = ((one.images.flatten(1).numpy() / 255.0, one.labels.numpy()) for one in sets)
    nearest = KNeighborsClassifier(1, metric='cosine').fit(x, y).score(x_test, y_test)
    linear = LogisticRegression(C=1.0, max_iter=1000).fit(x, y).score(x_test, y_test)
    assert found['test/pixels_knn_top1'] == pytest.approx(nearest, abs=0.02)
    assert found['test/pixels_logistic_top1'] == pytest.approx(linear, abs=0.03)


def test_large_images_are_averaged_down():
    images = torch.arange(2 * 3 * 64 * 48).reshape(2, 3, 64, 48).remainder(256).to(torch.uint8)
    flat = pixels._flatten(images)
    assert flat.shape == (2, 3 * 32 * 32)
    wide = torch.stack([images.float()[:, :, i::2].div(255) for i in range(2)]).mean(0)  # Two rows in one.
    assert flat.unflatten(1, (3, 32, 32)).mean((2, 3)).allclose(wide.mean((2, 3)), atol=1e-3)
    small = images[..., :8, :8]
    assert pixels._flatten(small).equal(small.float().flatten(1) / 255)


def test_a_class_of_one_image_is_refused_before_the_training(sets):
    train = sets[0]
    train = train.take(torch.cat([(train.labels != 3).nonzero()[:, 0], (train.labels == 3).nonzero()[:1, 0]]))
    with pytest.raises(UserError, match="class '3' has 1 training image"):
        on_top.check_protocol(_run().config, 'linear_eval', train)
    on_top.check_protocol(_run(linear_eval__compare_pixels=False).config, 'linear_eval', train)


def test_rows_of_the_closing_table(tmp_path):
    flags = tiny_digits(
        batch_size=1024, final_linear_eval=True, linear_eval__compare_untrained=False, linear_eval__compare_pixels=True
    )
    outcome = succeed(*flags, '--workdir=run', cwd=tmp_path)
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    rows = {'raw pixels, logistic regression': 'logistic', 'raw pixels, nearest neighbours': 'knn'}
    for row, name in rows.items():
        (line,) = (line for line in outcome.stdout.splitlines() if line.startswith(row))
        assert line.split()[-1] == f'{100 * summary[f"test/pixels_{name}_top1"]:.2f}'
    # What an earlier version has left has no such field, and goes on.
    for path in (tmp_path / 'run').glob('config*.json'):
        config = json.loads(path.read_text())
        del config['linear_eval']['compare_pixels']
        path.write_text(json.dumps(config))
    succeed('--workdir=run', '--mode=linear_eval', '--config.linear_eval.compare_pixels=True', cwd=tmp_path)

"""Pictures and `report.html`: what a run leaves to look at."""

import base64
import html
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from browser import complaints, pictures, show, words
from byol_func.report import curves, page, plots
from byol_func.report.curves import Series
from byol_func.report.embeddings import choose, draw_embeddings, nearest_images
from byol_func.report.page import write_report
from cli import run_launch, succeed, tiny_digits

NAMES = {'curves', 'embedding_map', 'neighbours'}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> pathlib.Path:
    """Two seeds with pictures, in a folder whose name HTML would take for something else."""
    workdir = tmp_path_factory.mktemp('pictures') / 'a<script>"&'
    argv = tiny_digits(num_seeds=2, pictures=True, final_linear_eval=True)
    assert 'report.html' in succeed(*argv, f'--workdir={workdir}', cwd=workdir.parent).stdout
    return workdir


def _colors(path: pathlib.Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        return {color for _, color in image.convert('RGB').getcolors(1 << 24)}


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color[1:]))


def test_a_run_draws_its_pictures(workdir):
    for i in range(2):
        found = {path.stem for path in (workdir / f'seed_{i}').glob('*.png')}
        assert NAMES & found == (NAMES if i == 0 else {'curves'}) and 'curves_linear_eval' in found
    assert {path.stem for path in workdir.glob('*.png')} == {'curves', 'curves_linear_eval'}
    for path in workdir.rglob('*.png'):
        with Image.open(path) as image:
            assert min(image.size) > 250
            image.load()
        assert len(_colors(path)) > 20
    colors = _colors(workdir / 'seed_0/neighbours.png')
    assert _rgb(plots.RIGHT) in colors and _rgb(plots.WRONG) in colors


@pytest.mark.parametrize('folder', ['seed_1', '.'])
def test_the_report_is_one_file_with_everything(workdir, folder):
    page = (workdir / folder / 'report.html').read_text()
    embedded = {base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    paths = {path.name: path for path in (workdir / folder).glob('*.png')}
    if folder == '.':  # What is not drawn over all seeds is shown for the first.
        paths = {path.name: path for path in (workdir / 'seed_0').glob('*.png')} | paths
    assert len(paths) >= 3 and embedded == {path.read_bytes() for path in paths.values()}
    # Nothing from elsewhere, nothing that runs.
    assert not re.search(r'<script|<link|<iframe|url\(|@import|href=|src="(?!data:)', page)
    summary = json.loads((workdir / folder / 'summary.json').read_text())
    assert f'{100 * summary["test/linear_top1"]:.2f} %' in page
    assert 'a&lt;script&gt;' in page  # The folder's name, in the command.
    assert 'launch.py --config=' in summary['command']
    assert summary['command'] in html.unescape(re.sub('</?span>', '', page))
    assert '<h2>Health</h2>' in page if folder != '.' else '<h2>Health (first seed)</h2>' in page
    assert 'network.projector_hidden_size' in page and summary['torch_version'] in page


@pytest.mark.parametrize('folder', ['seed_0', '.'])
def test_the_report_in_a_browser(browser, workdir, folder):
    """Nothing is wrong with it for the browser, it fits a telephone, and it can be read in both colour schemes."""
    address = (workdir / folder / 'report.html').as_uri()
    for width, scheme in ((1200, 'light'), (400, 'dark')):
        show(browser, address, width, scheme)
        assert not complaints(browser)
        browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
        assert len(pictures(browser)) >= 5 and min(pictures(browser)) > 250
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width
        found = words(browser)
        assert {'h1', 'h2', 'h3', 'p', 'span', 'th', 'td', 'figcaption', 'summary'} <= {one.element for one in found}
        assert not [one for one in found if one.contrast < 4.5]
        behind = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
        assert (behind == 'rgb(255, 255, 255)') == (scheme == 'light')


def test_an_evaluation_joins_the_report(workdir, tmp_path):
    argv = tiny_digits(num_seeds=1, pictures=True)
    succeed(*argv, '--mode=eval', f'--workdir={workdir}/seed_0', cwd=tmp_path)
    page = (workdir / 'seed_0/report.html').read_text()
    assert page.index('--mode=pretrain</h3>') < page.index('--mode=eval</h3>')
    # That of the linear classifier was there before, from the end of the pre-training.
    found = {path.name for path in (workdir / 'seed_0').glob('confusion*')}
    assert found == {'confusion_matrix.linear.test.png'} and 'linear classifier, test set' in page


def test_a_picture_that_fails_does_not_cost_the_run(tmp_path):
    (tmp_path / 'run/curves.png').mkdir(parents=True)
    outcome = run_launch(*tiny_digits(batch_size=512, pictures=True), f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert 'curves.png could not be made' in outcome.stderr
    assert outcome.code == 1 and 'could not be written: curves.png (' in outcome.stderr.splitlines()[-1]
    assert (tmp_path / 'run/report.html').exists() and (tmp_path / 'run/summary.json').exists()


def test_every_protocol_shows_its_confusions_and_a_new_encoder_its_map(tmp_path):
    argv = [*tiny_digits(batch_size=512, pictures=True), f'--workdir={tmp_path}/run']
    for mode in ('pretrain', 'knn', 'logistic', 'fine_tune'):
        succeed(*argv, f'--mode={mode}', cwd=tmp_path)
    found = {path.name for path in (tmp_path / 'run').glob('*.png')}
    names = ('online', 'knn', 'logistic', 'fine_tuned')
    assert {n for n in found if n.startswith('conf')} == {f'confusion_matrix.{name}.test.png' for name in names}
    assert {'embedding_map.png', 'embedding_map_fine_tune.png', 'neighbours_fine_tune.png'} <= found
    page = (tmp_path / 'run/report.html').read_text()
    assert page.count('alt="Confusion matrix: ') == 4 and 'Embeddings of the fine-tuned encoder' in page
    chosen = json.loads((tmp_path / 'run/summary.knn.json').read_text())['chosen']
    accuracy, count = chosen['held_out_top1'], chosen['held_out_images']
    words = f'k = {chosen["k"]}, temperature {chosen["temperature"]} (top-1 {100 * accuracy:.1f} % of {count} images)'
    assert f'chosen on held-out images: {words}' in page


def test_pictures_are_a_choice(tmp_path):
    succeed(*tiny_digits(batch_size=1442), f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert not list(tmp_path.rglob('curves*')) and not (tmp_path / 'run/report.html').exists()


def test_the_map_is_the_same_every_time(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 25, 60)  # More classes than colours and names.
    embeddings = rng.normal(size=(60, 5)).astype(np.float32) + labels[:, None]
    images = rng.integers(0, 255, (60, 3, 4, 4), np.uint8)
    names = [f'$class_{i}' for i in range(25)]
    for folder in 'ab':
        (tmp_path / folder).mkdir()
        draw_embeddings(tmp_path / folder, embeddings, images, labels, names, 'title $_$')
    for name in ('embedding_map.png', 'neighbours.png'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    draw_embeddings(tmp_path, embeddings, images[:, :1], None, (), 'without labels')
    assert not {_rgb(plots.WRONG), _rgb(plots.RIGHT)} & set(_colors(tmp_path / 'neighbours.png'))


def test_the_names_of_files_stand_below_the_neighbours(tmp_path, monkeypatch):
    """The end of each name, since the beginnings are often the same; the picture stays as wide and becomes taller."""
    from matplotlib.axes import Axes

    written = []
    original = Axes.set_xlabel
    monkeypatch.setattr(
        Axes, 'set_xlabel', lambda self, text, **how: written.append(text) or original(self, text, **how)
    )
    rng = np.random.default_rng(0)
    embeddings, images = rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, 255, (20, 3, 8, 8), np.uint8)
    paths = [f'train/cat/ILSVRC2012_val_{i:08d}.$x.JPEG' for i in range(20)]
    for folder, files in (('named', paths), ('nameless', ())):
        (tmp_path / folder).mkdir()
        draw_embeddings(tmp_path / folder, embeddings, images, None, (), 'title', paths=files)
    assert len(written) == 8 * 9 and len(set(written)) > 8
    assert all(re.fullmatch(r'…12_val_|….*000000\d\d\.\\\$x', text) and len(text) <= 17 for text in written)
    sizes = [Image.open(tmp_path / folder / 'neighbours.png').size for folder in ('named', 'nameless')]
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] > sizes[1][1]


def test_nearest_images():
    angles = np.array([0.0, 50.0, 10.0, 100.0, -20.0]) * np.pi / 180
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [9], [2], [5], [3]])
    found = nearest_images(embeddings, np.array([0, 3]), 3)
    assert found.tolist() == [[0, 2, 4, 1], [3, 1, 2, 0]]


def test_choose_is_deterministic_and_bounded():
    chosen = choose(5000)
    assert len(chosen) == len(set(chosen.tolist())) == 2000 and chosen.equal(choose(5000))
    assert choose(7).tolist() == list(range(7))


def test_mean_over_seeds_at_common_steps():
    first = curves.Series([0, 9, 19], [0.1, 1.0, 2.0], [1.0, 2.0, 3.0])
    second = curves.Series([9, 19, 29], [1.0, 2.0, 3.0], [4.0, 7.0, 0.0])
    mean, spread = curves.over_seeds([first, second])
    assert mean == ([9, 19], [1.0, 2.0], [3.0, 5.0])
    assert spread == pytest.approx([2**0.5, 8**0.5])
    assert curves.over_seeds([first]) == (first, None)


def test_metrics_of_a_killed_run(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(
        '{"mode": "pretrain", "step": 0, "epoch": 0.5, "loss": 2.0, "x": null}\n{"mode": "pretr'
    )
    assert curves.read_metrics(tmp_path) == {'pretrain': {'loss': ([0], [0.5], [2.0])}}
    assert curves.read_metrics(tmp_path / 'nothing') == {}


def test_every_health_measure_has_a_panel(tmp_path):
    names = (
        'repr_loss',
        'top1_accuracy',
        'test/online_top1',
        'projection_spread',
        'health/effective_rank',
        'grad_norm/encoder/initial_conv',
        'grad_norm/projector',
        'tau',
    )
    series = {name: curves.Series([0, 1], [0.5, 1.0], [1.0, 2.0]) for name in names}
    curves.draw_curves(tmp_path / 'some.png', {'': [{'repr_loss': series['repr_loss']}]}, 'few')
    curves.draw_curves(tmp_path / 'all.png', {'': [series]}, 'all')
    sizes = [Image.open(tmp_path / name).size for name in ('some.png', 'all.png')]
    assert sizes[1][0] > 2.5 * sizes[0][0] and sizes[1][1] > 1.8 * sizes[0][1]  # Six panels.


def test_confusion_matrix(tmp_path):
    plots.confusion_matrix(tmp_path / 'small.png', np.array([[5, 0], [1, 0]]), ['cat', 'dog'], 'two')
    plots.confusion_matrix(tmp_path / 'large.png', np.eye(100), [str(i) for i in range(100)], 'hundred')
    for name in ('small', 'large'):
        assert len(_colors(tmp_path / f'{name}.png')) > 20


def test_health_is_that_of_the_last_step(tmp_path):
    rank = {'health/effective_rank': 25.584, 'health/effective_rank_limit': 32.0}
    lines = [dict(mode='pretrain', step=s, epoch=1.0, projection_spread=s / 10, **rank) for s in range(3)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'config.json').write_text('{}')
    summary = dict(mode='pretrain', dataset='d', encoder='e', seed=0, device='cpu', torch_version='2')
    collapse = dict(step=1, measure='<rank>', value=0.125, recovered_step=None)
    for name in ('summary.json', 'summary.pretrain.json'):
        (tmp_path / name).write_text(json.dumps(summary | {'collapses': [collapse]}))
    page = write_report(tmp_path).read_text()
    assert '25.584 of 32 at step 2' in page
    assert '0.200 at step 2' in page and 'Seed 0 collapsed: &lt;rank&gt; was 0.125 after step 1, and stayed so' in page


def test_what_was_measured_once_is_text(tmp_path, monkeypatch):
    """A panel of a single dot shows nothing; its number stands in a list."""
    drawn = {}
    monkeypatch.setattr(plots, 'curves', lambda path, panels, title, values: drawn.update(panels=panels, values=values))
    line, dot = Series([0, 9], [0.1, 1.0], [4.0, 2.0]), Series([9], [1.0], [0.25])
    run = {'repr_loss': line, 'health/projection_spread': dot, 'health/grad_norm/all': dot, 'health/grad_norm/x': dot}
    run |= {'health/effective_rank': dot, 'health/effective_rank_limit': Series([9], [1.0], [32.0])}
    assert curves.draw_curves(tmp_path / 'x.png', {'': [run]}, 'title')
    assert [panel.title for panel in drawn['panels']] == ['loss of the representation (BYOL: 0 to 8)']
    assert drawn['values'] == [
        'spread of projections (1: even, 0: collapsed): 0.25 (epoch 1)',
        'effective rank of embeddings (at most 32): 0.25 (epoch 1)',
        'norm of gradients: 0.25 (epoch 1)',
    ]
    monkeypatch.undo()
    assert curves.draw_curves(tmp_path / 'once.png', {'': [{'repr_loss': dot}, {'repr_loss': dot}]}, 'title')
    assert (tmp_path / 'once.png').exists()


def test_no_band_below_zero(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bands = []
    original = Axes.fill_between
    monkeypatch.setattr(
        Axes, 'fill_between', lambda self, x, low, *a, **k: bands.append(low) or original(self, x, low, *a, **k)
    )
    low = plots.Curve('', [0.0, 1.0], [1.0, 0.1], [0.5, 0.4])
    negative = plots.Curve('', [0.0, 1.0], [0.2, -0.1], [0.5, 0.4])
    panels = [plots.Panel('loss', [low]), plots.Panel('cosine', [negative]), plots.Panel('norm', [low], is_log=True)]
    plots.curves(tmp_path / 'x.png', panels, 'title')
    assert bands[0].tolist() == [0.5, 0.0] and bands[1].tolist() == pytest.approx([-0.3, -0.5])
    assert bands[2].tolist() == pytest.approx([0.5, 0.01])


@pytest.mark.parametrize('num_classes, has_top5', [(3, False), (5, False), (6, True)])
def test_top5_where_there_are_more_classes(num_classes, has_top5):
    summary = {'mode': 'knn', 'seed': 0, 'num_classes': num_classes, 'test/knn_top1': 0.5, 'test/knn_top5': 1.0}
    names = [row['name'] for row in page._result(summary)['rows']]
    assert (
        names
        == ['nearest neighbours on the BYOL encoder, top-1']
        + ['nearest neighbours on the BYOL encoder, top-5'] * has_top5
    )


def test_a_folder_bears_its_own_name():
    config = {'random_seed': 3, 'network': {'encoder_class': 'ResNet18'}}
    title = lambda **dataset: curves.title_of({**config, 'dataset': dataset}, seeds=2)
    assert title(name='folder', root='/data/my cells/') == 'my cells, ResNet18, seeds 3 to 4'
    assert title(name='cifar10', root='/data') == 'cifar10, ResNet18, seeds 3 to 4'

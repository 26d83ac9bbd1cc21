"""Lists of the images whose labels are used, as published tables of semi-supervised learning have them."""

import json
import unicodedata

import pytest
import torch

import runs
from byol_func.data import label_files
from byol_func.errors import UserError
from cli import run_launch, succeed, tiny_digits
from image_folders import flags, load, make_folder

FIELD = 'config.fine_tune.label_files'


@pytest.fixture
def root(tmp_path):
    """train/a/0.jpg to train/b/5.jpg; one more below a, with a name of its own."""
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    (root / 'train/a/more').mkdir()
    (root / 'train/a/5.jpg').rename(root / 'train/a/more/own name.jpg')
    return root


def listed(data, tmp_path, *names):
    path = tmp_path / 'list.txt'
    path.write_text(''.join(f'{name}\n' for name in names))
    return label_files.listed(data, str(path), FIELD).tolist()


def error_of(*args):
    message = runs.error_of(listed, *args)
    assert message.startswith(f"{FIELD}='{args[1]}/list.txt': ")
    return message


@pytest.mark.parametrize('max_gib', [0.0, 1.0])
def test_names_and_paths_in_the_order_of_the_data_set(root, tmp_path, max_gib):
    data = load(root, max_gib=max_gib)
    assert data.paths[5] == 'train/a/more/own name.jpg'
    names = ('b/3.jpg', '', '  own name.jpg ', 'a/0.jpg', 'b/3.jpg', 'a/more/own name.jpg')
    assert listed(data, tmp_path, *names) == [0, 5, 9]
    # Of a part of the training set, what is in it.
    part = data.take(torch.tensor([9, 1, 0]))
    assert listed(part, tmp_path, *names) == [0, 2]
    assert part.take(torch.tensor([0, 2])).paths == ('train/b/3.jpg', 'train/a/0.jpg')
    assert 'names no image of the training set' in error_of(part, tmp_path, 'own name.jpg')


def test_a_file_that_could_not_be_read_is_left_out(root, tmp_path):
    (root / 'train/a/0.jpg').write_text('no image')
    data = load(root, max_bad_fraction=0.1)
    rows = listed(data, tmp_path, 'a/0.jpg', 'a/1.jpg', 'b/3.jpg')
    assert data.take(torch.tensor(rows)).paths == ('train/a/1.jpg', 'train/b/3.jpg')


def test_names_that_are_not_those_of_one_file(root, tmp_path):
    data = load(root)
    message = error_of(data, tmp_path, 'a/0.jpg', 'c/0.jpg', 'no.jpg')
    assert f"'c/0.jpg' names no image in the train folder of '{root}'; expected one image file name" in message
    assert "'0.jpg' is the name of 2 images" in error_of(data, tmp_path, '0.jpg')
    assert "'train/a/0.jpg' names no image" in error_of(data, tmp_path, 'train/a/0.jpg')
    assert 'names no image of the training set' in error_of(data, tmp_path)
    with pytest.raises(UserError, match=f"{FIELD}='nowhere': No such file or directory; expected a text file"):
        label_files.listed(data, 'nowhere', FIELD)


def test_a_list_from_another_system(root, tmp_path):
    """macOS stores 'ö' as an o and two dots, a text editor elsewhere writes one character."""
    (root / 'train/a/0.jpg').rename(root / f'train/a/{unicodedata.normalize("NFD", "Vögel")}.jpg')
    data = load(root)
    for form in ('NFC', 'NFD'):
        assert len(listed(data, tmp_path, unicodedata.normalize(form, 'a/Vögel.jpg'), 'b/0.jpg')) == 2


def test_any_bytes_in_a_list_are_one_line_of_an_error(root, tmp_path):
    (tmp_path / 'list.txt').write_bytes(bytes(range(256)))
    with pytest.raises(UserError) as caught:
        label_files.listed(load(root), f'{tmp_path}/list.txt', FIELD)
    assert '\n' not in str(caught.value) and str(caught.value).isascii()


@pytest.mark.parametrize('max_gib', [0.0, 1.0])
def test_fine_tuning_and_linear_evaluation_on_a_list(root, tmp_path, max_gib):
    argv = [*flags(root, dataset__max_gib=max_gib, final_linear_eval=False, num_epochs=1), '--workdir=run']
    (tmp_path / 'list.txt').write_text('a/0.jpg\na/1.jpg\nown name.jpg\nb/4.jpg\nb/5.jpg\n')
    succeed(*argv, cwd=tmp_path)
    for mode in ('fine_tune', 'linear_eval'):
        outcome = succeed(
            *argv,
            f'--mode={mode}',
            f'--config.{mode}.label_files=list.txt',
            f'--config.{mode}.batch_size=5',
            cwd=tmp_path,
        )
        assert f'{mode}: 5 images, 2 classes of 2 to 3' in outcome.stderr
        summary = json.loads((tmp_path / f'run/summary.{mode}.json').read_text())
        assert summary['steps'] == summary['epochs'] and summary['batch_size'] == 5  # A step is an epoch of five.
        assert summary['labelled_images'] == 5 and 'test set, from 5 labels' in outcome.stdout
    for mode in ('knn', 'logistic'):
        labels = '--config.evaluation.label_files=list.txt'
        outcome = succeed(*argv, f'--mode={mode}', labels, '--config.dataset.val_fraction=0.5', cwd=tmp_path)
        assert f'{mode}: 5 images, 2 classes of 2 to 3' in outcome.stderr
        assert 'test set, from 5 labels' in outcome.stdout
        chosen = json.loads((tmp_path / f'run/summary.{mode}.json').read_text())['chosen']
        assert f'of {chosen["held_out_images"]} images)' in outcome.stdout and chosen['held_out_images'] < 5
        assert 'so the choice is unreliable' in outcome.stderr
        assert f'{mode}: differs from the pre-training: config.dataset.val_fraction=0.5, config.evaluation.label' in (
            outcome.stderr.replace('\n', ' ')
        )
        again = succeed(*argv, f'--mode={mode}', cwd=tmp_path)  # With all labels.
        assert f'summary.{mode}.json, a result with config.dataset.val_fraction=0.5, config.evaluation.label_files' in (
            again.stderr
        )
        refused = run_launch(*argv, f'--mode={mode}', '--config.fine_tune.label_files=list.txt', cwd=tmp_path)
        assert f'--mode={mode} does not use it; expected config.evaluation.label_files' in refused.stderr
        assert refused.code == 1
    for more, words in (
        (['--config.fine_tune.label_files=nowhere'], f"{FIELD}='nowhere': No such file"),
        (
            ['--config.fine_tune.label_files=list.txt', '--config.fine_tune.label_fraction=0.1'],
            f"{FIELD}='list.txt': expected '' beside config.fine_tune.label_fraction=0.1",
        ),
    ):
        refused = run_launch(
            *argv,
            '--mode=fine_tune',
            *more,
            '--workdir=other',
            f'--checkpoint={next((tmp_path / "run/checkpoints").glob("pretrain_*"))}',
            cwd=tmp_path,
        )
        assert refused.code == 1 and words in refused.stderr.splitlines()[-1], refused.stderr


def test_data_without_files(tmp_path):
    argv = [*tiny_digits(batch_size=512), '--workdir=run']
    succeed(*argv, cwd=tmp_path)
    (tmp_path / 'list.txt').write_text('a/0.jpg\n')
    refused = run_launch(*argv, '--mode=fine_tune', f'--{FIELD}=list.txt', cwd=tmp_path)
    assert refused.code == 1
    assert f"Error: {FIELD}='list.txt': needs a data set of files" in refused.stderr.splitlines()[-1]

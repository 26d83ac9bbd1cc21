"""Dead embeddings are found and told; healthy ones are left alone."""

import json

import optree
import pytest
import torch

from byol_func.evaluation import embedding_health
from byol_func.evaluation.embedding_health import EmbeddingHealth
from byol_func.modes import export
from byol_func.utils import checkpointing
from cli import succeed, tiny_digits


def _randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _check(embeddings, **expected):
    found = embedding_health.measure(embeddings)
    assert {name: pytest.approx(getattr(found, name)) for name in expected} == expected
    return embedding_health.warnings(found)


def test_numbers_of_made_up_embeddings():
    """Nine distinct rows among 200, 120 of them zero: what a dead encoder of eight features gave."""
    rows = torch.zeros(200, 8)
    rows[120:, :3] = torch.eye(8)[:, :3].repeat(10, 1) * torch.arange(1, 9).repeat(10)[:, None]
    said = _check(rows, images=200, features=8, zero_rows=0.85, repeated_rows=1.0, dead_features=5)
    assert '85 % of the embeddings are zero in all 8 features.' in said
    assert '100 % of the embeddings equal another one.' in said
    pair = torch.eye(20)
    pair[7] = pair[3]
    _check(pair, repeated_rows=0.1)
    assert '5 of 8 features have the same value for all images.' in said


@pytest.mark.parametrize(
    'embeddings, word',
    [
        (torch.ones(30, 16), 'one line'),
        (torch.full((30, 16), float('nan')), 'one line'),
        (_randn(1, 16).expand(30, 16) * torch.arange(1, 31)[:, None], 'one line'),
        (torch.cat([_randn(20, 16), torch.zeros(10, 16)]), 'are zero in all 16'),
        (_randn(15, 16).repeat(2, 1), 'equal another'),
        (torch.cat([_randn(30, 7), torch.full((30, 9), 0.5)], dim=1), '9 of 16 features have the same value'),
    ],
    ids=['constant', 'not_finite', 'line', 'zeros', 'pairs', 'dead_features'],
)
def test_what_is_wrong_is_said(embeddings, word):
    said = ' '.join(embedding_health.warnings(embedding_health.measure(embeddings)))
    assert word in said and 'hardly tells images apart' in said


@pytest.mark.parametrize('shape', [(200, 8), (50, 512), (5000, 64), (30, 1)])
def test_healthy_embeddings_are_left_alone(shape):
    """Rectified as those of a ResNet are, a few images twice."""
    embeddings = _randn(*shape) + 1.0 if shape[1] == 1 else _randn(*shape).relu() + 0.01
    assert not _check(embeddings, features=shape[1], zero_rows=0.0, repeated_rows=0.0, dead_features=0)


@pytest.mark.parametrize('shape', [(1, 8), (2, 8)])
def test_a_few_images_show_nothing(shape):
    assert not embedding_health.warnings(embedding_health.measure(torch.zeros(shape)))


def test_many_images_are_sampled_evenly():
    half = torch.cat([torch.zeros(50_000, 2), _randn(50_000, 2)])
    found = embedding_health.measure(half)
    assert found.images == embedding_health.MOST_IMAGES and found.zero_rows == pytest.approx(0.5, abs=0.01)


def test_words():
    found = EmbeddingHealth(200, 8, 0.0, 0.015, 3.14159, 1)
    assert embedding_health.in_words(found) == (
        '200 embeddings of 8 features: effective rank 3.1 of 8, 1 feature the same for all images, '
        '1.5 % equal to another'
    )
    assert embedding_health.in_words(EmbeddingHealth(5, 8, 0.0, 0.0, 3.14159, 0)) == (
        '5 embeddings of 8 features: effective rank 3.1 of 5, every feature varies, and no embedding is zero or equal '
        'to another'
    )


def test_every_mode_tells(tmp_path):
    """The summary, the console and the report of each; an encoder whose last layers are zero is told by all."""
    flags = [*tiny_digits(batch_size=512, pictures=True, linear_eval__cache_features=True), f'--workdir={tmp_path}/run']
    for mode in ('pretrain', 'linear_eval', 'fine_tune', 'knn', 'logistic', 'eval'):
        outcome = succeed(*flags, f'--mode={mode}', cwd=tmp_path)
        looked = json.loads((tmp_path / f'run/summary.{mode}.json').read_text())['embeddings']
        assert looked['features'] == 8 and looked['images'] > 100
        assert f'Embeddings: {looked["in_words"]}.' in outcome.stdout
        assert looked['in_words'] in (tmp_path / 'run/report.html').read_text()
    assert 'embeddings of 8 features' in succeed(*flags, '--mode=embed', cwd=tmp_path).stdout


def test_a_dead_encoder_is_told(tmp_path):
    """On the console, in the summary and in the report."""
    flags = [*tiny_digits(batch_size=512), '--workdir=run']
    succeed(*flags, cwd=tmp_path)
    directory = tmp_path / 'run/checkpoints'
    (step, path), *_ = checkpointing.list_checkpoints(directory, 'pretrain')
    checkpoint = checkpointing.load(path)
    state = export.load_state(checkpoint)
    dead = optree.tree_map(torch.zeros_like, state.online_params['encoder'])
    state = state._replace(online_params={**state.online_params, 'encoder': dead})
    checkpointing.save(directory, state, mode='pretrain', step=step + 1, config=checkpoint.config)
    outcome = succeed(*flags, '--mode=knn', '--config.pictures=True', cwd=tmp_path)
    warning = '100 % of the embeddings are zero in all 8 features.'
    assert warning in outcome.stdout and warning in outcome.stderr
    summary = json.loads((tmp_path / 'run/summary.knn.json').read_text())
    assert warning in summary['embeddings']['warnings'] and summary['embeddings']['dead_features'] == 8
    assert warning in (tmp_path / 'run/report.html').read_text()

"""The verdict of `benchmarks/compare_official.py`, on records such as it writes."""

import json
import math
import pathlib

import pytest

from benchmarks import comparison_report, verdict

RESULTS = pathlib.Path(verdict.__file__).parent / 'results' / 'compare_official'
GROUP, OTHER = 'gradients of encoder/block_group_1', 'momentum of predictor'


def records(ours, own, changed=None):
    """Returns one record per pair of differences of GROUP; OTHER always agrees."""
    return [
        {
            'differences': {GROUP: a, OTHER: 0.0},
            'own': {GROUP: b, OTHER: 0.0},
            'sign_changes': n,
            'relu_inputs': 1000,
        }
        for a, b, n in zip(ours, own, changed or [0] * len(ours), strict=True)
    ]


def test_rounding_agrees():
    found = verdict.judge(records([1e-15, 2e-14], [0.0, 1e-15]), 'float64')
    assert found.kind == 'agrees'
    assert found.sentence.endswith('to float64 rounding over 2 updates: no relative difference is above 2e-14.')


def test_rounding_may_grow_as_it_does_in_the_official_code():
    found = verdict.judge(records([1e-14, 1e-12, 3e-7], [4e-15, 4e-13, 1e-7]), 'float64')
    assert found.kind == 'agrees'
    assert '3e-07 in the gradients of encoder/block_group_1, stands beside 1e-07' in found.sentence


@pytest.mark.parametrize('precision', ['float32', 'float64'])
def test_more_than_the_official_code_to_itself_differs(precision):
    ours, own = [1e-15, 1e-15, 1e-3, 1e-2], [1e-15, 1e-15, 1e-15, 1e-2]
    found = verdict.judge(records(ours, own), precision)
    assert found.kind == 'differs'
    assert f'first at update 3 in the {GROUP}: by 1e-03, where the official code differs' in found.sentence


def test_what_the_official_code_did_earlier_excuses_a_difference_and_what_it_does_later_does_not():
    assert verdict.judge(records([0.0, 1e-3], [1e-3, 0.0]), 'float64').kind == 'agrees'
    assert verdict.judge(records([1e-3, 0.0], [0.0, 1e-3]), 'float64').kind == 'differs'


def test_a_sign_change_explains_a_jump_in_float32():
    ours, own, changed = [1e-6, 1e-2, 1.0], [1e-6, 1e-6, 0.5], [0, 3, 200]
    found = verdict.judge(records(ours, own, changed), 'float32')
    assert found.kind == 'parts'
    assert 'over 1 update and parts from it at update 2' in found.sentence
    assert '3 of 1,000 inputs of ReLUs' in found.sentence
    assert verdict.judge(records(ours, own, changed), 'float64').kind == 'differs'


@pytest.mark.parametrize(
    'ours, own',
    [
        ([1e-2, 1.0], [1e-6, 1.0]),  # No update agreed before.
        ([1e-6, 1e-2, 1.0], [1e-6, 1e-6, 1e-3]),  # The official code does not part from itself as far.
    ],
)
def test_a_sign_change_does_not_excuse_everything(ours, own):
    found = verdict.judge(records(ours, own, [1] * len(ours)), 'float32')
    assert found.kind == 'differs'
    assert '--float64' in found.sentence


def test_a_nan_differs():
    assert verdict.judge(records([0.0, math.nan], [0.0, 1.0]), 'float32').kind == 'differs'


def test_curves_are_measured_against_the_spread_over_seeds():
    official = {'official, seed 0': [4.0] * 100, 'official, seed 1': [4.2] * 100}
    near = verdict.judge_curves({'ours, seed 0': [4.1] * 100, **official}, 'loss')
    far = verdict.judge_curves({'ours, seed 0': [4.1] * 90 + [4.5] * 10, **official}, 'loss')
    assert (near.kind, far.kind) == ('agrees', 'differs')
    assert 'within the spread of the official code over 2 seeds' in near.sentence
    assert 'within 0.500 of the official curve' in far.sentence


@pytest.mark.parametrize('path', sorted(RESULTS.glob('*/numbers.json')), ids=lambda path: path.parent.name)
def test_recorded_results_have_the_verdict_that_their_numbers_give(path):
    numbers = json.loads(path.read_text())
    if not {'verdict', 'verdicts'} & numbers.keys():
        pytest.skip('recorded without a verdict')
    if 'curves' in numbers:
        found = [verdict.judge_curves(of_log, what)._asdict() for what, of_log in numbers['curves'].items()]
        assert found == numbers['verdicts']
    else:
        records = comparison_report.unpacked(numbers)
        assert verdict.judge(records, numbers['precision'])._asdict() == numbers['verdict']

"""Says in a sentence whether this code agrees with the official code, from the records of `side_by_side.py`.

The measure is the official code itself: trained again on views of which one image is moved by one unit in the last
place, it ends elsewhere, because training amplifies rounding. Ours may be `SLACK` times as far away, since it rounds
differently everywhere and not in one image. Below `FLOOR` roundings a difference counts as none.
"""

import math
from typing import Any, NamedTuple

import numpy as np

EPS = {'float32': 2.0**-23, 'float64': 2.0**-52}
SLACK, FLOOR = 10, 1000
_WINDOWS = 20  # A curve is compared by its means over this many stretches of the run.


class Verdict(NamedTuple):
    """What the comparison found.

    Attributes:
      kind: 'agrees'; 'parts' if both stay together until rounding moves the input of a ReLU across zero, and the
        official code parts from itself as far; else 'differs'.
      sentence: the finding in words.
    """

    kind: str
    sentence: str


def judge(records: list[dict[str, Any]], precision: str) -> Verdict:
    """Returns the verdict on the records of `side_by_side.compare`.

    Args:
      records: one per update, each with `differences` and `own` (group -> relative difference), `sign_changes` and
        `relu_inputs`.
      precision: 'float32' or 'float64'.
    """
    floor = FLOOR * EPS[precision]
    excess = [_excess(record, _most(records[: i + 1]), floor) for i, record in enumerate(records)]
    agrees = 'This code agrees with the official code'
    at = next((i for i, group in enumerate(excess) if group), None)
    if at is None:
        return Verdict('agrees', f'{agrees} to {precision} rounding over {_updates(records)}{_grown(records, floor)}')
    group = str(excess[at])
    record = records[at]
    finding = (
        f'at update {at + 1} in the {group}: by {record["differences"][group]:.0e}, '
        f'where the official code differs from itself by {record["own"][group]:.0e}.'
    )
    differs = f'This code differs from the official code first {finding}'
    changed = record['sign_changes']
    if not changed or precision == 'float64':
        return Verdict('differs', f'{differs} That is more than rounding.')
    kink = (
        f'At this update rounding puts {changed:,} of {record["relu_inputs"]:,} inputs of ReLUs on the other side of '
        'zero, where the gradient jumps.'
    )
    if at == 0 or excess[-1]:
        return Verdict('differs', f'{differs} {kink} Whether that is all, --float64 tells: it has no such jumps.')
    return Verdict(
        'parts',
        f'{agrees} to {precision} rounding over {_updates(records[:at])} and parts from it {finding} {kink} After '
        f'{_updates(records)} the official code is as far from itself (within a factor of {SLACK}). '
        'With --float64 there are no such jumps.',
    )


def _updates(records: list[dict[str, Any]]) -> str:
    return f'{len(records)} update{"s" * (len(records) > 1)}'


def _most(records: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the largest difference of the official code to itself so far, for each group."""
    return {group: max(record['own'][group] for record in records) for group in records[0]['own']}


def _excess(record: dict[str, Any], own: dict[str, float], floor: float) -> str | None:
    """Returns the group that is furthest beyond its limit, or None if none is; a NaN is beyond any limit."""
    beyond = {
        group: math.inf if math.isnan(value) else value / max(floor, SLACK * own[group])
        for group, value in record['differences'].items()
    }
    group = max(beyond, key=lambda name: beyond[name])
    return group if beyond[group] > 1 else None


def _grown(records: list[dict[str, Any]], floor: float) -> str:
    """Returns the largest difference in words."""
    value, i, group = max((v, i, group) for i, r in enumerate(records) for group, v in r['differences'].items())
    if value <= floor:
        return f': no relative difference is above {value:.0e}.'
    itself = f'{records[i]["own"][group]:.0e} of the official code to itself'
    return f'. The largest difference, {value:.0e} in the {group}, stands beside {itself}.'


def judge_curves(curves: dict[str, list[float]], what: str) -> Verdict:
    """Returns the verdict on curves of one log over the same steps.

    The distance of two curves is the largest difference between their means over stretches of the run. Ours should
    be as near to the official curve of its seed as official curves of different seeds are to each other.

    Args:
      curves: 'ours, seed S' and several 'official, seed S'.
      what: the log, in words.
    """
    (own,) = [name for name in curves if name.startswith('ours')]
    means = {name: _means(values) for name, values in curves.items()}
    distance = lambda a, b: float(np.abs(means[a] - means[b]).max())
    officials = [name for name in curves if name != own]
    ours = distance(own, own.replace('ours', 'official'))
    spread = max(distance(a, b) for a in officials for b in officials)
    is_within = ours <= spread
    return Verdict(
        'agrees' if is_within else 'differs',
        f'The {what} of this code is {"within" if is_within else "beyond"} the spread of the official code over '
        f'{len(officials)} seeds: over {len(curves[own])} updates it is within {ours:.3f} of the official curve of the '
        f'same seed, and official curves are up to {spread:.3f} apart (means of {len(means[own])} stretches).',
    )


def _means(values: list[float]) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(np.array(values), min(_WINDOWS, len(values)))])

"""Finds the tar shards that `config.dataset.root` names, and the split of each."""

import os
import re
from collections.abc import Sequence, Set

from byol_func.data import tar_index
from byol_func.data.arrays import root_error
from byol_func.data.listing import TEST, TRAIN, VAL
from byol_func.data.walking import is_hidden, listed

LAYOUT = (
    'expected a folder of *.tar files, a text file that lists them, or a pattern such as '
    'DIR/{train-{000000..000146},val-{000000..000006}}.tar'
)
_SPLITS = {'train': TRAIN, 'test': TEST, 'val': VAL}
_MOST = 1_000_000  # A pattern that stands for more names is a mistake.


def find(root: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the folder that holds all shards, and the sorted paths of the shards of each split.

    A shard belongs to the split that its name or a folder above it (below the returned folder) names: train, test or
    val, as a word of its own, such as in 'imagenet-train-000000.tar' or 'val/000.tar'. If no shard has such a name, all
    are for training.

    Args:
      root: the field of the config: a folder, the path of a list, or a pattern.

    Raises:
      UserError: there is no such place, a shard is missing, compressed or named twice, or the splits are unclear.
    """
    try:
        paths = _paths(root)
    except OSError as error:
        raise root_error(root, f'cannot read {error.filename!r} ({error.strerror}); {LAYOUT}') from error
    except UnicodeDecodeError as error:
        raise root_error(root, f'it is no text file; {LAYOUT}') from error
    compressed = [path for path in paths if path.endswith(tar_index.COMPRESSED)]
    if compressed:
        raise root_error(root, f'{compressed[0]!r} is compressed; {tar_index.WHY_PLAIN}')
    if not paths:
        raise root_error(root, f'it holds no *.tar; {LAYOUT}')
    twice = next((a for a, b in zip(paths, paths[1:], strict=False) if a == b), None)
    if twice:
        raise root_error(root, f'{twice!r} is named twice; expected every shard once')
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise root_error(root, f'no shard {missing[0]!r} ({len(missing)} of {len(paths)} are missing); {LAYOUT}')
    base = root if os.path.isdir(root) else _folder_above({os.path.dirname(path) for path in paths})
    base = os.path.join(base, '') if base else ''
    return base, _by_split(root, base, paths)


def skipped(paths: Sequence[str]) -> list[str]:
    """Returns the names that are missing where the names of shards are counted, from 0 or 1 to the last one."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for path in paths:
        if match := re.fullmatch(r'(.*?)(\d+)(\D*)', path, re.DOTALL):
            series.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    skipped = []
    for (before, after), numbers in series.items():
        first, width = min(numbers), min(map(len, numbers.values()))
        gaps = [i for i in range(min(first, 1), max(numbers)) if i not in numbers]
        if len(numbers) > 1 and len(gaps) < len(numbers):  # Other numbers, such as years, do not count shards.
            skipped += [f'{before}{i:0{width}}{after}' for i in gaps]
    return skipped


def _folder_above(folders: Set[str]) -> str:
    """Returns the innermost folder above these ones; '' for the current one."""
    try:
        return '' if '' in folders else os.path.commonpath(folders)
    except ValueError:  # Absolute and relative paths, or two drives.
        return ''


def _by_split(root: str, base: str, paths: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_split_of(path.removeprefix(base)), []).append(path)
    if set(found) == {''}:
        return {'train': found['']}
    if '' in found:
        raise root_error(
            root,
            f'{listed(found[""])} name no split, but others do, such as {next(iter(_named(found)))!r}; expected train, '
            'test or val in the names of all shards, or of none',
        )
    if 'train' not in found:
        raise root_error(root, f'no shard of a training set, only such as {next(iter(_named(found)))!r}; {LAYOUT}')
    return found


def _named(found: dict[str, list[str]]) -> list[str]:
    return [path for split, paths in found.items() if split for path in paths]


def _split_of(path: str) -> str:
    """Returns the split that a path names in its last part or, if that names none, above it; '' if none does."""
    for part in reversed(path.split(os.sep)):
        words = set(re.split('[^a-z]+', part.lower()))
        named = [split for split, names in _SPLITS.items() if words & {*names}]
        if len(named) == 1:
            return named[0]
    return ''


def _paths(root: str) -> list[str]:
    """Returns the sorted paths of all files that the root names, be they tar files or not."""
    if os.path.isdir(root):
        found = []
        for parent, folders, names in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not is_hidden(name)]
            wanted = [name for name in names if name.endswith(('.tar', *tar_index.COMPRESSED)) and not is_hidden(name)]
            found += [os.path.join(parent, name) for name in wanted]
        return sorted(found)
    if '{' in root or root.endswith(('.tar', *tar_index.COMPRESSED)):
        return sorted(map(os.path.normpath, expand(root, root)))
    with open(root, encoding='utf-8-sig') as file:
        lines = [line.strip() for line in file]
    patterns = [line for line in lines if line and not line.startswith('#')]
    beside = os.path.dirname(os.path.abspath(root))
    paths = [path for line in patterns for path in expand(os.path.expanduser(line), root)]
    return sorted(os.path.normpath(os.path.join(beside, path)) for path in paths)


def expand(pattern: str, root: str) -> list[str]:
    """Returns the names that braces stand for: '{000..002}' for three numbers, '{a,b}' for two texts, also nested.

    Args:
      pattern: a path with any number of braces.
      root: the field of the config, for error messages.

    Raises:
      UserError: a brace is not closed, holds neither a range nor a list, or stands for too many names.
    """
    match = re.search(r'[{}]', pattern)
    if not match:
        return [pattern]
    before, inside, after = _split_at_brace(pattern, match.start(), root)
    texts = _alternatives(inside)
    if len(texts) == 1:
        numbers = re.fullmatch(r'(\d+)\.\.(\d+)', inside)
        if not numbers or int(numbers[1]) > int(numbers[2]):
            raise root_error(root, f'{{{inside}}} is no range of numbers, such as {{000000..000146}}, and no list')
        first, last = int(numbers[1]), int(numbers[2])
        if last - first >= _MOST:
            raise root_error(root, f'{{{inside}}} stands for {last - first + 1} shards; expected at most {_MOST}')
        width = len(numbers[1]) if len(numbers[1]) == len(numbers[2]) else 0
        texts = [f'{number:0{width}}' for number in range(first, last + 1)]
    rest = expand(after, root)
    if len(texts) * len(rest) > _MOST:
        raise root_error(root, f'it stands for more than {_MOST} shards')
    return [f'{before}{one}{end}' for text in texts for one in expand(text, root) for end in rest]


def _split_at_brace(pattern: str, start: int, root: str) -> tuple[str, str, str]:
    """Returns what is before, inside and after the brace at `start`."""
    depth = 0
    for i in range(start, len(pattern)):
        depth += {'{': 1, '}': -1}.get(pattern[i], 0)
        if depth <= 0:
            break
    if depth != 0:
        raise root_error(root, f'the braces of {pattern!r} do not match; {LAYOUT}')
    return pattern[:start], pattern[start + 1 : i], pattern[i + 1 :]


def _alternatives(inside: str) -> list[str]:
    """Splits at the commas that are in no inner braces."""
    depth, texts = 0, ['']
    for character in inside:
        depth += {'{': 1, '}': -1}.get(character, 0)
        if character == ',' and not depth:
            texts.append('')
        else:
            texts[-1] += character
    return texts

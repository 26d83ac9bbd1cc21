"""The examples of README, CONTRIBUTING and docs run, with small settings; what cannot run here says why."""

import importlib
import pathlib
import re

import numpy as np
import pytest
from absl.flags import FLAGS
from PIL import Image

import cli
from configs import byol
from markdown import PAGES, ROOT, blocks, commands

# What a run is given before the flags of the page, which count where both set a field, ...
SMALL = {name: value for name, value in cli.TINY_RUN.items() if name not in ('num_epochs', 'pictures')}
SMALL['batch_size'] = 512
SMALL_FOLDER = dict(SMALL, batch_size=8, image_size=16, dataset__source_size=16, linear_eval__batch_size=8)
# ... and after them.
SHORT = dict(num_epochs=1, num_seeds=1, linear_eval__num_epochs=1, fine_tune__num_epochs=1, pictures=False)


def flags(fields) -> list[str]:
    return [f'--config.{name.replace("__", ".")}={value}' for name, value in fields.items()]


def images_in(folder: pathlib.Path) -> None:
    """Twenty-four images of two classes for training and eight for testing."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        for shade, name in ((64, 'dark'), (192, 'light')):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 60, shade + 60, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{i}.png')


@pytest.fixture
def sandbox(tmp_path) -> pathlib.Path:
    """A folder in which the commands of a page find what the repository has, and images in DIR."""
    for name in ('benchmarks', 'byol_func', 'configs', 'launch.py', 'requirements.txt', 'requirements-dev.txt'):
        (tmp_path / name).symlink_to(ROOT / name)
    images_in(tmp_path / 'DIR')
    return tmp_path


def with_small_settings(words: list[str]) -> list[str]:
    """The flags of a command; a run with --config is made small, one of a workdir is small already."""
    if not any(word.startswith('--config=') for word in words):
        return words
    on_files = ('--config=configs/folder.py', '--config=configs/shards.py')
    small = SMALL_FOLDER if any(word.startswith(on_files) for word in words) else SMALL
    first = next(i for i, word in enumerate(words) if word.startswith('--config='))
    return [*words[: first + 1], *flags(small), *words[first + 1 :], *flags(SHORT)]


def fill_step(word: str, sandbox: pathlib.Path) -> str:
    """A word in which STEP is the step of the newest checkpoint."""
    if 'STEP' not in word:
        return word
    name, path = word.split('=')
    return f'{name}={max(sandbox.glob(path.replace("STEP", "*"))).relative_to(sandbox)}'


def run_command(words: list[str], sandbox: pathlib.Path) -> None:
    """Runs one command of a page.

    Raises:
      AssertionError: it fails, or is of a kind that this test does not know.
    """
    if words[:2] == ['pip', 'install']:  # Installed already, or nothing would run here; the files must be there.
        named = [after for before, after in zip(words, words[1:], strict=False) if before == '-r']
        assert named and all((ROOT / file).exists() for file in named), words
        return
    words = [fill_step(word, sandbox) for word in words]
    if words[:2] == ['python', 'launch.py']:
        outcome = cli.run_launch(*with_small_settings(words[2:]), cwd=sandbox)
    elif words[0] == 'byol-func':  # What the wheel holds is the subject of tests/contracts/test_installed.py.
        argv = ['byol-func', *with_small_settings(words[1:])]
        outcome = cli.run_code(
            f'import sys; sys.argv = {argv}; from byol_func.program import command; command()', cwd=sandbox
        )
    elif words[:2] == ['python', '-m']:
        outcome = cli.run_module(*words[2:], cwd=sandbox)
    else:
        raise AssertionError(f'{" ".join(words)}: not a command that runs here; mark it "not run", with the reason')
    assert outcome.code == 0, f'{" ".join(words)}\n{outcome.stderr}'


def run_block(block, sandbox: pathlib.Path) -> None:
    if block.language == 'shell':
        for words in commands(block.code):
            run_command(words, sandbox)
    elif block.language == 'python':
        outcome = cli.run_code(block.code, cwd=sandbox)
        assert outcome.code == 0, f'{block.code}\n{outcome.stderr}'
    else:
        assert block.language in ('', 'yaml'), f'a block in {block.language!r}: expected shell, python or none'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_examples_run(page, sandbox):
    for block in blocks(page.read_text()):
        if not block.reason:
            run_block(block, sandbox)


def test_a_broken_example_is_found(sandbox):
    for page in (
        '```shell\npython launch.py --config=configs/digits.py --config.no_such_field=1\n```\n',
        '```shell\nmake install\n```\n',
        '```shell\npip install -r no-such-file.txt\n```\n',
        '```python\nimport byol_func.no_such_module\n```\n',
    ):
        (block,) = blocks(page)
        with pytest.raises(AssertionError):
            run_block(block, sandbox)
    (block,) = blocks('<!-- not run: it needs a GPU -->\n```shell\nmake\n```\n')
    assert block.reason == 'it needs a GPU'


# The commands of launch.py on pages and in docstrings of configs, those that are not run too.
COMMANDS = [
    words
    for page in PAGES
    for block in blocks(page.read_text())
    if block.language == 'shell'
    for words in commands(block.code)
    if 'launch.py' in words
]
for path in sorted((ROOT / 'configs').glob('**/*.py')):
    lines = re.findall(r'python launch\.py (?:[^\n]+\\\n)*[^\n]+', path.read_text())
    words_of_lines = (re.sub(r'\\\n', ' ', line).split() for line in lines)
    COMMANDS += [[word.rstrip(',.') for word in words if word.startswith('--')] for words in words_of_lines]


def config_of(words: list[str]):
    """The config that a command names, or the official one."""
    argument = next(
        (w.removeprefix('--config=') for w in words if w.startswith('--config=configs/')), 'configs/byol.py'
    )
    path, _, preset = argument.partition(':')
    module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
    if module.__name__ == 'configs.saved':  # Its argument is a file of a workdir.
        return byol.get_config()
    return module.get_config(*([preset] if preset else []))


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_named_configs_flags_and_fields_exist(words):
    import launch  # noqa: F401 (it defines the flags)

    config = config_of(words)
    for name in (word.split('=')[0] for word in words if word.startswith('--')):
        if name.startswith('--config.'):
            node = config
            for part in name.removeprefix('--config.').split('.'):
                assert part in node, name
                node = node[part]
        elif 'torchrun' not in words:
            assert name[2:] in FLAGS, name

"""Writes the table of all results to benchmarks/results/README.md, and a part of it to README.md.

    python benchmarks/results_table.py
    python benchmarks/results_table.py --add=runs/digits --name=digits_cpu --log=digits.log

Every number is read from a `summary*.json` below benchmarks/results; none is typed by hand. The second command
first copies a finished run there: config, summaries, metrics, pictures and the captured output, with the paths
of this machine replaced. README.md marks the rows that it shows with `<!-- results: digits_cpu, ... -->`, and
the run whose closing table it quotes with `<!-- printed: digits_cpu -->`.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
_MARKED = re.compile(r'(<!-- results: ([\w, ]+) -->\n\n).*?\n?(<!-- end of results -->)', re.DOTALL)
_PRINTED = re.compile(r'(<!-- printed: (\w+) -->\n\n).*?\n?(<!-- end of output -->)', re.DOTALL)
_PICTURES = ('curves*.png', 'embedding_map*.png', 'neighbours*.png', 'confusion_matrix*.png')

# Column -> the metrics it can show, in order of preference.
_ACCURACIES = {
    'pixels, logistic': ('pixels_logistic_top1',),
    'pixels, k-NN': ('pixels_knn_top1',),
    'untrained': ('untrained_linear_top1',),
    'linear': ('linear_top1',),
    'k-NN': ('knn_top1', 'online_knn_top1'),
}
_ABOVE = """# Results

Written by `python benchmarks/results_table.py` from the `summary.json` of each run; no figure is typed by hand.

Accuracies are top-1 in percent on the test set, mean ± standard deviation where there are several seeds.
*Untrained* and *linear* are linear classifiers on the frozen encoder before and after BYOL. *Pixels* are the same
protocols without an encoder. *k-NN* is `--mode=knn` where it was run, otherwise the vote of 20 neighbours that is
taken while training. *Training* is the time of the pre-training steps, compilation included, summed over the seeds.
"""


def read_results() -> dict[str, dict[str, Any]]:
    """Returns folder name -> summary for every pre-training, with the metrics of the other modes merged in."""
    results = {}
    for directory in sorted({path.parent for path in RESULTS.rglob('summary*.json')}):
        summaries = [json.loads(path.read_text()) for path in sorted(directory.glob('summary*.json'))]
        merged: dict[str, Any] = {}
        # The pre-training is merged last, so its fields describe the run; the other modes only add metrics.
        for summary in sorted(summaries, key=lambda one: one.get('mode') == 'pretrain'):
            over_seeds = merged.get('over_seeds', {}) | summary.get('over_seeds', {})
            merged |= summary | {'over_seeds': over_seeds}
        if 'pretrain' in (summary.get('mode') for summary in summaries):
            results[directory.relative_to(RESULTS).as_posix()] = merged
    return results


def accuracy(summary: dict[str, Any], metrics: Iterable[str]) -> str:
    """Returns the first of the given metrics that a summary has, in percent; '' if it has none."""
    for metric in metrics:
        name = f'{summary["eval_split"]}/{metric}'
        spread = summary['over_seeds'].get(name)
        if spread and len(spread['values']) > 1:
            return f'{100 * spread["mean"]:.1f} ± {100 * spread["std"]:.1f}'
        if name in summary:
            return f'{100 * summary[name]:.1f}'
    return ''


def training_time(summary: dict[str, Any]) -> str:
    """Returns the training time in seconds, minutes or hours.

    The time of a resumed run is computed from its rate, since only the last part of the run was timed.
    """
    seconds = summary['seconds']
    if summary.get('batch_size') and summary.get('images_per_second'):
        images = summary['steps'] * summary['batch_size'] * len(_seeds(summary))
        seconds = max(seconds, images / summary['images_per_second'])
    if seconds < 120:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'


def _seeds(summary: dict[str, Any]) -> list[int]:
    return summary['seed'] if isinstance(summary['seed'], list) else [summary['seed']]


def _machine(summary: dict[str, Any]) -> str:
    environment = summary.get('environment', {})
    machine = environment.get('GPU', environment.get('CPU', ''))
    versions = f'torch {environment.get("torch", summary["torch_version"].split("+")[0])}'
    return ', '.join(part for part in (machine, versions) if part)


def _about(name: str) -> dict[str, str]:
    """Returns facts that no summary contains: `data`, the name of a data set that was read as a folder, and `note`."""
    path = RESULTS / name / 'about.json'
    return json.loads(path.read_text()) if path.exists() else {}


def full_row(name: str, summary: dict[str, Any]) -> dict[str, str]:
    """Returns a row of the table of all results."""
    accuracies = {column: accuracy(summary, metrics) for column, metrics in _ACCURACIES.items()}
    return {
        'result': f'[{name}]({name})',
        'data': _about(name).get('data', summary['dataset']),
        'encoder': summary['encoder'],
        'epochs': f'{round(summary["epochs"], 1):g}',
        'seeds': str(len(_seeds(summary))),
        'device': summary['device'],
        'training': training_time(summary),
        **accuracies,
        'log': f'[log]({name}/log.txt)' if (RESULTS / name / 'log.txt').exists() else '',
        'machine': _machine(summary),
        'command': f'`{summary["command"]}`' if summary.get('command') else '',
        'note': _about(name).get('note', ''),
    }


def short_row(name: str, summary: dict[str, Any]) -> dict[str, str]:
    """Returns a row of the table in README.md."""
    full = full_row(name, summary)
    columns = ('data', 'epochs', 'seeds', 'device', 'training', *_ACCURACIES)
    return {column: full[column] for column in columns} | {'log': f'[log](benchmarks/results/{name}/log.txt)'}


def _table(rows: list[dict[str, str]]) -> str:
    kept = {column for column in rows[0] if any(row[column] for row in rows)}
    columns = [column for column in rows[0] if column in kept]
    lines = [columns, ['---'] * len(columns), *([row[column] for column in columns] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def results_page() -> str:
    """Returns the text of benchmarks/results/README.md."""
    results = read_results()
    others = sorted({path.relative_to(RESULTS).parts[0] for path in RESULTS.rglob('*') if path.is_file()})
    others = [name for name in others if (RESULTS / name).is_dir() and name not in results]
    lines = [f'- [{name}]({name}){": " + note if (note := _about(name).get("note")) else ""}' for name in others]
    rows = [full_row(name, summary) for name, summary in results.items()]
    return '\n'.join((_ABOVE, _table(rows), '', '## Other measurements', '', *lines, ''))


def fill_readme(text: str) -> str:
    """Returns README.md with its result rows and its closing table updated."""
    results = read_results()

    def fill(match: re.Match) -> str:
        names = [name.strip() for name in match[2].split(',')]
        return match[1] + _table([short_row(name, results[name]) for name in names]) + '\n\n' + match[3]

    return _PRINTED.sub(
        lambda match: f'{match[1]}```\n{closing_table(match[2])}\n```\n\n{match[3]}', _MARKED.sub(fill, text)
    )


def closing_table(name: str) -> str:
    """Returns the table at the end of a result's log."""
    blocks = (RESULTS / name / 'log.txt').read_text().split('\n\n')
    return next(block.strip('\n') for block in reversed(blocks) if 'top-1 %' in block)


def add(workdir: pathlib.Path, name: str, log: pathlib.Path | None, data: str, note: str) -> None:
    """Copies the published files of a finished run to the results, without the paths of this machine."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    root = json.loads((workdir / 'config.json').read_text())['dataset']['root']
    replacements = {os.path.abspath(workdir): f'runs/{name}', os.fspath(workdir): f'runs/{name}'}
    if root and os.path.isabs(root):
        replacements[root] = 'DIR'
    texts = {path.name: path for pattern in ('config*.json', 'summary*.json') for path in workdir.glob(pattern)}
    for path in workdir.glob('**/metrics.jsonl'):
        texts['_'.join(('metrics', *path.relative_to(workdir).parts[:-1])) + '.jsonl'] = path
    for name in ('config', 'summary'):  # The plain name always belongs to the pre-training.
        if path := texts.pop(f'{name}.pretrain.json', None):
            texts[f'{name}.json'] = path
    if log:
        texts['log.txt'] = log
    for file, path in texts.items():
        text = path.read_text()
        for found, replacement in replacements.items():
            text = text.replace(found, replacement)
        text = re.sub(r'/[\w./-]+/bin/python[\d.]*', 'python', text)
        (target / file).write_text(text)
    for pattern in _PICTURES:  # Pictures of a single seed are taken from the first seed.
        for path in sorted(workdir.glob(pattern)) or sorted(workdir.glob(f'seed_0/{pattern}')):
            shutil.copy(path, target)
    about = {key: text for key, text in (('data', data), ('note', note)) if text}
    if about:
        (target / 'about.json').write_text(json.dumps(about, indent=2) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--add', type=pathlib.Path, metavar='WORKDIR', help='a finished run to copy first')
    parser.add_argument('--name', help='the folder in benchmarks/results to copy it to')
    parser.add_argument('--log', type=pathlib.Path, help='the captured output of the run')
    parser.add_argument('--data', default='', help='the data set, if config.dataset.name is folder')
    parser.add_argument('--note', default='', help='a one-line note on the numbers')
    arguments = parser.parse_args()
    if arguments.add:
        if not arguments.name:
            parser.error('--add needs --name')
        add(arguments.add, arguments.name, arguments.log, arguments.data, arguments.note)
    (RESULTS / 'README.md').write_text(results_page())
    readme = ROOT / 'README.md'
    readme.write_text(fill_readme(readme.read_text()))


if __name__ == '__main__':
    main()

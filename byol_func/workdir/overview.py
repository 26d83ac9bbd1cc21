"""Lists configs and runs: the commands `byol-func configs` and `byol-func runs`."""

import ast
import importlib
import os
import pathlib
import socket

from byol_func.workdir import files


def configs(folder: pathlib.Path) -> str:
    """Lists the name, the docstring's first line and the presets of every config in a folder, and of its variants."""
    lines = {}
    for path in [*sorted(folder.glob('*.py')), *sorted(folder.glob('variants/*.py'))]:
        tree = ast.parse(path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if 'get_config' in functions and path.name != 'saved.py':  # It reads the config of a run.
            name = path.relative_to(folder).with_suffix('').as_posix()
            lines[name] = (ast.get_docstring(tree) or '').split('\n')[0]
            if 'PRESETS' in {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}:
                lines[name] += f' Presets: {", ".join(importlib.import_module(f"configs.{name}").PRESETS)}.'
    width = max(map(len, lines), default=0)
    return '\n'.join(f'{name:<{width}}  {line}' for name, line in lines.items())


def runs(folder: pathlib.Path) -> str:
    """Returns a table of the workdirs in a folder, or of a workdir: config, status, epoch and best accuracy."""
    found = [path for path in (folder / 'config.json', *folder.glob('*/config.json')) if path.exists()]
    found.sort(key=lambda path: path.stat().st_mtime)
    rows = [_row(path.parent) for path in found if 'dataset' in files.read_json(path)]  # Others have a config.json too.
    if not rows:
        return f'{folder}: no runs'
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return '\n'.join(
        '  '.join(f'{cell:<{width}}' for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows
    )


def _row(workdir: pathlib.Path) -> tuple[str, str, str, str]:
    config = files.read_json(workdir / 'config.json')
    summary = files.read_json(workdir / 'summary.json')
    accuracies = {k: v for k, v in summary.items() if k.endswith('top1') and '/' in k and isinstance(v, float)}
    accuracies = {k: v for k, v in accuracies.items() if not k.startswith('train/') and 'pixels' not in k}
    best = max(accuracies, key=accuracies.__getitem__, default=None)
    if summary:
        status = f'{summary.get("mode")} finished'
    elif _is_used(workdir):
        status = 'running'
    else:
        status = 'stopped'
    metrics = [path for path in (workdir / 'metrics.jsonl', *workdir.glob('seed_*/metrics.jsonl')) if path.exists()]
    epochs = [record['epoch'] for path in metrics for record in files.read_records(path) if 'epoch' in record]
    dataset = config.get('dataset', {}).get('name', '?')
    what = f'{dataset}, {config.get("network", {}).get("encoder_class", "?")}'
    epoch = f', epoch {max(epochs):.1f}' if epochs else ''
    return str(workdir), what, status + epoch, f'{best} {100 * accuracies[best]:.2f} %' if best else ''


def _is_used(workdir: pathlib.Path) -> bool:
    """Returns whether the process named by `lock.locked` exists, or is on another host, which cannot be asked.

    A killed run leaves its name behind. The lock itself is not tried, lest a run that starts just then be refused.
    """
    owner = files.read_json(workdir / '.lock.owner')
    if owner.get('host') != socket.gethostname():
        return bool(owner)
    try:
        os.kill(owner['process'], 0)
    except PermissionError:  # It is somebody else's.
        return True
    except (OSError, KeyError, TypeError):
        return False
    return True

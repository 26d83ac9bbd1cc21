"""The notebooks run from the first cell to the last, with small settings."""

import nbformat
import pytest
from nbclient import NotebookClient
from test_examples import SHORT, SMALL_FOLDER, images_in

import cli
from markdown import ROOT

NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    for name in ('byol_func', 'configs', 'launch.py'):
        (tmp_path / name).symlink_to(ROOT / name)
    images_in(tmp_path / 'DIR')
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells), 'clear the outputs before you commit'
    for cell in notebook.cells:
        if 'parameters' in cell.metadata.get('tags', ()):
            fields = {name.replace('__', '.'): value for name, value in {**SMALL_FOLDER, **SHORT}.items()}
            cell.source += f'\nsettings = {fields!r}'
    NotebookClient(notebook, timeout=cli.LIMIT, resources={'metadata': {'path': str(tmp_path)}}).execute()

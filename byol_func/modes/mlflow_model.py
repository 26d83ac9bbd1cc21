"""`--mode=export --format=mlflow`: the encoder as a model that mlflow loads, serves, tracks and registers."""

import contextlib
import importlib.metadata
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from byol_func import bridge
from byol_func.errors import UserError, redact
from byol_func.tracking import client as tracking_client
from byol_func.tracking.finder import Finder
from byol_func.workdir.run import Run

_CODE = pathlib.Path(bridge.__file__).parent / 'served_encoder.py'
_NAME = 'encoder'  # Of the graph within the model, and of the model within mlflow.


class Target(NamedTuple):
    """Where mlflow keeps the model: a client of its server, and there the run of the pre-training."""

    client: Any
    run: Any
    place: str


def check() -> None:
    """Checks that mlflow is installed.

    Raises:
      UserError: it is not.
    """
    tracking_client.import_mlflow('--format=mlflow')


def find_target(run: Run) -> Target:
    """Returns the run that the model belongs to: that of --mlflow_run_id, or that of the pre-training.

    Raises:
      UserError: there is none, or the server does not answer.
    """
    assert run.tracking is not None
    place = redact(run.tracking.uri)
    client = tracking_client.make_client(run.tracking.uri)
    with _errors_of(f'--mlflow_tracking_uri={place}'):
        found = Finder(run, 'export', client, None).find_parent()
    if found is None:
        raise UserError(
            f'--mlflow_tracking_uri={place}: this pre-training was not tracked there; give --mlflow_run_id of the run '
            'that the encoder belongs to, or leave the flag out'
        )
    return Target(client, found, place)


def write(folder: pathlib.Path, graph: torch.export.ExportedProgram, inputs: Mapping[str, Any], features: int) -> None:
    """Writes the folder of a model: the graph, code that mlflow runs, the signature and the requirements.

    Args:
      folder: a folder that does not exist yet.
      graph: the encoder, from float32 images `[B, C, H, W]` in 0..1 to embeddings `[B, D]`.
      inputs: what the model tells about its images, in plain values; `largest_size` is None if it takes any size.
      features: the number of features, D.

    Raises:
      OSError: the folder cannot be written.
    """
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    side = inputs['largest_size'] or -1  # -1: any.
    tensor = lambda *shape: Schema([TensorSpec(np.dtype('float32'), shape)])
    signature = ModelSignature(tensor(-1, inputs['channels'], side, side), tensor(-1, features))
    versions = {name: importlib.metadata.version(name).split('+')[0] for name in ('mlflow', 'numpy', 'torch')}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as scratch:
        unfinished, file = os.path.join(scratch, folder.name), os.path.join(scratch, f'{_NAME}.pt2')
        torch.export.save(graph, file)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*An input example was not provided')  # It would hold a whole image.
            mlflow.pyfunc.save_model(
                unfinished,
                python_model=str(_CODE),
                artifacts={_NAME: file},
                signature=signature,
                pip_requirements=[f'{name}=={version}' for name, version in versions.items()],
                metadata={'input': dict(inputs)},
            )
        model = Model.load(unfinished)
        own = model.flavors['python_function']  # It also says where both files came from on this machine.
        own['model_code_path'] = _CODE.name
        own['artifacts'][_NAME]['uri'] = own['artifacts'][_NAME]['path']
        model.save(os.path.join(unfinished, 'MLmodel'))
        os.rename(unfinished, folder)


def log(folder: pathlib.Path, target: Target, step: int, register: str | None) -> str:
    """Uploads the folder of a model to its run, registers it by the name `register`, and says under which addresses.

    Args:
      folder: what `write` wrote.
      target: the run.
      step: the index of the last update of the encoder.
      register: the name of a registered model, of which this becomes the newest version; None: it is not registered.

    Raises:
      UserError: the server does not answer or refuses it.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client, run_id = target.client, target.run.info.run_id
    with _errors_of(f'--mlflow_tracking_uri={target.place}', f'; {folder} is complete'):
        model = client.create_logged_model(target.run.info.experiment_id, name=_NAME, source_run_id=run_id)
        client.log_model_artifacts(model.model_id, os.fspath(folder))
        client.finalize_logged_model(model.model_id, 'READY')
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
        address = f'models:/{model.model_id}'
        if register:
            try:
                client.create_registered_model(register)
            except MlflowException as error:
                if error.error_code != 'RESOURCE_ALREADY_EXISTS':
                    raise
            version = client.create_model_version(register, address, run_id, model_id=model.model_id)
            address += f' and models:/{register}/{version.version}'
    return f'In {target.place} it belongs to run {run_id} and is called {address}.'


@contextlib.contextmanager
def _errors_of(flag: str, ending: str = '') -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Of mlflow, of the network or of the server's database.
        reason = tracking_client.LOGIN if tracking_client.asks_for_login(error) else tracking_client.one_line(error)
        raise UserError(f'{flag}: {reason}{ending}') from error

"""Runs `launch.py` as a user would, each time in a process of its own, without importing torch anew."""

import functools
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from byol_func import modes

# What a run imports at once or later; the fork server imports it for all.
PRELOAD = [
    'launch',
    'byol_func.modes.running',
    *(f'byol_func.modes.{name.split(".")[0]}' for name in (modes.MEASURING | modes.TOOLS).values()),
    'sklearn.datasets',
    'torch._dynamo',
    'torch.utils.flop_counter',
    'torchvision.datasets.folder',
    'jinja2',
    'matplotlib.backends.backend_agg',
    'sklearn.manifold',
    'mlflow',
    'mlflow.store.tracking.sqlalchemy_store',
]
ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds
# absl's log lines, which may come before an error.
_LOG_LINE = re.compile(r'[IW]\d{4} |WARNING: Logging before flag parsing')


class Outcome(NamedTuple):
    """What a process leaves behind; the code of one killed by signal n is -n."""

    code: int
    stdout: str
    stderr: str


class Running(NamedTuple):
    """A started `launch.py`."""

    process: BaseProcess
    output: tempfile.TemporaryDirectory

    def wait(self) -> Outcome:
        """Waits for its end."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f'still running after {LIMIT} s:\n{self._read("stderr")}')
        outcome = Outcome(self.process.exitcode, self._read('stdout'), self._read('stderr'))
        self.process.close()
        self.output.cleanup()
        return outcome

    def _read(self, name: str) -> str:
        return pathlib.Path(self.output.name, name).read_text()


def run_launch(*argv: str, cwd: str | os.PathLike, **environ: str) -> Outcome:
    """The outcome of `python launch.py ARGV` in the folder `cwd`, with environment variables."""
    return start_launch(*argv, cwd=cwd, **environ).wait()


def start_launch(*argv: str, cwd: str | os.PathLike, **environ: str) -> Running:
    """Starts `python launch.py ARGV` in the folder `cwd`, with environment variables."""
    return _start(_launch, ('launch.py', *argv), cwd, environ)


def srun(*argv: str, cwd: str | os.PathLike, second: Sequence[str] = ()) -> list[Running]:
    """Starts two replicas with the variables that srun sets for two tasks; `second` are more flags of the second."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    step = dict(SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NODELIST='localhost', SLURM_JOB_ID='7', MASTER_PORT=port)
    return [
        start_launch(*argv, '--device=cpu', *more, cwd=cwd, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank, more in enumerate(((), second))
    ]


def run_module(module: str, *argv: str, cwd: str | os.PathLike) -> Outcome:
    """The outcome of `python -m MODULE ARGV` in the folder `cwd`."""
    return _start(functools.partial(runpy.run_module, module, run_name='__main__'), (module, *argv), cwd).wait()


def run_code(code: str, cwd: str | os.PathLike) -> Outcome:
    """The outcome of some lines of Python in the folder `cwd`."""
    return _start(functools.partial(exec, code, {'__name__': '__main__'}), ('example.py',), cwd).wait()


def _start(
    main: Callable[[], object], argv: tuple[str, ...], cwd: str | os.PathLike, environ: Mapping[str, str] | None = None
) -> Running:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)  # Heeded by the first process, which starts the server.
    # The server loads PyTorch, once for all; a process of several would set this before, see `program`.
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    output = tempfile.TemporaryDirectory()
    process = context.Process(target=_main, args=(main, argv, os.fspath(cwd), output.name, environ or {}))
    process.start()
    return Running(process, output)


def _launch() -> None:
    import launch

    launch.run()


def _main(main: Callable[[], object], argv: tuple[str, ...], cwd: str, output: str, environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
        file = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    # A test suite that is started in the background of a shell, or by nohup, ignores them, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)  # Faster than several on networks of this size.
    os.chdir(cwd)
    sys.argv = list(argv)
    main()


def succeed(*argv: str, cwd: str | os.PathLike, **environ: str) -> Outcome:
    """`run_launch` of a command that must succeed."""
    outcome = run_launch(*argv, cwd=cwd, **environ)
    assert outcome.code == 0, outcome.stderr
    return outcome


def assert_refused(outcome: Outcome, *fragments) -> None:
    """Checks that a run ended with one line about a user's mistake, which contains the fragments."""
    assert outcome.code == 1, outcome
    assert 'Traceback' not in outcome.stderr, outcome.stderr
    *before, error = outcome.stderr.splitlines()
    assert all(_LOG_LINE.match(line) for line in before), outcome.stderr
    assert error.startswith('Error: ') and len(error) < 500
    for fragment in fragments:
        assert str(fragment) in error
    assert outcome.stdout == ''


def config(name: str, **overrides) -> list[str]:
    """The flags that choose a config and override fields; dots in their names as '__'."""
    flags = [f'--config.{field.replace("__", ".")}={value}' for field, value in overrides.items()]
    return [f'--config={ROOT}/configs/{name}', *flags]


# The smallest network there is, on scikit-learn's digits of 8 x 8 pixels.
TINY_NETWORK = dict(
    network__encoder_class='TinyResNet',
    network__encoder_config__width_multiplier=1.0,
    network__projector_hidden_size=16,
    network__projector_output_size=8,
    network__predictor_hidden_size=16,
)
TINY_RUN = dict(
    **TINY_NETWORK,
    num_seeds=1,
    num_epochs=1,
    batch_size=128,
    optimizer='lars',
    lr_schedule__name='cosine',
    lr_schedule__base_learning_rate=2.0,
    lr_schedule__warmup_epochs=0.0,
    compile=False,  # To count the operations of a step costs more than these steps.
    log_every_steps=1,
    final_linear_eval=False,
    precision='float32',  # On every machine.
    pictures=False,
    linear_eval__compare_untrained=False,
    linear_eval__compare_pixels=False,
    linear_eval__num_epochs=1,
    linear_eval__batch_size=256,
    fine_tune__num_epochs=1,
)


def tiny_digits(**overrides) -> list[str]:
    """The flags of a run of seconds on the digits."""
    return config('digits.py', **{**TINY_RUN, **overrides})

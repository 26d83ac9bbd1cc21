"""Stops a run on request: on Ctrl-C, when a terminal closes, or when a batch system signals its time limit."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from byol_func.errors import Stopped

# Windows has only the first two. SIGXCPU announces a limit of CPU time (`ulimit -t`, LSF, Grid Engine).
_NAMES = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def requests() -> Iterator[Callable[[], str | None]]:
    """Records signals in this context instead of letting them end the process; a second SIGINT ends it at once.

    Yields a function that returns the name of the signal that this process has received, or None.
    """
    received: list[int] = []
    owner = os.getpid()

    def note(number, frame):
        del frame
        if os.getpid() != owner or (number == signal.SIGINT and number in received):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not received:
            at_once = '; press Ctrl-C again to stop at once' if number == signal.SIGINT else ''
            _tell(f'\n{signal.Signals(number).name}: finishing the step and saving{at_once}')
        received.append(number)

    def requested() -> str | None:
        return signal.Signals(received[0]).name if received else None

    with _handled_by(note):
        yield requested


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Lets a function handle all signals in this context, except a SIGHUP that `nohup` ignores."""
    # Python delivers signals to the main thread only, so other threads need no handlers.
    is_main = threading.current_thread() is threading.main_thread()
    heeded = [s for s in _SIGNALS if s.name != 'SIGHUP' or signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handler) for s in heeded} if is_main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _tell(line: str) -> None:
    """Prints a line to stderr; if the terminal is gone, discards all further output, so that the run can save."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)


@contextlib.contextmanager
def outside_of_loops() -> Iterator[None]:
    """Raises `Stopped` in this context as soon as a signal arrives, because no step needs to finish first."""
    owner = os.getpid()

    def stop(number, frame):
        del frame
        if os.getpid() != owner:  # A forked child keeps the default behaviour.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for other in _SIGNALS:  # Nothing is lost if a second signal ends the process.
            if signal.getsignal(other) is stop:
                signal.signal(other, signal.SIG_DFL)
        raise Stopped(f'Stopped by {signal.Signals(number).name} outside the training steps; no step was interrupted.')

    with _handled_by(stop):
        yield


def how_to_go_on(argv: Sequence[str], workdir: str) -> str:
    """Returns the command that resumes a run; `argv` is the `sys.argv` of this process.

    The workdir is added if the command line does not name it.
    """
    command = ['python', *(a for a in argv if a not in ('--resume=never', '-resume=never'))]
    if not any(a.lstrip('-').split('=')[0] == 'workdir' for a in argv[1:]):
        command.append(f'--workdir={workdir}')
    if 'LOCAL_WORLD_SIZE' in os.environ:
        per_node, nodes = int(os.environ['LOCAL_WORLD_SIZE']), 1
        nodes = int(os.environ['WORLD_SIZE']) // per_node
        more = [f'--nnodes={nodes}'] if nodes > 1 else []
        command[:1] = ['torchrun', *more, f'--nproc-per-node={per_node}']
        if nodes > 1:  # How the machines find each other is known to torchrun alone.
            return f"{shlex.join(command)} on every machine, with torchrun's other flags as before"
    return shlex.join(command)

"""Leaves a Python traceback in the workdir when a signal such as SIGSEGV kills the process."""

import contextlib
import faulthandler
import pathlib
from collections.abc import Iterator

from byol_func.runtime import collectives


@contextlib.contextmanager
def traced(workdir: str) -> Iterator[None]:
    """Writes the stack of every thread to `fault.txt` if a fatal signal arrives in this context.

    Replicas other than the first write to `fault_RANK.txt`. If nothing crashed, the file is removed at the end; the
    trace of an earlier process stays. Without the file, a crash inside a native library would leave nothing to report.
    If it cannot be opened, the trace goes to stderr.
    """
    rank = collectives.replica_index()
    path = pathlib.Path(workdir) / ('fault.txt' if rank == 0 else f'fault_{rank}.txt')
    try:
        file = open(path, 'a')  # noqa: SIM115 (closed below, after faulthandler has let go of it)
    except OSError:
        yield
        return
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.disable()
        file.close()
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()

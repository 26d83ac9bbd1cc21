"""Kills ranks and agents of torchrun at random moments, and compares the run with an undisturbed one bit for bit.

    python benchmarks/elastic.py --kills=20 --agents=3

First one `torchrun --nproc-per-node=2 --max-restarts=N` trains a small network on the digits, while a random rank is
killed (`kill -9`) again and again: three times out of four some time after the run has made a step, otherwise some time
after the rank has started, wherever it is. Then two agents, as on two machines (`--nnodes=2`), share a run, while the
second one is killed together with its rank and started again by the same command. Each run must end by itself. Writes
elastic.json into --output.
"""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'helpers'), str(ROOT / 'tests' / 'contracts')]

import test_elastic  # noqa: E402

import cli  # noqa: E402
import runs  # noqa: E402

FLAGS = flags.FLAGS
LIMIT = 1800.0  # seconds


def run_of(epochs: int) -> list[str]:
    """Returns the flags of a run in which every step is logged and every third one saved."""
    return cli.tiny_digits(
        num_epochs=epochs,
        checkpointing__save_every_steps=3,
        checkpointing__keep=2,
        lr_schedule__warmup_epochs=1.0,
        compile=False,
        preview__num_images=0,
    )


def start(run: list[str], workdir: pathlib.Path, *launcher: str) -> subprocess.Popen:
    """Starts torchrun, whose messages go to a file beside the workdir."""
    with open(f'{workdir}.log', 'ab') as log:
        return subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', *launcher, str(ROOT / 'launch.py'), *run]
            + [f'--workdir={workdir}', '--device=cpu'],
            cwd=workdir.parent,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def wait_for(what, agents: list[subprocess.Popen]) -> bool:
    """Waits until `what()` is true, and returns False if all agents end before that."""
    deadline = time.monotonic() + LIMIT
    while not what():
        if all(agent.poll() is not None for agent in agents):
            return False
        if time.monotonic() > deadline:
            raise TimeoutError('the run does not go on')
        time.sleep(0.01)
    return True


def wait_for_a_step(workdir: pathlib.Path, agents: list[subprocess.Popen]) -> bool:
    """Waits until metrics.jsonl grows; a run that is resumed first cuts it to the lines before its checkpoint."""
    path, sizes = workdir / 'metrics.jsonl', [0]

    def grows() -> bool:
        sizes.append(path.stat().st_size if path.exists() else 0)
        return sizes[-1] > sizes[-2]

    if path.exists():
        sizes.append(path.stat().st_size)
    return wait_for(grows, agents)


def compare(undisturbed: pathlib.Path, killed: pathlib.Path, agents: list[subprocess.Popen]) -> bool:
    """Waits for the agents and returns whether both runs are equal bit for bit."""
    codes = [agent.wait(LIMIT) for agent in agents]
    if any(codes):
        print(f'torchrun ended with {codes}', flush=True)
        return False
    try:
        runs.assert_same_runs(undisturbed, killed)
    except AssertionError as error:
        print(error)
        return False
    return True


def kill_ranks(folder: pathlib.Path, run: list[str], undisturbed: pathlib.Path) -> dict:
    """Kills a random rank of one agent again and again."""
    rng, workdir, kills = random.Random(FLAGS.seed), folder / 'ranks', []
    agent = start(run, workdir, '--standalone', '--nproc-per-node=2', f'--max-restarts={2 * FLAGS.kills}')
    pids: dict[int, int | None] = {}
    deadline = time.monotonic() + 60 * FLAGS.minutes
    for i in range(FLAGS.kills):
        if time.monotonic() > deadline:
            break
        rank, old = rng.randrange(2), dict(pids)

        def have_started(old=old) -> bool:
            found = {r: test_elastic.pid_of_rank(r, workdir) for r in range(2)}
            new = all(pid and pid != old.get(r) for r, pid in found.items())
            pids.update(found if new else {})
            return new

        at_start = i % 4 == 3
        going = wait_for(have_started, [agent]) and (at_start or wait_for_a_step(workdir, [agent]))
        time.sleep(rng.uniform(0, FLAGS.spread if at_start else FLAGS.pause))
        if not going or agent.poll() is not None:
            break
        try:
            os.kill(pids[rank], signal.SIGKILL)
        except ProcessLookupError:  # It has ended since.
            continue
        kills.append('start' if at_start else 'steps')
        lines = len(runs.metrics(workdir)) if (workdir / 'metrics.jsonl').exists() else 0
        print(f'kill {i + 1}: rank {rank} {"while it starts" if at_start else ""} at line {lines}', flush=True)
    equal = compare(undisturbed, workdir, [agent])
    return dict(kills=len(kills), of_them_while_starting=kills.count('start'), equal=equal)


def kill_agents(folder: pathlib.Path, run: list[str], undisturbed: pathlib.Path) -> dict:
    """Kills the second of two agents and its rank, as if its machine had died, and starts it again."""
    rng, workdir, kills = random.Random(FLAGS.seed + 1), folder / 'agents', 0
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    two = ['--nnodes=2', '--nproc-per-node=1', '--master-addr=127.0.0.1', f'--master-port={port}', '--max-restarts=99']
    agents = [start(run, workdir, *two, f'--node-rank={rank}') for rank in range(2)]
    for i in range(FLAGS.agents):
        if not wait_for_a_step(workdir, agents):
            break
        time.sleep(rng.uniform(0, FLAGS.pause))
        pid = test_elastic.pid_of_rank(1, workdir)
        agents[1].kill()
        if pid:
            os.kill(pid, signal.SIGKILL)
        agents[1].wait()
        kills += 1
        print(f'agent kill {i + 1} at line {len(runs.metrics(workdir))}', flush=True)
        time.sleep(rng.uniform(0, 2))
        agents[1] = start(run, workdir, *two, '--node-rank=1')
    return dict(kills=kills, equal=compare(undisturbed, workdir, agents))


def main(argv: list[str]) -> None:
    """Runs both parts and writes the results."""
    del argv
    begin, figures = time.monotonic(), {}
    output = pathlib.Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run, undisturbed = run_of(FLAGS.epochs), folder / 'undisturbed'
        agent = start(run, undisturbed, '--standalone', '--nproc-per-node=2')
        if agent.wait(LIMIT):
            raise SystemExit((folder / 'undisturbed.log').read_text())
        print(f'undisturbed: {len(runs.metrics(undisturbed))} lines', flush=True)
        for title, count, part in (('ranks', FLAGS.kills, kill_ranks), ('agents', FLAGS.agents, kill_agents)):
            if count:
                figures[title] = part(folder, run, undisturbed)
                print(json.dumps(figures), flush=True)
                if not figures[title]['equal']:
                    (output / f'{title}.log').write_bytes((folder / f'{title}.log').read_bytes())
    figures['seconds'] = round(time.monotonic() - begin)
    (output / 'elastic.json').write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    flags.DEFINE_integer('kills', 20, 'How often a rank is killed.')
    flags.DEFINE_float('pause', 0.5, 'Most seconds between a step and a kill.')
    flags.DEFINE_float('minutes', 60.0, 'No rank is killed after this time.')
    flags.DEFINE_integer('agents', 3, 'How often an agent is killed.')
    flags.DEFINE_integer('epochs', 12, 'Epochs of the run, 11 steps each.')
    flags.DEFINE_float('spread', 10.0, 'Most seconds between the start of a rank and a kill while it starts.')
    flags.DEFINE_integer('seed', 0, 'Random seed of the ranks and moments.')
    flags.DEFINE_string('output', str(ROOT / 'benchmarks/results/faults'), 'Folder for elastic.json.')
    app.run(main)

"""`--nproc N`: the same command in N processes, as torchrun starts them.

Each learns from its environment which one it is (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...), so
`torchrun -m reftune_cli train ...` does the same, and is what starts processes on several machines.
Here Ctrl-C reaches each process once, which then ends with a checkpoint, whatever time that takes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

PIPE = "REFTUNE_LAUNCHER"  # the number of a pipe that closes when the launcher is gone
GRACE = 15.0
"""Seconds that the others have, once one has failed."""
POLL = 0.1
INTERRUPTED = 130


def is_worker() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process is the one that prints."""
    return not is_worker() or os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """Wait, in the other processes, for the first one to tell of an error that all of them have.

    The launcher ends them then; an error that is theirs alone they tell afterwards.
    """
    if not is_first():
        time.sleep(GRACE / 3)


def run_workers(count: int, command: Sequence[str]) -> int:
    """Run a command in `count` processes; return 0, or the exit status of one that failed.

    If one fails, the others are ended. Ctrl-C is passed on to each once; again, it ends them.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // count, 1))
    reading, writing = os.pipe()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": threads,
        PIPE: str(reading),
    }
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            pass_fds=[reading],
            start_new_session=True,  # the terminal's Ctrl-C comes to us alone
        )
        for rank in range(count)
    ]
    os.close(reading)
    try:
        with _passing_on(workers):
            return _wait(workers)
    finally:
        os.close(writing)


def end_with_launcher() -> None:
    """End this process when its launcher is gone: killed, it can end nobody."""
    if PIPE not in os.environ:
        return
    pipe = int(os.environ.pop(PIPE))

    def watch() -> None:
        os.read(pipe, 1)  # returns when the other end closes
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    asked = [0]

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked[0] += 1
        first = asked[0] == 1 and number == signal.SIGINT
        _send(workers, signal.SIGINT if first else signal.SIGKILL)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    deadline = 0.0
    while None in [worker.poll() for worker in workers]:  # all of them: a poll takes note of an end
        time.sleep(POLL)
        status = next((w.returncode for w in workers if w.returncode), None)
        if status is None:
            continue
        if failed is None:
            failed, deadline = status, time.monotonic() + GRACE
            if failed != INTERRUPTED:  # those that were interrupted end by themselves
                _send(workers, signal.SIGTERM, but_first=True)
        if failed != INTERRUPTED and time.monotonic() > deadline:
            _send(workers, signal.SIGKILL)
    statuses = [w.returncode for w in workers if w.returncode]
    if failed is None:
        failed = statuses[0] if statuses else 0
    return failed if failed >= 0 else 128 - failed


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int, but_first: bool = False) -> None:
    for worker in workers[1 if but_first else 0 :]:
        if worker.poll() is None:
            worker.send_signal(number)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

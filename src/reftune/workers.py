"""Work that other processes do: results in order, few in flight, an error as if done here."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from reftune.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_WATCH = "end with the parent process"
_function: Callable[[Any], Any]  # in a worker process only


def in_workers(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """Yield `function(item)` of each item in order, computed by `processes` other processes.

    Two items for each process are in flight, the rest stays unread.

    Raises:
        RunError: a process was killed.
    """
    # fork, where it is safe: a user's script needs no `if __name__ == "__main__"` for it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(processes, context, _start, (function,))
    waiting: deque[Future[Result]] = deque()
    try:
        with one_thread_tokenizers():
            for item in items:
                waiting.append(_submit(pool, item))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "A process that was encoding examples has died, most likely for lack of memory. Use "
            "fewer of them (data.num_proc)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def one_thread_tokenizers() -> Iterator[None]:
    """Have processes that are started in a block tokenise with one thread each.

    Several for each would get in each other's way; and a fork of a process whose tokenizer has
    used threads makes older versions of `tokenizers` complain on stderr, unless this was said.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def seeing_one_gpu(place: int) -> Iterator[None]:
    """Have processes that are started in a block see one of the GPUs that this one sees.

    Places 0, 1, ... have the first GPU, the second, and so on, and the first again after the last.
    The environment says it, since libraries look for GPUs when they are imported: later is too
    late. Where there is no GPU, nothing is changed.
    """
    import torch

    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    listed = range(torch.cuda.device_count()) if before is None else before.split(",")
    gpus = [text for k in listed if (text := str(k).strip())]
    if gpus:
        os.environ[name] = gpus[place % len(gpus)]
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


def end_with_parent() -> None:
    """End this process, of a pool, when the one that started it is gone: killed, it ends nobody."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name=_WATCH).start()


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    with warnings.catch_warnings():
        # Python 3.12 on a fork with threads: no worker uses what they may hold
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(_work, item)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us


def _work(item: Any) -> Any:
    return _function(item)

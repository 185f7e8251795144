"""Functions run in several processes that are connected by gloo, each with a time limit.

A fork server imports torch and reftune once; each process is a fork of it.
"""

import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["reftune", "transformers.models.llama.modeling_llama"])
TIME_LIMIT = 600.0


class ProcessFailedError(AssertionError):
    """A process ended with an error, or did not end."""


def run_together(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(*args)` returns in each of `count` processes, started as by torchrun.

    A process that returns an exception, or ends by `os._exit(n)`, gives what it gave, or n.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
    workers = [
        _CONTEXT.Process(target=_work, args=(rank, count, port, pipe[1], function, args))
        for rank, pipe in enumerate(pipes)
    ]
    deadline = time.monotonic() + TIME_LIMIT
    try:
        for worker, (_, sending) in zip(workers, pipes, strict=True):
            worker.start()
            sending.close()
        return [
            _result(worker, receiving, deadline)
            for worker, (receiving, _) in zip(workers, pipes, strict=True)
        ]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _result(worker: Any, receiving: Any, deadline: float) -> Any:
    if not receiving.poll(max(deadline - time.monotonic(), 0.0)):
        raise ProcessFailedError(f"{worker.name} did not end in {TIME_LIMIT} s")
    try:
        kind, value = receiving.recv()
    except EOFError:  # it ended without a word
        worker.join()
        return worker.exitcode
    if kind == "error":
        raise ProcessFailedError(value)
    return value


def _work(
    rank: int, count: int, port: int, pipe: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    try:
        pipe.send(("value", function(*args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

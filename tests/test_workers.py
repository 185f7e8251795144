"""Work in other processes: order, laziness, errors, a process that dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from reftune.errors import DataError, RunError
from reftune.workers import (
    end_with_parent,
    in_workers,
    one_thread_tokenizers,
    seeing_one_gpu,
)


def slow_at_first(item: int) -> tuple[int, int]:
    time.sleep(0.05 if item == 0 else 0)
    return item, os.getpid()


def refuse_five(item: int) -> int:
    if item == 5:
        raise DataError("f.jsonl:5: no")
    return item


def die(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_results_come_in_order_from_other_processes() -> None:
    results = list(in_workers(slow_at_first, range(20), 2))
    assert [item for item, _ in results] == list(range(20))
    assert os.getpid() not in {process for _, process in results}


def test_items_are_read_as_results_are_taken() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            yield item

    results = in_workers(refuse_five, items(), 2)
    assert next(results) == 0
    assert len(read) <= 6
    results.close()  # type: ignore[attr-defined]
    assert len(read) <= 6


def test_an_error_comes_where_its_result_would() -> None:
    results = in_workers(refuse_five, range(10), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"^f\.jsonl:5: no$"):
        next(results)


def test_a_process_that_is_killed_is_said_and_does_not_hang() -> None:
    with pytest.raises(RunError, match="has died, most likely for lack of memory"):
        list(in_workers(die, range(10), 2))


def test_ctrl_c_is_for_the_parent() -> None:
    for signalled in in_workers(interrupt_self, range(2), 1):
        assert signalled


def interrupt_self(item: int) -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return True


@pytest.mark.parametrize("before", [None, "true"])
def test_what_the_user_said_about_threads_is_kept(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with one_thread_tokenizers():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


@pytest.mark.parametrize(
    ("before", "gpus", "seen"),
    [
        ("2,5", 8, ["2", "5", "2"]),
        ("GPU-ab", 8, ["GPU-ab"] * 3),
        (None, 2, ["0", "1", "0"]),
        (None, 0, [None] * 3),
        ("", 2, [""] * 3),
    ],
)
def test_processes_see_one_gpu_each(
    before: str | None, gpus: int, seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    found = []
    for place in range(3):
        with seeing_one_gpu(place):
            found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert found == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def say_who_and_wait(path: str) -> None:
    end_with_parent()
    end_with_parent()  # a pool's process does it for each item
    assert sum("parent" in thread.name for thread in threading.enumerate()) == 1
    Path(path).write_text(str(os.getpid()))
    time.sleep(300)


PARENT = """
import multiprocessing, sys
from test_workers import say_who_and_wait
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=say_who_and_wait, args=sys.argv[1:]).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_of_a_pool_ends_with_its_parent(tmp_path: Path) -> None:
    script, note = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(note)], env={**os.environ, "PYTHONPATH": paths}
    )
    child = int(waited_for(lambda: note.read_text() if note.is_file() else ""))
    parent.kill()
    parent.wait()
    waited_for(lambda: "gone" if not alive(child) else "")


def waited_for(look: Callable[[], str]) -> str:
    for _ in range(1200):
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("nothing in two minutes")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

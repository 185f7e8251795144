"""`reftune train --nproc N`: how its processes start, fail, are interrupted, and print."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from reftune_cli import workers
from runs import tiny_run


def command(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def launched(count: int, code: str) -> subprocess.Popen[str]:
    """Start a launcher in a process of its own, as a terminal does."""
    launcher = f"""
        import sys
        from reftune_cli.workers import run_workers
        sys.exit(run_workers({count}, [sys.executable, "-c", {textwrap.dedent(code)!r}]))
    """
    return subprocess.Popen(
        command(launcher), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process: subprocess.Popen[str], words: list[str]) -> None:
    assert process.stdout is not None
    missing = set(words)
    while missing:
        line = process.stdout.readline()
        assert line, f"it ended without {missing}"
        missing.discard(line.strip())


def test_each_process_knows_which_it_is(capfd):
    code = """
        import os
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        print(*(os.environ[name] for name in names), flush=True)
    """
    assert workers.run_workers(2, command(code)) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_ends_the_others(monkeypatch, failing):
    monkeypatch.setattr(workers, "GRACE", 1.0)
    code = f"""
        import os, sys, time
        sys.exit(3) if os.environ["RANK"] == "{failing}" else time.sleep(300)
    """
    assert workers.run_workers(2, command(code)) == 3


def test_one_that_is_killed_is_told_by_its_signal(monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 1.0)
    code = """
        import os, signal, time
        os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else time.sleep(300)
    """
    assert workers.run_workers(2, command(code)) == 128 + signal.SIGKILL


def test_ctrl_c_reaches_each_process_once():
    code = """
        import signal, sys, time
        asked = []
        signal.signal(signal.SIGINT, lambda *args: asked.append(1))
        print("ready", __import__("os").environ["RANK"], flush=True)
        while not asked:
            time.sleep(0.05)
        time.sleep(0.5)
        sys.exit(130 if len(asked) == 1 else 4)
    """
    with launched(2, code) as process:
        read_until(process, ["ready 0", "ready 1"])
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130


def test_processes_end_when_their_launcher_is_killed(tmp_path):
    code = f"""
        import os, time
        from pathlib import Path
        from reftune_cli.workers import end_with_launcher
        end_with_launcher()
        rank = os.environ["RANK"]
        Path({str(tmp_path)!r}, rank).write_text(str(os.getpid()))
        print("ready", rank, flush=True)
        time.sleep(300)
    """
    with launched(2, code) as process:
        read_until(process, ["ready 0", "ready 1"])
        process.kill()
    deadline = time.monotonic() + 120
    for pid in (int((tmp_path / rank).read_text()) for rank in "01"):
        while _is_running(pid):
            assert time.monotonic() < deadline, f"{pid} goes on"
            time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def run_cli(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "reftune_cli", "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
def test_a_run_is_interrupted_and_resumed_and_one_process_prints(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train={"epochs": 2000, "save_steps": 1000}, data={"cache_dir": None})
    recipe = tmp_path / "run.yaml"
    recipe.write_text(run.to_yaml())
    process = run_cli(str(recipe), "--nproc", "2")
    log, deadline = run.directory / "log.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    (step,) = re.findall(r"interrupted at step (\d+)", err)
    assert (run.directory / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert out.count("Training 260 parameters") == 1
    assert not (run.directory / "adapter").exists()
    # it cannot be resumed as another run, which every process finds and one tells
    process = run_cli(str(recipe), "train.epochs=1", "--resume", "--nproc", "2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("was started with other settings (train.epochs)") == 1

"""benchmarks/serving.py on a tiny model: every cell has numbers, and a second run measures none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def run(base: Path, folder: Path) -> tuple[dict[str, Any], str]:
    out = folder / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--model", str(base), "--threads", "1"]
    command += ["--out", str(out), "--folder", str(folder / "adapters"), "--kv-gib", "1"]
    command += ["--prompt", "16", "--hot", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), out.read_text()


def test_all_cells_and_resuming(base: Path, tmp_path: Path) -> None:
    summary, first = run(base, tmp_path)
    goals: dict[str, list[object]] = summary.pop("goals")
    cells = {"exact", "throughput", "peers", "ttft", "prefix", "hot", "registered"}
    assert set(summary) == cells
    assert list(summary["throughput"]) == ["rounds", "bare", "reftune x1", "reftune x8"]
    assert list(summary["peers"]) == ["rounds", "bare", "reftune x2", "lora x2", "hf"]
    assert len(goals) == 11
    # What no clock decides is reached on any machine.
    assert goals["prefix-cache hits, to bare"][0] == 1.0
    assert goals["base requests bit-identical"] == [2, "2"]
    assert goals["greedy completions identical"] == [8, "8"]
    exact: dict[str, dict[str, float]] = summary["exact"]
    assert exact["changed"]["median"] >= exact["edited"]["median"] - 1
    few: dict[str, dict[str, float]] = summary["registered"]
    assert 0 < few["adapters_MiB"]["median"] <= few["limit_MiB"]["median"]
    again, second = run(base, tmp_path)
    assert again.pop("goals") == goals
    assert (again, json.loads(second)["cells"]) == (summary, json.loads(first)["cells"])

"""benchmarks/serving.py on a tiny model: every cell has numbers, and a second run measures none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def run(base: Path, folder: Path) -> tuple[dict[str, dict[str, object]], str]:
    out = folder / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--model", str(base), "--threads", "1"]
    command += ["--out", str(out), "--folder", str(folder / "adapters"), "--kv-gib", "1"]
    command += ["--prompt", "16", "--hot", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), out.read_text()


def test_all_cells_and_resuming(base: Path, tmp_path: Path) -> None:
    summary, first = run(base, tmp_path)
    assert set(summary) == {"throughput", "ttft", "prefix", "registered", "hot"}
    arms = ["rounds", "bare", "reftune x1", "reftune x8", "lora x2", "hf"]
    assert list(summary["throughput"]) == arms
    shared = summary["prefix"]
    assert shared["reftune x4"] == shared["bare"]  # what was cached counts no clock
    again, second = run(base, tmp_path)
    assert (again, json.loads(second)["cells"]) == (summary, json.loads(first)["cells"])

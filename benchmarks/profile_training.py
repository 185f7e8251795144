"""What does a training step spend its time on? Operators of the fast step, by workload.

    python benchmarks/profile_training.py --data-dir DATA --smollm2 DIR [--qwen DIR] [--minilm DIR]
        [--workloads A,B,C10,D,E] [--threads 2] [--out benchmarks/results/training-profile-cpu.json]

Steps of the workloads of training.py with reftune's shortcuts, without its Trainer; torch's
profiler tells the operators. Matrix products are what the floor counts; all else is what an
attention kernel, a fused norm or activation, or a faster random generator could save.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reftune import ReftConfig
from reftune.prompts import Encoded
from reftune.tokens import Collator, TokenDataset
from reftune.train import EpochSampler, TrainSettings, shortcuts
from training_peers import workloads
from training_peers.job import Job
from training_peers.report import machine

HERE = Path(__file__).resolve().parent
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("_scaled_dot_product",),
    "random numbers": ("bernoulli", "native_dropout"),
    "softmax of logits": ("_log_softmax", "nll_loss"),
    "rows picked and put back": ("index_select", "index_copy", "index_add", "index"),
}
MEASURED = 3


def operators(step: Callable[[], None]) -> dict[str, float]:
    """Return the seconds of each operator in a few steps, its own time alone."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(MEASURED):
            step()
    return {row.key: row.self_cpu_time_total / 1e6 for row in found.key_averages()}


def by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each kind of operator, the largest others by name."""
    kinds: dict[str, float] = defaultdict(float)
    for name, spent in seconds.items():
        kind = next((k for k, names in KINDS.items() if any(n in name for n in names)), name)
        kinds[kind] += spent
    total = sum(kinds.values())
    shares = sorted(((k, v / total) for k, v in kinds.items()), key=lambda item: -item[1])
    return {name: round(share, 3) for name, share in shares if share > 0.008}


def steps_of(job: Job, folder: Path) -> dict[str, float]:
    """Profile the steps of a job."""
    causal, setting = job.task == "causal", job.setting
    cls = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = get_peft_model(
        cls.from_pretrained(job.model, dtype=getattr(torch, job.dtype)),
        ReftConfig(
            task_type="CAUSAL_LM" if causal else "SEQ_CLS",
            r=setting.rank,
            layers=setting.layers,
            positions=setting.positions,
            tied="all" if setting.tied else "sides",
            modules_to_save=None if causal else ["classifier"],
        ),
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data: Any = TokenDataset([Encoded(r.input_ids, r.prompt_length) for r in job.examples])
    collator: Any = Collator(job.pad_token_id)
    if not causal:
        sys.path.insert(0, str(HERE / "training_peers"))  # as the workers find each other
        from reftune_worker import Sequences, collate

        data = Sequences(job.examples)
        collator = lambda rows: collate(rows, job.pad_token_id)  # noqa: E731
    settings = TrainSettings(epochs=job.epochs, batch_size=job.batch_size, device="cpu")
    order = list(EpochSampler(data.lengths, job.batch_size, job.seed))
    middle = len(order) // job.batch_size // 2 * job.batch_size  # a batch of average length
    rows = [data[i] for i in order[middle : middle + job.batch_size]]
    with shortcuts(model, data, collator, settings, folder) as way:

        def step() -> None:
            loss = model(**way.before(dict(way.collate(rows)))).loss
            loss.backward()
            way.after()
            optimizer.step()
            optimizer.zero_grad()

        return operators(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for model in ("smollm2", "qwen", "minilm"):
        parser.add_argument(f"--{model}", help="the model's directory")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workloads", default="A,B,C10,D,E")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training-profile-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: getattr(args, name) for name in ("smollm2", "qwen", "minilm")}
    options = workloads.Options(models, args.data_dir, 8, None, 0, args.threads, "cpu")
    found: dict[str, Any] = {"machine": machine(), "threads": args.threads, "share of time": {}}
    if args.out.exists():  # workloads that are not measured again stay
        found["share of time"] = json.loads(args.out.read_text())["share of time"]
    for name in args.workloads.split(","):
        if not models[workloads.WORKLOADS[name].model]:
            continue
        job = workloads.build(name, options)
        found["share of time"][name] = by_kind(steps_of(job, args.out.parent))
        print(name, json.dumps(found["share of time"][name], indent=1))
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(args.out)


if __name__ == "__main__":
    main()

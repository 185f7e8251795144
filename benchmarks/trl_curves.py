"""Draw what a run of examples/trl_dpo.py or trl_grpo.py logged, and write it down with its command.

    python benchmarks/trl_curves.py LOG.json OUT.json --command "..." --seconds 1200

LOG.json is what `--log` wrote; OUT.json gets it with versions and the command, OUT.png the curves.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CURVES = {
    "rewards/margins": ("reward margin (nats x beta)", "eval_rewards/margins"),
    "reward": ("mean reward", "eval_reward"),
}


def points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def draw(history: list[dict[str, Any]], out: Path) -> None:
    key = next(key for key in CURVES if any(key in entry for entry in history))
    label, held_out = CURVES[key]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(*points(history, key), "o-", markersize=3, alpha=0.6, label="training batches")
    axes.plot(*points(history, held_out), "s-", label="held out")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="what was run")
    parser.add_argument("--seconds", type=float, help="how long it took")
    parser.add_argument("--cpu-seconds", type=float, help="of the processor")
    args = parser.parse_args()
    history = json.loads(args.log.read_text())
    libraries = ("torch", "transformers", "peft", "trl")
    made = {
        "command": args.command,
        "seconds": args.seconds,
        "cpu_seconds": args.cpu_seconds,
        "versions": {name: version(name) for name in libraries} | {"machine": platform.machine()},
        "history": history,
    }
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    draw(history, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""A job: all that a worker is told, as one JSON file. Standard library only.

Every arm of a round gets the same job but for its own three fields: `order`, `stop_after` and
`overrides`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One example as tokens; a classifier's row is all prompt and has a class."""

    input_ids: list[int]
    prompt_length: int
    label: int | None = None


@dataclass(frozen=True)
class Setting:
    """Which hidden states are edited: the first `prefix` and last `suffix` tokens of a prompt."""

    layers: list[int]
    rank: int
    prefix: int
    suffix: int
    tied: bool  # one Phi per layer, else one for the prefix and one for the suffix

    @property
    def positions(self) -> str:
        """Return them as the paper writes them: f7+l7."""
        return "+".join(
            f"{side}{n}" for side, n in (("f", self.prefix), ("l", self.suffix)) if n > 0
        )


@dataclass(frozen=True)
class Job:
    """One training run. `plain_order` and `grouped_order` name the rows of all epochs in turn."""

    workload: str
    task: str  # "causal" or "classification"
    model: str
    dtype: str
    pad_token_id: int
    setting: Setting
    batch_size: int
    epochs: int
    first_steps: int  # left out of the rates
    whole_run: bool  # the rate is that of the whole run, its first steps and all
    learning_rate: dict[str, float]  # of "reft" and "lora"
    warmup_ratio: float
    threads: int
    device: str
    seed: int
    examples: list[Row]
    heldout: list[Row]
    plain_order: list[int]
    grouped_order: list[int]
    num_labels: int = 0
    order: str = "plain"
    stop_after: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of a whole run."""
        return len(self.plain_order) // self.batch_size

    @property
    def steps(self) -> int:
        """Return the optimizer steps that this arm makes."""
        return min(self.stop_after or self.total_steps, self.total_steps)

    @property
    def warmup_steps(self) -> int:
        """Return the steps in which the learning rate rises."""
        return -int(-self.warmup_ratio * self.total_steps // 1)

    def rows(self) -> list[Row]:
        """Return the examples of all epochs in this arm's order."""
        order = self.grouped_order if self.order == "grouped" else self.plain_order
        return [self.examples[i] for i in order]

    def digest(self) -> str:
        """Return what tells this job's results from those of another."""
        # Where the model lies does not matter.
        values = dataclasses.asdict(self) | {"model": Path(self.model).name}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        values = json.loads(path.read_text())
        values["setting"] = Setting(**values["setting"])
        for key in ("examples", "heldout"):
            values[key] = [Row(**row) for row in values[key]]
        return cls(**values)

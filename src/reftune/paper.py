"""The paper's own figures (Wu et al. 2024, arXiv 2404.03592v3), to stand beside ours.

Scores are per cent. Models there have 125M to 13B parameters: ours beside them say whether the
order of the methods is the same, not whether a small model is as good as a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_COMMONSENSE = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge",
    "openbookqa",
)  # fmt: skip
_ARITHMETIC = ("AQuA", "gsm8k", "mawps", "SVAMP")
_GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")


@dataclass(frozen=True)
class PaperTable:
    """A table's rows of one model: {method: {task: score}}.

    Attributes:
        source: which table of the paper it is.
        model: which model it is about.
        scores: of each method on each task, and "average".
        percent: trained parameters as a share of the model's.
    """

    source: str
    model: str
    scores: Mapping[str, Mapping[str, float]]
    percent: Mapping[str, float]


def _table(
    source: str, model: str, tasks: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]
) -> PaperTable:
    """Rows are (per cent of parameters, score of each task..., average)."""
    columns = (*tasks, "average")
    return PaperTable(
        source,
        model,
        MappingProxyType({m: dict(zip(columns, r[1:], strict=True)) for m, r in rows.items()}),
        MappingProxyType({m: r[0] for m, r in rows.items()}),
    )


# The methods are named as in adapter.method; "dora" is lora with use_dora.
TABLES: tuple[PaperTable, ...] = (
    _table("Table 1", "LLaMA-7B", _COMMONSENSE, {
        "prefix_tuning": (0.039, 64.3, 76.8, 73.9, 42.1, 72.1, 72.9, 54.0, 60.6, 64.6),
        "lora": (0.826, 68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8, 74.7),
        "dora": (0.838, 68.5, 82.9, 79.6, 84.8, 80.8, 81.4, 65.8, 81.0, 78.1),
        "direft": (0.031, 69.5, 83.0, 79.0, 92.5, 80.5, 82.2, 68.0, 77.5, 79.0),
        "loreft": (0.031, 69.3, 84.4, 80.3, 93.1, 84.2, 83.2, 68.2, 78.9, 80.2),
    }),
    _table("Table 1", "LLaMA-13B", _COMMONSENSE, {
        "prefix_tuning": (0.031, 65.3, 75.4, 72.1, 55.2, 68.6, 79.5, 62.9, 68.0, 68.4),
        "lora": (0.670, 72.1, 83.5, 80.5, 90.5, 83.7, 82.8, 68.3, 82.4, 80.5),
        "dora": (0.681, 72.4, 84.9, 81.5, 92.4, 84.2, 84.2, 69.6, 82.8, 81.5),
        "direft": (0.025, 71.3, 86.1, 80.8, 94.6, 83.6, 85.5, 72.9, 82.7, 82.2),
        "loreft": (0.025, 72.1, 86.3, 81.8, 95.1, 87.2, 86.2, 73.7, 84.2, 83.3),
    }),
    _table("Table 1", "Llama-2 7B", _COMMONSENSE, {
        "lora": (0.826, 69.8, 79.9, 79.5, 83.6, 82.6, 79.8, 64.7, 81.0, 77.6),
        "dora": (0.838, 71.8, 83.7, 76.0, 89.1, 82.6, 83.7, 68.2, 82.4, 79.7),
        "direft": (0.031, 70.8, 83.6, 80.2, 93.6, 82.1, 84.8, 70.4, 81.5, 80.9),
        "loreft": (0.031, 71.1, 83.8, 80.8, 94.3, 84.5, 85.6, 72.2, 82.3, 81.8),
    }),
    _table("Table 1", "Llama-3 8B", _COMMONSENSE, {
        "lora": (0.700, 70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0, 80.8),
        "dora": (0.710, 74.6, 89.3, 79.9, 95.5, 85.6, 90.5, 80.4, 85.8, 85.2),
        "direft": (0.026, 73.4, 88.7, 81.0, 95.6, 85.5, 91.8, 81.8, 85.4, 85.4),
        "loreft": (0.026, 75.1, 90.2, 82.0, 96.3, 87.4, 92.4, 81.6, 87.5, 86.6),
    }),
    _table("Table 2", "LLaMA-7B", _ARITHMETIC, {
        "prefix_tuning": (0.039, 14.2, 24.4, 63.4, 38.1, 35.0),
        "lora": (0.826, 18.9, 37.5, 79.0, 52.1, 46.9),
        "direft": (0.031, 21.3, 24.1, 74.5, 42.7, 40.6),
        "loreft": (0.031, 21.4, 26.0, 76.2, 46.8, 42.6),
    }),
    _table("Table 2", "LLaMA-13B", _ARITHMETIC, {
        "prefix_tuning": (0.031, 15.7, 31.1, 66.8, 41.4, 38.8),
        "lora": (0.670, 18.5, 47.5, 83.6, 54.6, 51.1),
        "direft": (0.025, 20.5, 35.8, 80.8, 54.8, 48.0),
        "loreft": (0.025, 23.6, 38.1, 82.4, 54.2, 49.6),
    }),
    _table("Table 13", "RoBERTa-base", _GLUE, {
        "full": (100, 87.3, 94.4, 87.9, 62.4, 92.5, 91.7, 78.3, 90.6, 85.6),
        "lora": (0.239, 86.6, 93.9, 88.7, 59.7, 92.6, 90.4, 75.3, 90.3, 84.7),
        "bitfit": (0.080, 84.7, 94.0, 88.0, 54.0, 91.0, 87.3, 69.8, 89.5, 82.3),
        "direft": (0.015, 82.5, 92.6, 88.3, 58.6, 91.3, 86.4, 76.4, 89.3, 83.2),
        "loreft": (0.015, 83.1, 93.4, 89.2, 60.4, 91.2, 87.4, 79.0, 90.0, 84.2),
    }),
    _table("Table 13", "RoBERTa-large", _GLUE, {
        "full": (100, 88.8, 96.0, 91.7, 68.2, 93.8, 91.5, 85.8, 92.6, 88.6),
        "lora": (0.225, 90.2, 96.0, 89.8, 65.5, 94.7, 90.7, 86.3, 91.7, 88.1),
        "direft": (0.014, 88.7, 95.4, 88.5, 66.7, 93.9, 88.1, 86.9, 91.2, 87.4),
        "loreft": (0.014, 89.2, 96.2, 90.1, 68.0, 94.1, 88.5, 87.5, 91.6, 88.2),
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """A parametrisation of the edit, and its average on arithmetic (Table 17)."""

    text: str
    llama_7b: float
    llama_13b: float


# By the method that computes it. All but DiReFT were run with LoReFT's settings.
TABLE_17: Mapping[str, Formula] = MappingProxyType(
    {
        "lobireft": Formula("h + Rᵀb", 31.3, 39.5),
        "consreft": Formula("h + Rᵀ(b − Rh)", 37.1, 47.4),
        "direft_orthonormal": Formula("h + Rᵀ(Wh + b)", 42.9, 49.3),
        "noreft": Formula("h + W₂ᵀ(W₁h + b − W₂h)", 42.4, 49.0),
        "direft": Formula("h + W₂ᵀ(W₁h + b)", 40.6, 48.0),
        "loreft": Formula("h + Rᵀ(Wh + b − Rh)", 42.6, 49.6),
    }
)

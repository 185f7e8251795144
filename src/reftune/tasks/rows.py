"""Where a task's rows are: in a folder, in a layout that others publish, or on the Hub."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from reftune.data import Row, iter_rows
from reftune.errors import DataError, RunError
from reftune.hub import fetch
from reftune.tasks.hub import SETS

HUB: Final = "hub"
SUFFIXES: Final = (".json", ".jsonl", ".csv", ".parquet")

# Below data_dir, besides FOLDER/NAME/SPLIT.SUFFIX: files as their authors (or copies) name them.
FOLDERS: Final = ("", "dataset", "llm_adapters/dataset")
_TREC: Final = ("TREC.{split}.all.jsonl", "classification/TREC.{split}.all.jsonl")
_ULTRAFEEDBACK: Final = ("ultrafeedback_1k.jsonl", "instruct/ultrafeedback_1k.jsonl")
PLACES: Final[Mapping[tuple[str, str], tuple[str, ...]]] = MappingProxyType(
    {
        ("SVAMP", "test"): ("SVAMP.json", "svamp_mawps_asdiv/SVAMP.json"),
        ("mawps-asdiv", "train"): (
            "mawps-asdiv-a_svamp/train.csv",
            "mawps-asdiv-a_svamp.train.csv",
            "data/mawps-asdiv-a_svamp/train.csv",  # in a checkout of SVAMP's repository
            "svamp_mawps_asdiv/mawps-asdiv-a_svamp.train.csv",
        ),
        ("hellaswag", "test"): ("hellaswag_800/val_subset.jsonl",),
        ("sst2", "train"): ("glue/sst2/train.jsonl",),
        ("sst2", "test"): ("sst2/dev.jsonl", "sst2/validation.jsonl", "glue/sst2/dev.jsonl"),
        ("trec", "train"): _TREC,
        ("trec", "test"): _TREC,
        ("alpaca_eval", "test"): (
            "alpaca_eval.json",
            "alpaca_eval_text_davinci_003.json",
            "instruct/alpaca_eval_text_davinci_003.json",
        ),
        ("ultrafeedback", "train"): _ULTRAFEEDBACK,
        ("alpaca", "train"): ("alpaca_data_cleaned/train.json", "instruct/alpaca_en_demo.json"),
    }
)


def task_rows(
    name: str, data_dir: str | Path | None, split: Literal["train", "test"]
) -> Iterator[Row]:
    """Yield the rows of a set as their source has them; without a folder, or "hub", the Hub's.

    Raises:
        DataError: the set has no such split there; says where it was looked for.
    """
    if data_dir is None or str(data_dir) == HUB:
        return _hub_rows(name, split)
    root = Path(data_dir).expanduser()
    named = [f"{folder}/{name}/{split}{s}".lstrip("/") for folder in FOLDERS for s in SUFFIXES]
    published = [p.format(split=split) for p in PLACES.get((name, split), ())]
    for place in chain(named, published):
        if (root / place).is_file():
            return iter_rows(root / place)
    looked = [f"{name}/{split}{SUFFIXES[0]}", *published]
    raise DataError(
        f"{name} has no {split} split under {root}: {' or '.join(looked)} does not exist there. "
        f"Put the file there, give another data_dir, or data_dir: {HUB} for the Hub's data set."
    )


def _hub_rows(name: str, split: Literal["train", "test"]) -> Iterator[Row]:
    where = SETS.get(name)
    if where is None or split not in where.splits:
        having = f"the Hub's {where.path} has none" if where else "it is not on the Hub"
        raise DataError(
            f"{name} has no {split} split without a data_dir: {having}. Give data_dir, a folder "
            f"that holds {name}/{split}.json."
        )
    source = f"{where.path}:{where.config}" if where.config else where.path
    there = where.splits[split]
    try:
        if Path(there).suffix in SUFFIXES:
            yield from iter_rows(fetch(where.path, "data set", [there]) / there)
        else:
            yield from iter_rows(source, there)
    except (DataError, RunError) as error:
        raise DataError(
            f"{error} Where there is no Hub, give data.data_dir, a folder that holds "
            f"{name}/{split}.json."
        ) from error

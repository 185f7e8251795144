"""Token data sets and batches."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.errors import ReftConfigError
from reftune.prompts import Encoded, Example
from reftune.tokens import Collator, TokenDataset
from tiny import tiny_tokenizer


def rows(data: TokenDataset) -> list[tuple[list[int], list[int], int]]:
    return [(r["input_ids"].tolist(), r["labels"].tolist(), r["index"]) for r in data]  # type: ignore[attr-defined]


def test_a_row_is_what_was_encoded() -> None:
    data = TokenDataset([Encoded([5, 6, 2], 1), Encoded([7], 1), Encoded([8, 9], 0)])
    assert rows(data) == [([5, 6, 2], [-100, 6, 2], 0), ([7], [-100], 1), ([8, 9], [8, 9], 2)]
    assert (list(data.lengths), list(data.prompt_lengths)) == ([3, 1, 2], [1, 1, 0])
    assert sum(data.lengths) == 6
    assert {type(n) for n in [*data.lengths, *data.prompt_lengths]} == {int}
    assert data[-1]["index"] == 2
    assert data[0]["input_ids"].dtype == data[0]["labels"].dtype == torch.int64
    data[0]["input_ids"].zero_()
    assert data[0]["input_ids"].tolist() == [5, 6, 2], "a row is the caller's own"
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"no example {index}, there are 3"):
            data[index]
    assert rows(TokenDataset([])) == []


def test_a_batch_is_padded_on_the_right_and_masked_by_length() -> None:
    pad = 2  # also eos, which the first row ends with
    data = TokenDataset([Encoded([5, 6, 2], 1), Encoded([7], 1)])
    batch = Collator(pad)([data[index] for index in range(len(data))])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    wide = Collator(pad, pad_to_multiple_of=8)([data[0]])
    assert {tuple(tensor.shape) for tensor in wide.values()} == {(1, 8)}
    assert wide["labels"].tolist() == [[-100, 6, 2, *[-100] * 5]]


def test_a_batch_of_lists_is_one_of_tensors() -> None:
    data = TokenDataset([Encoded([5, 6, 2], 1), Encoded([7], 1)])
    lists: list[Any] = [{k: torch.as_tensor(v).tolist() for k, v in row.items()} for row in data]  # type: ignore[attr-defined]
    for name, tensor in Collator(0)([data[0], data[1]]).items():
        assert torch.equal(tensor, Collator(0)(lists)[name])


def test_a_batch_can_say_which_examples_it_holds() -> None:
    data = TokenDataset([Encoded([5, 6], 1), Encoded([7], 1), Encoded([8], 1)])
    batch = Collator(0, with_index=True)([data[2], data[0]])
    assert batch["index"].tolist() == [2, 0]
    assert batch["index"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_torch_data_loader_takes_both(workers: int, tmp_path: Path) -> None:
    examples = [Example("hi", "there")] * 3
    data = TokenDataset.from_examples(examples, tiny_tokenizer(), cache_dir=tmp_path)
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, collate_fn=Collator(0, with_index=True), num_workers=workers
    )
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2]]


def test_a_selection_is_numbered_anew() -> None:
    data = TokenDataset([Encoded([i] * (1 + i), i - i // 3) for i in range(5)])
    assert rows(data.select([3, 1])) == [([3] * 4, [-100, -100, 3, 3], 0), ([1, 1], [-100, 1], 1)]
    assert list(data.select([3, 1]).select([1]).lengths) == [2]


def test_a_split_is_deterministic_and_complete() -> None:
    data = TokenDataset([Encoded([index], 0) for index in range(20)])
    kept, apart = data.split(0.25, seed=1)
    chosen = sorted(random.Random(1).sample(range(20), 5))
    assert [r[0][0] for r in rows(apart)] == chosen
    assert [r[0][0] for r in rows(kept)] == [i for i in range(20) if i not in chosen]
    assert rows(apart) != rows(data.split(0.25, seed=2)[1])
    for fraction in (0, 1, 0.01, -0.5):
        with pytest.raises(ReftConfigError, match="cannot be set apart"):
            data.split(fraction, seed=1)


@pytest.mark.parametrize("named", [True, False])
def test_a_pickled_data_set_is_the_same_and_leaves_the_tokens_in_the_file(
    named: bool, tmp_path: Path
) -> None:
    examples = [Example("x" * 500, str(i)) for i in range(40)]
    where = tmp_path if named else None
    data = TokenDataset.from_examples(examples, tiny_tokenizer(), max_length=600, cache_dir=where)
    half = data.select(range(0, 40, 2))
    assert rows(pickle.loads(pickle.dumps(data))) == rows(data)
    assert rows(pickle.loads(pickle.dumps(half))) == rows(half)
    assert (len(pickle.dumps(half)) < sum(data.lengths)) == named

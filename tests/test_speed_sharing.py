"""Beginnings that a batch shares, and rows that modules share, are computed once: same learning."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from reftune import ReftConfig
from reftune.positions import SlotKey, assign_slots
from reftune.speed.batches import first_alike, real_rows
from reftune.speed.frozen import edited_alike
from reftune.speed.plan import Shortcuts, choose
from reftune.speed.training import difference, taking
from reftune.speed.unread import Rows
from reftune.tokens import TokenRow
from reftune.train import TrainSettings
from speed_tiny import COLLATOR, described
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SHARING = Shortcuts(on=True, unread=True, padding=True, sharing=True)
BEGINNINGS = (list(range(10, 22)), list(range(30, 40)))


def rows() -> list[TokenRow]:
    """Return eight examples: two beginnings, of different lengths, and a short prompt."""
    found = []
    for i in range(8):
        beginning = BEGINNINGS[i % 2][: 5 + i]
        ids = torch.tensor(beginning + [50 + 7 * i + j for j in range(3 + 2 * (i % 3))])
        labels = ids.clone()
        labels[: 3 if i == 0 else len(ids) - 2] = -100
        found.append(TokenRow(input_ids=ids, labels=labels, index=i))
    return found


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("positions", ["f2+l2", "f3", "l2"])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_loss_and_gradients_are_the_models_own(tied, positions, layers) -> None:
    config = ReftConfig(task_type="CAUSAL_LM", r=2, layers=layers, positions=positions, tied=tied)
    model = get_peft_model(tiny_llama(), config).double()
    assert difference(described(model), SHARING, model, COLLATOR, rows()) is None
    with taking(described(model), SHARING, COLLATOR) as step:
        batch = step.collate(rows())
    assert "place" in batch
    assert len(batch["real"]) < sum(len(row["input_ids"]) - 1 for row in rows())


def test_what_is_shared_is_what_begins_alike() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [7, 2, 3, 4], [1, 2, 3, 4]])
    expected = [[0, 1, 2, 3], [0, 1, 6, 7], [8, 9, 10, 11], [0, 1, 2, 15]]
    assert first_alike(ids, [4, 4, 4, 3]).tolist() == expected


def test_every_row_is_a_copy_of_one_with_its_tokens_before_it() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 2, (12, 9))
    lengths = torch.randint(1, 10, (12,)).tolist()
    first = first_alike(ids, lengths)
    found = real_rows(lengths, first)
    for b, length in enumerate(lengths):
        for t in range(length):
            copied = int(found["real"][found["place"][b * 9 + t]])
            assert copied % 9 == t
            assert torch.equal(ids[copied // 9, : t + 1], ids[b, : t + 1])


@pytest.mark.parametrize("positions", ["f3+l4", "f3", "l4", "all"])
@pytest.mark.parametrize("rule", ["paper", "pyreft"])
def test_alike_are_tokens_whose_slot_no_length_changes(positions: str, rule: str) -> None:
    config = ReftConfig(r=2, positions=positions, short_prompts=rule)
    key = SlotKey(config.parsed_positions, rule)

    def slots(n: int) -> Tensor:
        if config.parsed_positions.everything:
            return torch.zeros(n)
        p, s = key.counts
        prompt = torch.ones(1, n, dtype=torch.bool)
        return assign_slots(prompt, p, s, suffix_start=p, empty=9, rule=rule)[0]

    lengths = torch.arange(1, 20)
    alike = edited_alike(lengths, config).tolist()
    longest = slots(40)
    for n, count in zip(lengths.tolist(), alike, strict=True):
        assert slots(n)[:count].tolist() == longest[:count].tolist()
    assert alike[-1] >= 15


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, True),
        ({"dropout": 0.1}, False),
        ({"method": "reft_r1", "r": 1}, False),
    ],
)
def test_edits_that_are_random_or_pool_are_not_shared(changes, shares, tmp_path) -> None:
    config = ReftConfig(task_type="CAUSAL_LM", **{"r": 2, "positions": "f2+l2", **changes})
    model = get_peft_model(tiny_llama(), config)
    seen = described(model)
    chosen = choose(
        seen,
        model,
        TrainSettings(),
        lengths=torch.tensor([9, 12]),
        prompt_lengths=torch.tensor([6, 8]),
        epochs=1,
        gradient_checkpointing=False,
        device=torch.device("cpu"),
        folder=tmp_path,
    )
    assert chosen.sharing is shares


def test_rows_are_picked_anew_where_the_tensor_or_what_is_asked_of_it_changed() -> None:
    rows = Rows()
    rows.set(torch.tensor([0, 2]), None)
    x = torch.arange(6.0).view(1, 3, 2)
    first = rows.pick(x)
    assert rows.pick(x) is first
    x.requires_grad_()
    assert rows.pick(x).requires_grad
    with torch.no_grad():
        assert not rows.pick(x).requires_grad
    x.detach().mul_(2)
    assert rows.pick(x)[0, 1, 1].item() == 10
    with torch.no_grad():
        rows.pick(x).zero_()  # a module that changes its input in place
        assert rows.pick(x)[0, 1, 1].item() == 10
    with torch.inference_mode():
        assert rows.pick(torch.ones(1, 3, 2)).shape == (1, 2, 2)

"""Position strings and slots, against loops over tokens."""

import itertools

import pytest
import torch
from torch import Tensor

from reftune import PositionError, Positions
from reftune.positions import (
    SHORT_PROMPTS,
    TIED,
    assign_slots,
    before_first_label,
    segment_ids,
    side_lengths,
    slots_to_rows,
    take_columns,
)

B, T = 6, 13


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f7+l7", Positions(7, 7)),
        ("f3", Positions(3, 0)),
        ("l1", Positions(0, 1)),
        ("f10+l2", Positions(10, 2)),
        ("all", Positions(everything=True)),
    ],
)
def test_text_is_parsed_and_written(text: str, expected: Positions) -> None:
    assert Positions.parse(text) == expected
    assert str(expected) == text


def test_order_and_spaces_do_not_matter() -> None:
    assert Positions.parse("l2 + f1") == Positions(1, 2)


@pytest.mark.parametrize(
    "text",
    ["", "f", "7", "f0", "l0", "f1+f2", "f1+l0", "f-1", "f1.5", "first", "f1+", "F1", "all+f1"],
)
def test_other_text_is_an_error(text: str) -> None:
    with pytest.raises(PositionError) as error:
        Positions.parse(text)
    assert repr(text) in str(error.value)
    assert "'f7+l7'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "groups"),
    [("f2+l3", (1, 2, 5)), ("f2", (1, 1, 2)), ("l3", (1, 1, 3)), ("all", (1, 1, 1))],
)
def test_number_of_groups(text: str, groups: tuple[int, ...]) -> None:
    assert tuple(Positions.parse(text).num_groups(tied) for tied in TIED) == groups


def naive_sides(n: int, p: int, s: int, rule: str) -> tuple[int, int]:
    if rule == "pyreft":
        return min(n // 2, p), min(n // 2, s)
    if rule == "overlap":
        return len(set(range(p)) & set(range(n - min(s, n)))), min(s, n)
    if n < p + s:
        return min(p, n // 2), min(s, n - n // 2)
    return p, s


@pytest.mark.parametrize("rule", SHORT_PROMPTS)
@pytest.mark.parametrize(("p", "s"), list(itertools.product((0, 1, 3, 7), (0, 1, 4, 7))))
def test_short_prompts(p: int, s: int, rule: str) -> None:
    n = torch.arange(21)
    got = torch.stack(side_lengths(n, p, s, rule), dim=-1).tolist()
    assert got == [list(naive_sides(i, p, s, rule)) for i in range(21)]
    if rule == "paper":
        assert all(a + b <= i for i, (a, b) in enumerate(got)), "no token is edited twice"


def naive_slots(
    prompt: Tensor, segments: Tensor, sides: list[tuple[int, int]], rule: str
) -> Tensor:
    """Number each sequence's prompt tokens; `sides` are the prefix and suffix of each row."""
    start, empty = max(p for p, _ in sides), max(p for p, _ in sides) + max(s for _, s in sides)
    slots = torch.full(prompt.shape, empty)
    for b, sequence in itertools.product(range(len(prompt)), range(int(segments.max()) + 1)):
        columns = [t for t in range(prompt.shape[1]) if prompt[b, t] and segments[b, t] == sequence]
        n = len(columns)
        p, s = naive_sides(n, *sides[b], rule)
        for i in range(s):
            slots[b, columns[n - s + i]] = start + i
        for i in range(p):
            slots[b, columns[i]] = i
    return slots


def masks(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaps":
        return torch.rand(B, T, generator=generator) < 0.5
    n = torch.randint(0, T + 1, (B, 1), generator=generator)
    column = torch.arange(T)
    return column < n if kind == "right" else column >= T - n


@pytest.mark.parametrize("rule", SHORT_PROMPTS)
@pytest.mark.parametrize("kind", ["left", "right", "gaps"])
@pytest.mark.parametrize(("p", "s"), [(2, 3), (3, 0), (0, 2), (7, 7)])
def test_slots_equal_the_loop(p: int, s: int, kind: str, rule: str) -> None:
    for seed in range(5):
        prompt = masks(kind, seed)
        got = assign_slots(prompt, p, s, suffix_start=p, empty=p + s, rule=rule)
        expected = naive_slots(prompt, torch.zeros(B, T).long(), [(p, s)] * B, rule)
        assert torch.equal(got, expected)


def test_slots_with_counts_per_row() -> None:
    sides = [(2, 3), (1, 0), (0, 0), (0, 2), (3, 3), (1, 1)]
    p, s = (torch.tensor(counts)[:, None] for counts in zip(*sides, strict=True))
    for seed in range(5):
        prompt = masks("gaps", seed)
        got = assign_slots(prompt, p, s, suffix_start=3, empty=6, rule="paper")
        assert torch.equal(got, naive_slots(prompt, torch.zeros(B, T).long(), sides, "paper"))


def packed_ids(seed: int) -> Tensor:
    """Return position ids of rows into which sequences of 1 to 5 tokens are packed."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(B):
        lengths = torch.randint(1, 6, (T,), generator=generator).tolist()
        rows.append([i for n in lengths for i in range(n)][:T])
    return torch.tensor(rows)


@pytest.mark.parametrize("rule", SHORT_PROMPTS)
def test_packed_sequences_each_have_a_prompt(rule: str) -> None:
    for seed in range(5):
        ids = packed_ids(seed)
        segments = segment_ids(ids)
        expected = (ids == 0).long().cumsum(-1) - 1
        assert torch.equal(segments, expected)
        prompt = masks("gaps", seed)
        got = assign_slots(prompt, 2, 1, suffix_start=2, empty=3, rule=rule, segments_BT=segments)
        assert torch.equal(got, naive_slots(prompt, segments, [(2, 1)] * B, rule))


@pytest.mark.parametrize("packed", [False, True])
def test_before_first_label(packed: bool) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 9, (B, T), generator=generator)
        labels[torch.rand(B, T, generator=generator) < 0.7] = -100
        labels[0] = -100
        segments = segment_ids(packed_ids(seed)) if packed else None
        got = before_first_label(labels, segments)
        of = torch.zeros(B, T).long() if segments is None else segments
        for b, t in itertools.product(range(B), range(T)):
            earlier = [labels[b, u] for u in range(t + 1) if of[b, u] == of[b, t]]
            assert got[b, t] == all(label == -100 for label in earlier)


@pytest.mark.parametrize("kind", ["left", "right", "gaps"])
def test_rows_point_at_the_tokens_of_the_slots(kind: str) -> None:
    prompt, K = masks(kind, 3), 5
    slot = assign_slots(prompt, 2, 3, suffix_start=2, empty=K, rule="paper")
    rows = slots_to_rows(slot, K)
    h = torch.randn(B, T, 4, generator=torch.Generator().manual_seed(0))
    gathered = rows.gather(h)
    expected = h.clone()
    for b, k in itertools.product(range(B), range(K)):
        columns = [t for t in range(T) if slot[b, t] == k]
        assert rows.valid[b, k] == bool(columns)
        if columns:
            assert rows.index[b, k] == b * T + columns[0]
            assert torch.equal(gathered[b, k], h[b, columns[0]])
            expected[b, columns[0]] += 10 * b + k
    edit = torch.arange(B)[:, None] * 10.0 + torch.arange(K)
    edit = torch.where(rows.valid, edit, 0.0)[..., None].expand(B, K, 4)
    assert torch.equal(rows.add(h, edit), expected)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("past", [0, 1, 5, T - 1, T, T + 4])
@pytest.mark.parametrize("length", [1, 4, T])
def test_take_columns(past: int, length: int, as_tensor: bool) -> None:
    slot, empty = torch.arange(B * T).view(B, T), 999
    got = take_columns(slot, torch.tensor(past) if as_tensor else past, length, empty)
    wanted = range(past, past + length)
    assert got.tolist() == [[r[t] if t < T else empty for t in wanted] for r in slot.tolist()]

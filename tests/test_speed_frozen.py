"""Frozen states are computed once, kept within limits, never stale, and never another example's."""

import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reftune import reft_layers
from reftune.positions import Positions, SlotKey
from reftune.speed import plan
from reftune.speed.frozen import States, Store, _free_below, _free_in_group, first_edited
from reftune.speed.plan import Shortcuts, SpeedSettings, choose, padding_share
from reftune.speed.training import Step, taking
from speed_tiny import (
    COLLATOR,
    GiB,
    adapted,
    assert_same,
    described,
    frozen,
    nothing_left,
    oracle,
    rows,
    stepped,
)
from test_speed import CAUSAL

pytestmark = [
    # PEFT 0.21 and transformers 5.23 rename gradient checkpointing, each at its own pace.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # torch.utils.checkpoint asks the CPU for a device context that it deprecates itself.
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

SHAPES = [(3, 2), (9, 4), (1, 3), (14, 9), (2, 1), (7, 7), (20, 1), (5, 5)]
FIRST, DEPTH = 1, 3


def llama(**settings: Any) -> PeftModel:
    return adapted(CAUSAL["llama"].make(), **{"layers": [FIRST], **settings})


def reusing(model: nn.Module, store: Store | None, heads: bool = True) -> Shortcuts:
    return Shortcuts(on=True, frozen=frozen(model, store), heads=heads)


def batches(size: int, seed: int) -> Iterator[list[Any]]:
    """Yield all examples in batches, in an order of their own for each seed."""
    examples = rows(SHAPES)
    random.Random(seed).shuffle(examples)
    for at in range(0, len(examples), size):
        yield examples[at : at + size]


def hits(step: Step) -> int:
    assert step.frozen is not None
    return step.frozen.hits


# --- the store ----------------------------------------------------------------------------------


def states(dtype: torch.dtype = torch.float32, tokens: int = 5, head: int | None = 3) -> States:
    keys = None if head is None else torch.randn(4, 2, head, 8).to(dtype)
    return States(torch.randn(tokens, 16).to(dtype), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [None, 0, 3])
@pytest.mark.parametrize("memory", [0, 700, GiB])
def test_a_store_gives_back_what_was_put(dtype, head, memory, tmp_path) -> None:
    store = Store(memory, GiB, tmp_path)
    kept = {number: states(dtype, tokens=number + 1, head=head) for number in range(5)}
    for number, one in kept.items():
        store.put(number, one)
        store.put(number, states())  # it has one
    assert len(store) == 5
    for number in (3, 0, 4, 1, 2):
        assert torch.equal(store[number].hidden, kept[number].hidden)
        assert store[number].hidden.dtype is dtype
        keys, expected = store[number].keys, kept[number].keys
        assert (keys is None) == (expected is None)
        assert keys is None or torch.equal(keys, expected)
    store.close()
    assert 3 not in store


@pytest.mark.parametrize(
    ("memory", "disk", "count"), [(0, 0, 0), (2, 0, 2), (0, 3, 3), (2, 3, 5), (9, 9, 10)]
)
def test_a_store_keeps_to_its_limits(memory, disk, count, tmp_path) -> None:
    one = states()
    store = Store(memory * one.nbytes + 1, disk * one.nbytes + 1, tmp_path)
    for _ in range(2):  # what was forgotten makes room
        for number in range(10):
            store.put(number, states())
        assert len(store) == count
        assert store._file is None or store._file.seek(0, 2) <= disk * one.nbytes
        store.clear()
        assert len(store) == 0
    store.close()


def test_a_store_goes_on_where_it_cannot_write(tmp_path, caplog) -> None:
    store = Store(0, GiB, tmp_path / "nowhere")
    store.put(0, states())
    store.put(1, states())
    assert len(store) == 0
    assert caplog.text.count("No more frozen states are kept on disk") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_at_once(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr(
        "tempfile.TemporaryFile",
        lambda dir, **given: open("/dev/full", "r+b", **given),  # noqa: SIM115
    )
    store = Store(0, GiB, tmp_path)
    store.put(0, states())
    assert 0 not in store
    assert "No space left" in caplog.text
    store.close()


class FullFile:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        count = min(len(data), self.room)
        self.room -= count
        return int(self.file.write(data[:count]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path, caplog) -> None:
    kept = [states() for _ in range(4)]
    store = Store(0, GiB, tmp_path)
    store.put(0, kept[0])
    store._file = FullFile(store._file, room=2 * kept[0].nbytes + 10)
    for number in (1, 2, 3):
        store.put(number, kept[number])
    assert [number in store for number in range(4)] == [True, True, True, False]
    assert "no room" in caplog.text
    for number in range(3):
        assert torch.equal(store[number].hidden, kept[number].hidden)
    store.close()


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open, also those without a name."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return []
    links = [str(one.readlink()) for one in descriptors.iterdir() if one.is_symlink()]
    return [link for link in links if link.startswith(str(folder))]


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("error", [None, BrokenError, KeyboardInterrupt])
def test_the_file_is_gone_however_training_ends(error, tmp_path) -> None:
    model = llama()
    store = Store(0, GiB, tmp_path)
    try:
        with nothing_left(model), taking(described(model), reusing(model, store), COLLATOR) as step:
            stepped(model, step, rows(SHAPES))
            assert len(store) == len(SHAPES)
            assert len(open_files(tmp_path)) == Path("/proc/self/fd").is_dir()
            if error is not None:
                raise error
    except (BrokenError, KeyboardInterrupt):
        pass
    assert len(store) == 0
    assert open_files(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- epochs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["l1", "l4", "f1+l1", "all"])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_later_epochs_reuse_every_batch_however_it_is_shuffled(
    positions, heads, where, tmp_path
) -> None:
    model = llama(positions=positions)
    store = Store(GiB) if where == "memory" else Store(0, GiB, tmp_path)
    with taking(described(model), reusing(model, store, heads), COLLATOR) as step:
        for epoch in range(3):
            before = hits(step)
            for examples in batches(size=3, seed=epoch):
                assert_same(stepped(model, step, examples), oracle(model, examples))
            assert hits(step) - before == (3 if epoch else 0)


def test_without_room_nothing_is_kept_and_all_is_right(tmp_path) -> None:
    model = llama()
    for store in (Store(0), Store(1, 1, tmp_path), None):
        with taking(described(model), reusing(model, store), COLLATOR) as step:
            for epoch in range(2):
                for examples in batches(size=3, seed=epoch):
                    assert_same(stepped(model, step, examples), oracle(model, examples))
            assert hits(step) == 0


def test_with_little_room_batches_that_are_kept_are_reused(tmp_path) -> None:
    model = llama()
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        stepped(model, step, rows(SHAPES))
        store = step.frozen.store  # type: ignore[union-attr]
        sizes = [store[i].nbytes for i in range(len(SHAPES))]
    limits = sizes[0] + sizes[1], sizes[2] + sizes[3] + sizes[4]
    with taking(described(model), reusing(model, Store(*limits, tmp_path)), COLLATOR) as step:
        kept = set()
        for number, one in enumerate(rows(SHAPES)):
            stepped(model, step, [one])
            store = step.frozen.store  # type: ignore[union-attr]
            kept |= {number} if number in store else set()
        assert 2 <= len(store._memory) < len(store) < len(SHAPES)
        for epoch in range(4):
            for examples in batches(size=2, seed=epoch):
                before = hits(step)
                assert_same(stepped(model, step, examples), oracle(model, examples))
                kept |= {one["index"] for one in examples if one["index"] in store}
                all_kept = {one["index"] for one in examples} <= kept
                assert hits(step) - before == all_kept


def test_states_are_those_of_the_example_and_not_of_its_place() -> None:
    """Two examples of one length: were they mixed up, nothing but the numbers would tell."""
    model, examples = llama(), rows([(6, 3), (6, 3), (6, 3)])
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        stepped(model, step, examples)
        for order in ([2, 0, 1], [1], [0, 0], [2, 1]):
            chosen = [examples[i] for i in order]
            assert_same(stepped(model, step, chosen), oracle(model, chosen))
        assert hits(step) == 4


class Calls:
    """Counts how many rows the MLP of each layer computes."""

    def __init__(self, model: PeftModel) -> None:
        self.rows = [0] * DEPTH
        for number, layer in enumerate(described(model).layers):
            layer.mlp.register_forward_pre_hook(partial(self._count, number))

    def _count(self, number: int, module: nn.Module, given: tuple[Tensor]) -> None:
        self.rows[number] += given[0].shape[:-1].numel()

    def of(self, run: Any) -> list[int]:
        self.rows = [0] * DEPTH
        run()
        return list(self.rows)


def test_what_is_reused_is_not_computed() -> None:
    model = llama(positions="l1")
    calls, examples = Calls(model), rows([(9, 4), (6, 4)])
    whole, tail, longest_head = 2 * 12, 2 * 4, 8
    assert calls.of(lambda: oracle(model, examples)) == [2 * 13] * 3
    with taking(described(model), reusing(model, Store(GiB), heads=False), COLLATOR) as step:
        assert calls.of(lambda: stepped(model, step, examples)) == [whole] * 3
        for _ in range(2):
            assert calls.of(lambda: stepped(model, step, examples)) == [0, 0, whole]
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        assert calls.of(lambda: stepped(model, step, examples)) == [2 * longest_head + tail] * 3
        for _ in range(2):
            assert calls.of(lambda: stepped(model, step, examples)) == [0, 0, tail]


def test_a_beginning_that_is_shared_is_computed_once_for_a_batch() -> None:
    model, examples = llama(positions="l1"), rows([(9, 4), (6, 4), (9, 4)])
    for one in examples:
        one["input_ids"][:4] = torch.tensor([10, 11, 12, 13])
    calls = Calls(model)
    with taking(described(model), reusing(model, None), COLLATOR) as step:
        results: list[Any] = []
        computed = calls.of(lambda: results.append(stepped(model, step, examples)))
    assert_same(results[0], oracle(model, examples))
    assert computed == [4 + 3 * (8 - 4) + 3 * 4] * 3


# --- what makes states stale --------------------------------------------------------------------


def add_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(1.5)


def replace_parameter(layer: nn.Module) -> None:
    weight = layer.mlp.up_proj.weight.detach() * 1.5
    layer.mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


def replace_data(layer: nn.Module) -> None:
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * 1.5


def load(layer: nn.Module) -> None:
    layer.mlp.load_state_dict({k: v * 1.5 for k, v in layer.mlp.state_dict().items()})


def test_padding_that_is_left_out_is_worth_more_than_compilation(monkeypatch, tmp_path) -> None:
    model = llama(positions="f2+l2")
    monkeypatch.setattr(plan, "MINUTES_TO_COMPILE", 0)
    alike, unlike = torch.full((64,), 40), torch.tensor([10, 70] * 32)

    def compiled(lengths: Tensor, grouped: bool, **settings: Any) -> bool:
        chosen = choose(
            described(model),
            model,
            SpeedSettings(**settings),
            lengths=lengths,
            prompt_lengths=lengths - 2,
            epochs=1,
            gradient_checkpointing=False,
            device=torch.device("cuda"),
            folder=tmp_path,
            padding=padding_share(lengths, 8, grouped),
        )
        assert chosen.padding != chosen.compile
        assert chosen.sharing == chosen.padding
        return chosen.compile

    assert padding_share(unlike, 8, grouped=True) == 0
    assert padding_share(unlike, 8, grouped=False) > 0.3
    assert padding_share(alike[:3], 8, grouped=False) == 0
    assert compiled(alike, grouped=False)
    assert compiled(unlike, grouped=True)
    assert not compiled(unlike, grouped=False)
    assert compiled(unlike, grouped=False, compile=True), "who asks for it gets it"


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_is_the_memory_that_is_free(tmp_path, version) -> None:
    group = tmp_path / ("memory" if version == 1 else "")
    limit, usage, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("memory.max", "memory.current", "inactive_file"),
    )[version - 1]
    assert _free_below(group, limit, usage, cached + " ") == math.inf
    group.mkdir(exist_ok=True)
    (group / usage).write_text("700\n")
    (group / "memory.stat").write_text(f"active_file 9\n{cached} 200\nanon 5\n")
    (group / limit).write_text("max\n")
    assert _free_below(group, limit, usage, cached + " ") == math.inf
    (group / limit).write_text("1000\n")
    assert _free_below(group, limit, usage, cached + " ") == 500
    assert _free_in_group(tmp_path) == 500


def test_an_accelerator_is_not_brought_what_was_kept_unless_asked(tmp_path) -> None:
    model = llama(positions="l2")
    lengths, prompts = torch.full((4,), 40), torch.full((4,), 38)

    def stored(reuse: Any, device: str) -> bool:
        chosen = choose(
            described(model),
            model,
            SpeedSettings(reuse=reuse),
            lengths=lengths,
            prompt_lengths=prompts,
            epochs=3,
            gradient_checkpointing=False,
            device=torch.device(device),
            folder=tmp_path,
        )
        assert chosen.heads, "what precedes the edits needs no backward, wherever it is computed"
        return chosen.frozen is not None and chosen.frozen.store is not None

    assert stored("auto", "cpu")
    assert stored(True, "cuda")
    assert not stored("auto", "cuda")


@pytest.mark.parametrize("change", [add_in_place, replace_parameter, replace_data, load])
@pytest.mark.parametrize("number", [0, FIRST, 2])
def test_a_changed_base_makes_them_stale(change, number) -> None:
    model, examples = llama(positions="l2"), rows(SHAPES)
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        stepped(model, step, examples)
        before = stepped(model, step, examples)
        for times in (1, 2):
            change(described(model).layers[number])
            expected = oracle(model, examples)
            assert abs(expected[0] - before[0]) > 1e-4
            for _ in range(2):
                assert_same(stepped(model, step, examples), expected)
            assert hits(step) == 1 + times


def test_a_step_of_the_optimizer_makes_nothing_stale() -> None:
    model, examples = llama(), rows(SHAPES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        for number in range(4):
            expected = oracle(model, examples)
            batch = step.before(step.collate(examples))
            loss = model(**batch).loss
            step.after()
            torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert hits(step) == number


@pytest.mark.parametrize(("before", "after"), [("l1", "l3"), ("l3", "f1"), ("f1", "l1")])
def test_other_positions_make_them_stale(before, after) -> None:
    model, examples = llama(positions=before), rows(SHAPES)
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        for _ in range(2):
            stepped(model, step, examples)
        for layer in reft_layers(model).values():
            layer.configs["default"].positions = after
            layer.keys["default"] = SlotKey(Positions.parse(after))
        expected = oracle(model, examples)
        for _ in range(2):
            assert_same(stepped(model, step, examples), expected)
        assert hits(step) == 2


@pytest.mark.parametrize(
    ("positions", "rule", "starts"),
    [
        ("l2", "paper", [0, 0, 1, 2, 8]),
        ("l2", "pyreft", [0, 1, 2, 2, 8]),
        ("f1", "paper", [0, 0, 0, 0, 0]),
        ("f1+l2", "paper", [0, 0, 0, 0, 0]),
        ("all", "paper", [0, 0, 0, 0, 0]),
    ],
)
def test_the_first_edited_token(positions, rule, starts) -> None:
    """A prompt that has none, by pyreft's rule, begins with its last token, which predicts one."""
    config = described(llama(positions=positions, short_prompts=rule)).config
    assert first_edited(torch.tensor([1, 2, 3, 4, 10]), config).tolist() == starts
    assert first_edited(torch.tensor([0]), config).tolist() == [0]


# --- what else happens within a step ------------------------------------------------------------


class CheckpointedWithHooks(LlamaDecoderLayer):
    """Checkpoints its hooks, too, as layers of older transformers and of other libraries do."""

    def __call__(self, h: Tensor, **kwargs: Any) -> Any:
        return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), h)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_hooks", [False, True])
def test_with_gradient_checkpointing(use_reentrant, with_hooks) -> None:
    model, examples = llama(), rows(SHAPES)
    expected = oracle(model, examples)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for layer in described(model).layers if with_hooks else ():
        layer.__class__ = CheckpointedWithHooks
    with taking(described(model), reusing(model, Store(GiB), heads=False), COLLATOR) as step:
        for _ in range(3):
            batch = step.before(step.collate(examples))
            loss = model(**batch).loss
            step.after()
            model.zero_grad()
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            assert_same((loss.detach(), grads), expected)
        assert hits(step) == 2


def test_with_gradient_checkpointing_nothing_below_is_computed_again() -> None:
    """PEFT lets the embeddings require a gradient then, and with them every layer."""
    model, examples = llama(layers=[2]), rows([(9, 4), (6, 4)])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls = Calls(model)

    def step_of(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()

    computed = 2 * 13
    assert calls.of(lambda: step_of(COLLATOR(examples))) == [2 * computed] * 3
    computed = 2 * 12
    with taking(described(model), reusing(model, None, heads=False), COLLATOR) as step:
        given = step.before(step.collate(examples))
        assert calls.of(lambda: step_of(given)) == [computed, computed, 2 * computed]


def test_a_forward_that_fails_leaves_nothing_for_the_next(monkeypatch) -> None:
    model, examples = llama(), rows(SHAPES)
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        for _ in range(2):
            stepped(model, step, examples[:4])
        known, unknown = examples[:4], (examples[4:6], examples[6:])
        for failing, following in ((known, unknown[0]), (unknown[1], unknown[1])):
            with monkeypatch.context() as patch:
                patch.setattr("reftune.speed.training.linear_cross_entropy", None)
                with pytest.raises(TypeError):
                    stepped(model, step, failing)
            for _ in range(2):
                assert_same(stepped(model, step, following), oracle(model, following))


def test_other_forwards_between_steps_change_nothing() -> None:
    model, examples = llama(), rows(SHAPES)
    ids = torch.arange(6, 14)[None]
    with torch.no_grad():
        alone = model(ids).logits
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        for _ in range(3):
            assert_same(stepped(model, step, examples), oracle(model, examples))
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, alone)
            model.generate(ids, do_sample=False, max_new_tokens=2)


def test_two_forwards_before_a_backward() -> None:
    model, parts = llama(), (rows(SHAPES)[:4], rows(SHAPES)[4:])
    expected = [oracle(model, part) for part in parts]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with taking(described(model), reusing(model, Store(GiB)), COLLATOR) as step:
        for _ in range(2):
            losses = []
            for part in parts:
                losses.append(model(**step.before(step.collate(part))).loss)
                step.after()
            grads = torch.autograd.grad(losses[0] + 2 * losses[1], list(named.values()))
            total = losses[0].detach() + 2 * losses[1].detach()
            wanted = {n: expected[0][1][n] + 2 * expected[1][1][n] for n in named}
            assert_same(
                (total, dict(zip(named, grads, strict=True))),
                (expected[0][0] + 2 * expected[1][0], wanted),
            )

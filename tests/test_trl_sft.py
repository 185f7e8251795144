"""SFTTrainer with `peft_config=ReftConfig(...)`: the rows that are edited are the prompts'."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from reftune import PositionError
from tiny import tiny_llama
from trl_tiny import (
    FILTERS,
    GOOD,
    PROMPTS,
    QUIET,
    chat_tokenizer,
    config,
    places,
    spied,
    summed_logps,
    tokens,
)

pytestmark = FILTERS

COMPLETION = Dataset.from_dict({"prompt": list(PROMPTS), "completion": list(GOOD)})
CONVERSATION = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(PROMPTS, GOOD, strict=True)
    ]
)
TEXT = Dataset.from_dict({"text": [q + a for q, a in zip(PROMPTS, GOOD, strict=True)]})
SEVERAL = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": "Hello there"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "And now"},
                {"role": "assistant", "content": "Bye"},
            ]
        }
    ]
    * 2
)


def trainer(tmp_path: Path, data: Dataset, reft: Any = None, **more: Any) -> SFTTrainer:
    made_by = {
        k: more.pop(k) for k in ("compute_metrics", "compute_loss_func", "model") if k in more
    }
    return SFTTrainer(
        **{
            "model": tiny_llama(),
            "args": SFTConfig(str(tmp_path), **{**QUIET, "max_length": None, **more}),
            "train_dataset": data,
            "processing_class": chat_tokenizer(),
            "peft_config": None if "model" in made_by else reft or config(),
            **made_by,
        }
    )


def prompt_of(ids: list[int], told: dict[tuple[int, ...], int]) -> int:
    """Return how long the prompt is that these tokens begin with."""
    found = [n for prompt, n in told.items() if tuple(ids[:n]) == prompt]
    assert len(found) == 1
    return found[0]


def lengths(form: str) -> dict[tuple[int, ...], int]:
    written = [tuple(tokens(form.format(q))) for q in PROMPTS]
    return {prompt: len(prompt) for prompt in written}


@pytest.mark.parametrize(
    ("data", "form", "more"),
    [
        (COMPLETION, "{}", {}),
        (CONVERSATION, "u:{};a:", {"assistant_only_loss": True}),
    ],
)
def test_padded_rows(data: Dataset, form: str, more: dict[str, Any], tmp_path: Path) -> None:
    sft = trainer(tmp_path, data, per_device_train_batch_size=4, **more)
    with spied(sft.model) as calls:
        sft.train()
    assert len(calls) == 1
    seen = calls[0].rows()
    assert len(seen) == 4
    for ids, edited in seen:
        assert edited == places(prompt_of(ids, lengths(form)))


@pytest.mark.parametrize(
    "more", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}]
)
@pytest.mark.parametrize("form", ["completion", "messages"])
def test_rows_of_several_texts(form: str, more: dict[str, Any], tmp_path: Path) -> None:
    data, written = (COMPLETION, "{}") if form == "completion" else (CONVERSATION, "u:{};a:")
    sft = trainer(
        tmp_path,
        data,
        assistant_only_loss=form == "messages",
        per_device_train_batch_size=4,
        **more,
    )
    with spied(sft.model) as calls:
        sft.train()
    texts = 0
    for ids, edited in (row for call in calls for row in call.rows()):
        ends = [i + 1 for i, token in enumerate(ids) if token == 2]  # each text ends with </s>
        expected = []
        for start, end in zip([0, *ends], ends, strict=False):
            expected += places(prompt_of(ids[start:end], lengths(written)), start)
            texts += 1
        assert edited == expected
    assert texts == 4


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True, "max_length": 128}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packing", "padding-free"],
)
def test_the_loss_is_that_of_each_text_alone_with_its_prompt_told(
    more: dict[str, Any], tmp_path: Path
) -> None:
    sft = trainer(tmp_path, COMPLETION, per_device_train_batch_size=4, **more)
    texts = [(q, f"{a}</s>") for q, a in zip(PROMPTS, GOOD, strict=True)]
    with torch.no_grad():
        total = sum(summed_logps(sft.model, *text) for text in texts)
    # In packed rows the first token of a text is no label; in these the prompt's first is none.
    expected = -total / sum(len(tokens(completion)) for _, completion in texts)
    sft.train()
    assert sft.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=2e-4)


def test_checkpointing_and_saving_change_nothing(tmp_path: Path) -> None:
    trained = []
    for on in (True, False):
        sft = trainer(tmp_path / str(on), COMPLETION, gradient_checkpointing=on, max_steps=3)
        sft.train()
        trained.append(sft)
    losses = [[e["loss"] for e in sft.state.log_history if "loss" in e] for sft in trained]
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]
    trained[0].save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "True").eval()
    ids = torch.tensor([tokens("What is it?")])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained[0].model.eval()(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
@pytest.mark.parametrize(
    ("data", "more"),
    [
        (TEXT, {}),
        (TEXT, {"padding_free": True}),
        (TEXT, {"packing": True, "max_length": 64}),
        (CONVERSATION, {}),
        (COMPLETION, {"completion_only_loss": False}),
        (COMPLETION, {"max_length": 3, "truncation_mode": "keep_end"}),
        (COMPLETION, {"max_length": 10, "packing": True, "packing_strategy": "bfd_split"}),
    ],
)
def test_labels_without_a_prompt_are_an_error(
    data: Dataset, more: dict[str, Any], tmp_path: Path
) -> None:
    sft = trainer(tmp_path, data, per_device_train_batch_size=8, **more)
    with pytest.raises(PositionError, match="no prompt"):
        sft.train()


def test_every_token_needs_no_prompt(tmp_path: Path) -> None:
    sft = trainer(tmp_path, TEXT, config(positions="all", edit_generated=True))
    with spied(sft.model) as calls:
        sft.train()
    assert all(edited == list(range(len(ids))) for ids, edited in calls[0].rows())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "more",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.sum()},
    ],
)
def test_training_that_keeps_the_labels_from_the_model_is_an_error(
    more: dict[str, Any], tmp_path: Path
) -> None:
    sft = trainer(tmp_path, COMPLETION, **more)
    with pytest.raises(PositionError, match="without labels"):
        sft.train()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_metrics_of_logits_without_labels_are_an_error(tmp_path: Path) -> None:
    sft = trainer(tmp_path, COMPLETION, compute_metrics=lambda prediction: {})
    with pytest.raises(PositionError, match="without labels"):
        sft.evaluate(COMPLETION)
    sft.model(input_ids=torch.tensor([tokens("a bare forward is the user's own")]))


def test_wrapped_packing_is_an_error(tmp_path: Path) -> None:
    more = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    with pytest.raises(PositionError, match="wrapped"):
        trainer(tmp_path, COMPLETION, **more)
    from peft import LoraConfig

    trainer(tmp_path, COMPLETION, LoraConfig(target_modules=["q_proj"]), **more)


def test_several_replies_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "reftune"):
        sft = trainer(tmp_path, SEVERAL, config(positions="f2"), assistant_only_loss=True)
        sft.train()
        assert caplog.messages == []
        sft = trainer(tmp_path, SEVERAL, assistant_only_loss=True, max_steps=2)
        with spied(sft.model) as calls:
            sft.train()
    assert len(caplog.messages) == 1
    assert "several replies" in caplog.messages[0]
    first_prompt = len(tokens("u:Hello there;a:"))
    assert all(edited == places(first_prompt) for _, edited in calls[0].rows())

"""PEFT's task types by transformers' Trainer: heads are saved, labels are no prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from architectures import ARCHITECTURES, IMAGE, IMAGE_TOKEN, LENGTH, VOCAB
from reftune import ReftConfig, options

pytestmark = [
    # PEFT 0.21 and transformers 5.23 rename gradient checkpointing, each at its own pace.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # transformers' Trainer pins memory by a function that torch deprecates
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

TARGETS = ("labels", "start_positions", "end_positions", "decoder_input_ids")
IGNORED = -100
DECODED = 5
EOS = 2
ENDED = ("t5", "bart")  # their classifiers read the state of the last end of a sequence


@dataclass(frozen=True)
class Case:
    """A class of transformers, its checkpoint's class, PEFT's task, and the head that is new."""

    family: str
    kind: str
    model: str
    checkpoint: str
    head: tuple[str, ...]

    @property
    def task(self) -> str | None:
        """Return PEFT's name of the task; it has none for images or for choices."""
        return {"CHOICE": "SEQ_CLS", "IMAGE": None}.get(self.kind, self.kind)


CASES = {
    f"{case.family}-{case.kind}": case
    for case in (
        Case("bert", "SEQ_CLS", "BertForSequenceClassification", "BertModel", ("classifier",)),
        Case("bert", "TOKEN_CLS", "BertForTokenClassification", "BertModel", ("classifier",)),
        Case("bert", "QUESTION_ANS", "BertForQuestionAnswering", "BertModel", ("qa_outputs",)),
        Case("bert", "CHOICE", "BertForMultipleChoice", "BertModel", ("classifier",)),
        Case("bert", "FEATURE_EXTRACTION", "BertModel", "BertModel", ()),
        Case("roberta", "SEQ_CLS", "RobertaForSequenceClassification", "", ("classifier",)),
        Case("mpnet", "QUESTION_ANS", "MPNetForQuestionAnswering", "MPNetModel", ("qa_outputs",)),
        *(
            Case("distilbert", kind, name, "DistilBertModel", ("classifier", "pre_classifier"))
            for kind, name in (
                ("SEQ_CLS", "DistilBertForSequenceClassification"),
                ("CHOICE", "DistilBertForMultipleChoice"),
            )
        ),
        *(
            Case("deberta-v2", kind, name, "DebertaV2Model", ("classifier", "pooler"))
            for kind, name in (
                ("SEQ_CLS", "DebertaV2ForSequenceClassification"),
                ("CHOICE", "DebertaV2ForMultipleChoice"),
            )
        ),
        *(
            Case(
                "modernbert",
                kind,
                f"ModernBertFor{name}",
                "ModernBertModel",
                ("classifier", "head"),
            )
            for kind, name in (
                ("SEQ_CLS", "SequenceClassification"),
                ("TOKEN_CLS", "TokenClassification"),
                ("QUESTION_ANS", "QuestionAnswering"),
            )
        ),
        Case("llama", "SEQ_CLS", "LlamaForSequenceClassification", "", ("score",)),
        Case("llama", "TOKEN_CLS", "LlamaForTokenClassification", "", ("score",)),
        Case("gpt2", "TOKEN_CLS", "GPT2ForTokenClassification", "", ("classifier",)),
        Case("t5", "SEQ_CLS", "T5ForSequenceClassification", "", ("classification_head",)),
        Case("t5", "TOKEN_CLS", "T5ForTokenClassification", "", ("classifier",)),
        Case("t5", "QUESTION_ANS", "T5ForQuestionAnswering", "", ("qa_outputs",)),
        Case("t5", "SEQ_2_SEQ_LM", "T5ForConditionalGeneration", "", ()),
        Case("t5", "FEATURE_EXTRACTION", "T5EncoderModel", "", ()),
        Case("bart", "SEQ_CLS", "BartForSequenceClassification", "", ("classification_head",)),
        Case("bart", "QUESTION_ANS", "BartForQuestionAnswering", "", ("qa_outputs",)),
        Case("bart", "SEQ_2_SEQ_LM", "BartForConditionalGeneration", "", ()),
        Case("vit", "IMAGE", "ViTForImageClassification", "ViTModel", ("classifier",)),
        Case("dinov2", "IMAGE", "Dinov2ForImageClassification", "Dinov2Model", ("classifier",)),
    )
}
every_case = pytest.mark.parametrize("name", sorted(CASES))


def base_maker(
    case: Case, folder: Path, embeddings: float = 1.0, **settings: Any
) -> Callable[[int], Any]:
    """Save a checkpoint without the task's head; return what loads it with a head by a seed.

    Of large random `embeddings` a model that has them for its head repeats its first token.
    """
    arch = ARCHITECTURES[case.family]
    if case.kind == "TOKEN_CLS":
        settings["num_labels"] = 3
    if case.family in ENDED:
        settings["eos_token_id"] = EOS
    directory = folder / "base"
    made = arch.make(model=case.checkpoint or None, **settings)
    if embeddings != 1.0:
        made.get_input_embeddings().weight.data *= embeddings
    made.save_pretrained(directory)

    def load(seed: int) -> Any:
        torch.manual_seed(seed)
        return getattr(transformers, case.model).from_pretrained(directory).eval()

    return load


def test_a_head_that_a_checkpoint_has_in_part_is_trained(tmp_path: Path) -> None:
    made = ARCHITECTURES["bart"].make(model="BartForSequenceClassification", num_labels=3)
    made.save_pretrained(tmp_path)
    base = transformers.BartForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, ReftConfig(task_type="SEQ_CLS", r=2, positions="f2"))
    head = [
        n for n, p in model.named_parameters() if "classification_head" in n and p.requires_grad
    ]
    assert any("out_proj" in name for name in head)
    assert any("dense" in name for name in head)


def adapt(case: Case, base: Any, seed: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    if case.task is None:  # as PEFT's own examples of image classification do
        settings["modules_to_save"] = ["classifier"]
    config = ReftConfig(task_type=case.task, r=2, positions="f2+l3", tied="sides", **settings)
    return get_peft_model(base, config).eval()


def examples(case: Case, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return padded examples, as the collators of transformers' example scripts make them."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        if case.kind == "IMAGE":
            image = torch.randn(3, IMAGE, IMAGE, generator=g)
            rows.append({"pixel_values": image, "labels": torch.tensor(i % 2)})
            continue
        ids = torch.randint(6, VOCAB, (LENGTH,), generator=g)
        mask = (torch.arange(LENGTH) < torch.randint(7, LENGTH + 1, (), generator=g)).long()
        ids = torch.where(mask.bool(), ids, 0)
        if case.family in ENDED:
            ids[mask.sum() - 1] = EOS
        row = {"input_ids": ids, "attention_mask": mask}
        if case.kind == "SEQ_CLS":
            row["labels"] = torch.tensor(i % 2)
        elif case.kind == "TOKEN_CLS":
            # A tag for some of the tokens, none for the first: not where a prompt would end.
            tagged = mask.bool() & (ids % 2 == 0) & (torch.arange(LENGTH) > 1)
            row["labels"] = torch.where(tagged, ids % 3, IGNORED)
        elif case.kind == "QUESTION_ANS":
            row |= {"start_positions": torch.tensor(2), "end_positions": torch.tensor(4)}
        elif case.kind == "CHOICE":
            flipped = torch.where(mask.bool(), ids.roll(1), 0)
            row = {"input_ids": torch.stack([ids, flipped]), "attention_mask": mask.expand(2, -1)}
            row["labels"] = torch.tensor(i % 2)
        elif case.kind == "SEQ_2_SEQ_LM":
            row["labels"] = torch.randint(6, VOCAB, (DECODED,), generator=g)
        rows.append(row)
    return rows


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def inputs_of(case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without its labels."""
    inputs = {key: value for key, value in batch.items() if key not in TARGETS}
    if case.kind == "SEQ_2_SEQ_LM":
        start = ARCHITECTURES[case.family].settings["decoder_start_token_id"]
        shifted = nn.functional.pad(batch["labels"][:, :-1], (1, 0), value=start)
        inputs["decoder_input_ids"] = shifted
    return inputs


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return next(out[k] for k in ("logits", "start_logits", "last_hidden_state") if k in out)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings,
    }


def train(model: PeftModel, rows: list[dict[str, Tensor]], folder: Path, **settings: Any) -> Any:
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(folder, **settings)),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    model.eval()
    return trainer


def heads(model: nn.Module) -> tuple[str, ...]:
    """Return the modules of the base model that are trained in full."""
    found = {
        name.removeprefix("base_model.model.").partition(".modules_to_save.")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".modules_to_save." in name
    }
    return tuple(sorted(found))


# --- each task ------------------------------------------------------------------------------------


@every_case
def test_what_the_trainer_trained_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    """The head was new and is drawn anew in the second base, so a head that is not saved shows."""
    case = CASES[name]
    load, rows = base_maker(case, tmp_path), examples(case)
    model = adapt(case, load(1))
    assert heads(model) == case.head
    inputs = inputs_of(case, batch_of(rows))
    before = output_of(model, inputs)
    if case.kind != "FEATURE_EXTRACTION":  # has no loss
        trainer = train(model, rows, tmp_path)
        assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
        assert not torch.equal(output_of(model, inputs), before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(2), tmp_path / "adapter").eval()
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


@every_case
def test_the_whole_attended_input_is_the_prompt_with_labels_or_without(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model, batch = adapt(case, base_maker(case, tmp_path)(1)), batch_of(examples(case))
    inputs = inputs_of(case, batch)
    expected = output_of(model, inputs)
    mask = inputs.get("attention_mask")
    told = {} if mask is None else {"prompt_mask": mask.reshape(-1, LENGTH).bool()}
    with options(**told):
        assert torch.equal(output_of(model, inputs), expected)
    assert torch.equal(output_of(model, batch), expected)
    with options(strength=0.0):
        assert not torch.allclose(output_of(model, batch), expected)


@every_case
def test_the_head_and_the_adapter_are_all_that_is_trained(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    load = base_maker(case, tmp_path)
    model, base = adapt(case, load(1)), load(1)
    sizes = [sum(p.numel() for p in base.get_submodule(part).parameters()) for part in case.head]
    d, r, sides, depth = 32, 2, 2, 3
    adapter = depth * sides * (2 * d * r + r)
    assert model.num_parameters(only_trainable=True) == adapter + sum(sizes)


# --- heads ----------------------------------------------------------------------------------------


def test_a_pooler_is_trained_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    case = Case("bert", "SEQ_CLS", "BertForSequenceClassification", "BertForMaskedLM", ())
    load, rows = base_maker(case, tmp_path), examples(case)
    model = adapt(case, load(1))
    assert heads(model) == ("bert.pooler", "classifier")
    train(model, rows, tmp_path).save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(2), tmp_path / "adapter").eval()
    inputs = inputs_of(case, batch_of(rows))
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


def test_a_head_that_the_checkpoint_has_is_left_as_it_is(tmp_path: Path) -> None:
    case = CASES["modernbert-TOKEN_CLS"]
    masked = Case("modernbert", "TOKEN_CLS", case.model, "ModernBertForMaskedLM", ())
    assert heads(adapt(masked, base_maker(masked, tmp_path)(1))) == ("classifier",)


def test_a_second_adapter_has_a_head_of_its_own_and_batches_mix_them(tmp_path: Path) -> None:
    case = CASES["distilbert-SEQ_CLS"]
    model = adapt(case, base_maker(case, tmp_path)(1))
    model.add_adapter("other", ReftConfig(task_type="SEQ_CLS", r=3, positions="f1"))
    inputs = inputs_of(case, batch_of(examples(case, 4)))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        for parameter in model.parameters():  # heads that differ
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        alone[name] = output_of(model.eval(), inputs)
    assert not torch.allclose(alone["default"], alone["other"])
    names = ["other", "default", "default", "other"]
    mixed = output_of(model, {**inputs, "adapter_names": names})
    expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected)


def test_a_new_head_without_a_task_type_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = base_maker(CASES["vit-IMAGE"], tmp_path)
    with caplog.at_level(logging.WARNING, "reftune"):
        model = get_peft_model(load(1), ReftConfig(r=2))
        get_peft_model(load(1), ReftConfig(r=2, modules_to_save=["classifier"]))
        get_peft_model(ARCHITECTURES["llama"].make(), ReftConfig(r=2))
    assert heads(model) == ()
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "reftune"]
    assert "no weights for classifier" in warning
    assert "modules_to_save=['classifier']" in warning


def test_a_head_whose_name_others_end_with_is_named_by_its_path() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])
            self.lm_head = nn.Linear(4, 4)

    class WithHead(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model = Tower()
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids: Tensor | None = None, **_: Any) -> Tensor:
            raise NotImplementedError

    model = get_peft_model(WithHead(), ReftConfig(task_type="SEQ_CLS", r=2, hidden_size=4))
    assert heads(model) == ("head",)


# --- labels ---------------------------------------------------------------------------------------


class Tagger(LlamaForCausalLM):
    """A model that may generate, with one tag in place of each word of its vocabulary."""


def test_tags_are_no_prompt_of_a_model_that_may_generate() -> None:
    case = CASES["llama-TOKEN_CLS"]
    base = ARCHITECTURES["llama"].make()
    base.__class__ = Tagger
    batch = batch_of(examples(case))
    inputs = inputs_of(case, batch)
    tagger = adapt(case, base)
    assert torch.equal(output_of(tagger, batch), output_of(tagger, inputs))
    language = Case("llama", "CAUSAL_LM", "", "", ())
    model = adapt(language, ARCHITECTURES["llama"].make())
    assert not torch.allclose(output_of(model, batch), output_of(model, inputs))


def test_grades_are_learned_as_a_regression(tmp_path: Path) -> None:
    case = CASES["bert-SEQ_CLS"]
    load = base_maker(case, tmp_path, num_labels=1)
    rows = examples(case, 16)
    for row in rows:
        row["labels"] = row["input_ids"][:3].sum() / (3 * VOCAB)  # a number, not a class
    model = adapt(case, load(1))
    before = Trainer(model, TrainingArguments(**arguments(tmp_path)), eval_dataset=rows).evaluate()
    trainer = train(model, rows, tmp_path, max_steps=60)
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"] / 5
    assert model.base_model.model.config.problem_type == "regression"


def test_the_best_epoch_is_loaded_with_its_head(tmp_path: Path) -> None:
    case = CASES["modernbert-TOKEN_CLS"]
    load, rows = base_maker(case, tmp_path), examples(case)
    model = adapt(case, load(1))
    trainer = train(
        model,
        rows,
        tmp_path,
        max_steps=4,
        learning_rate=0.5,  # it gets worse: the best epoch is not the last
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    inputs = inputs_of(case, batch_of(rows))
    loaded = PeftModel.from_pretrained(load(2), best).eval()
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


def test_a_directory_says_which_class_it_is_of(tmp_path: Path) -> None:
    case = CASES["bert-TOKEN_CLS"]
    load, rows = base_maker(case, tmp_path), examples(case)
    model = adapt(case, load(1))
    train(model, rows, tmp_path).save_model(tmp_path / "adapter")
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter").eval()
    inputs = inputs_of(case, batch_of(rows))
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


# --- encoder-decoders -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generation_in_the_trainer_edits_the_encoders_input_alone(
    family: str, tmp_path: Path
) -> None:
    case = CASES[f"{family}-SEQ_2_SEQ_LM"]
    load, rows = base_maker(case, tmp_path, embeddings=0.05), examples(case, 4)
    model = adapt(case, load(1))
    settings = {"predict_with_generate": True, "generation_max_length": DECODED + 1}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**arguments(tmp_path, **settings)),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    model.eval()
    inputs = {k: v for k, v in batch_of(rows).items() if k != "labels"}
    predicted = torch.tensor(trainer.predict(rows).predictions)
    # Decoded one by one, each time the whole pass: decoder tokens are never edited.
    start = ARCHITECTURES[family].settings["decoder_start_token_id"]
    decoded = torch.full((4, 1), start)
    with options(prompt_mask=inputs["attention_mask"].bool()):
        for _ in range(DECODED):
            logits = output_of(model, {**inputs, "decoder_input_ids": decoded})
            decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(predicted[:, : DECODED + 1], decoded)  # the rest is the Trainer's padding
    assert len(decoded[:, 1:].unique()) > 4
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    again = loaded.generate(**inputs, max_length=DECODED + 1, do_sample=False)
    assert torch.equal(again, decoded)


def test_lora_beside_it_has_the_same_head(tmp_path: Path) -> None:
    """PEFT's own names; what it misses is named by hand for a comparison."""
    case = CASES["bert-SEQ_CLS"]
    load = base_maker(case, tmp_path)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    assert heads(get_peft_model(load(1), lora)) == heads(adapt(case, load(1)))


# --- images in a prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2.5-vl"])
def test_a_prompt_with_images_is_counted_in_the_text_towers_tokens(family: str) -> None:
    arch = ARCHITECTURES[family]
    case = Case(family, "CAUSAL_LM", arch.model, "", ())
    model, inputs = adapt(case, arch.make()), arch.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :7] = IGNORED  # two tokens, four of an image, one token
    assert (inputs["input_ids"][:, 2:6] == IMAGE_TOKEN).all()
    told = {**inputs, "prompt_lengths": torch.tensor([7, 7])}
    assert torch.equal(output_of(model, {**inputs, "labels": labels}), output_of(model, told))
    # The last three of the prompt are two places of the image and the token after it.
    edited = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]] * 2).bool()
    by_hand = adapt(Case(family, "CAUSAL_LM", arch.model, "", ()), arch.make())
    told = {**inputs, "prompt_mask": edited}
    assert torch.equal(output_of(by_hand, told), output_of(model, {**inputs, "labels": labels}))

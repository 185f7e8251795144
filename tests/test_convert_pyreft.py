"""Checkpoints that pyreft, EasySteer and ms-swift wrote compute, converted, what they computed.

How they were recorded: benchmarks/parity/README.md.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from converted import (
    DATA,
    PYREFT,
    base_directory,
    base_model,
    batch,
    case,
    classifier,
    close,
    load,
    logits,
    names,
    recorded,
)
from reftune import ConversionError
from reftune.convert import Answers, convert

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LIKE_PYREFT = [
    *(("pyreft", n) for n in names("pyreft") if n not in ("with_lora", "classifier")),
    *(("pyreft-dots", n) for n in names("pyreft-dots")),
    *(("easysteer", n) for n in names("easysteer")),
]
FLAGS = Answers(positions="f2+l3", act_fn="linear")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_directory(tmp_path_factory.mktemp("convert"))


def answers(base: str, entry: dict[str, Any]) -> Answers:
    fields = ("positions", "act_fn", "lora_alpha", "task_type")
    return Answers(base=base, **{k: entry[k] for k in fields if k in entry})


@pytest.mark.parametrize(("library", "name"), LIKE_PYREFT)
def test_logits(library: str, name: str, base: str, tmp_path: Path) -> None:
    entry = case(library, name)
    given = answers(base, entry)
    done = convert(DATA / library / entry.get("folder", name), tmp_path / "out", answers=given)
    config = done.adapter.config
    assert (config.short_prompts, config.dropout_on) == ("pyreft", "output")
    assert config.base_model_name_or_path == base
    close(logits(load(tmp_path / "out")), recorded(library)[1][name])


@pytest.mark.parametrize("name", names("ms-swift"))
def test_ms_swift_records_all_but_the_base(name: str, base: str, tmp_path: Path) -> None:
    """Its tuner gives pyreft no positions: every token is edited, completions included."""
    done = convert(DATA / "ms-swift" / name, tmp_path / "out", answers=Answers(base=base))
    assert done.source == "ms-swift"
    assert done.adapter.config.edit_generated
    close(logits(load(tmp_path / "out")), recorded("ms-swift")[1][name])


def test_ms_swifts_arguments_name_the_base(base: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / "ms-swift" / "loreft", tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / "args.json").write_text(json.dumps({"model": base}))
    done = convert(tmp_path / "checkpoint-7", tmp_path / "out")
    assert done.adapter.config.base_model_name_or_path == base


def test_the_oldest_names(base: str, tmp_path: Path) -> None:
    """Before 2024 the names said `repr`; the files were the same."""
    source = tmp_path / "old"
    shutil.copytree(DATA / "pyreft-dots" / "block_output", source)
    for file in source.glob("*.bin"):
        file.rename(file.with_name(file.name.replace(".comp.", ".repr.")))
    text = (source / "config.json").read_text().replace(".comp.", ".repr.")
    (source / "config.json").write_text(text.replace('"representations"', '"intervenable_x"'))
    convert(source, tmp_path / "out", answers=replace(FLAGS, base=base))
    close(logits(load(tmp_path / "out")), recorded("pyreft-dots")[1]["block_output"])


@pytest.mark.parametrize(("library", "name"), [("pyreft", "path"), ("pyreft", "attention_path")])
def test_paths_are_told_without_a_config(
    library: str, name: str, base: str, tmp_path: Path
) -> None:
    """The names of files made underscores of the path's dots."""
    source = tmp_path / "checkpoint-3"
    shutil.copytree(DATA / library / name, source / "intervenable_model")
    (source / "intervenable_model" / "config.json").unlink()
    given = Answers(base=base, positions="l2", act_fn="linear")
    convert(source, tmp_path / "out", answers=given)
    close(logits(load(tmp_path / "out")), recorded(library)[1][name])


def test_without_the_bases_config_the_path_of_its_layers_is_asked_for(tmp_path: Path) -> None:
    given = replace(FLAGS, base="nobody/nowhere")
    with pytest.raises(ConversionError, match=r"'nobody/nowhere' cannot be read.*--layers-path"):
        convert(DATA / "pyreft" / "loreft_tied", tmp_path / "out", answers=given)
    given = replace(given, layers_path="model.layers")
    convert(DATA / "pyreft" / "loreft_tied", tmp_path / "out", answers=given)
    close(logits(load(tmp_path / "out")), recorded("pyreft")[1]["loreft_tied"])


def test_a_lora_beside_it_becomes_an_adapter_of_its_own(base: str, tmp_path: Path) -> None:
    entry = case("pyreft", "with_lora")
    source = DATA / "pyreft" / "with_lora"
    with pytest.raises(ConversionError, match="--lora-alpha"):
        convert(source, tmp_path / "out", answers=replace(answers(base, entry), lora_alpha=None))
    done = convert(source, tmp_path / "out", answers=answers(base, entry))
    assert any("LoRA" in note for note in done.notes)
    lora = PeftModel.from_pretrained(base_model(), str(tmp_path / "out" / "lora"))
    assert not torch.equal(logits(lora), logits(base_model()))
    both = load(tmp_path / "out", lora.merge_and_unload())
    close(logits(both), recorded("pyreft")[1]["with_lora"])


def test_a_head_beside_it_is_saved_with_it(base: str, tmp_path: Path) -> None:
    entry = case("pyreft", "classifier")
    done = convert(DATA / "pyreft" / "classifier", tmp_path / "out", answers=answers(base, entry))
    assert done.adapter.config.modules_to_save == ["score"]
    model = load(tmp_path / "out", classifier())
    inputs = batch()
    lengths = torch.tensor([9, 6, 4, 3])  # the recorded prompts; the head reads the last token
    with torch.no_grad():
        found = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            prompt_lengths=lengths,
        ).logits
    close(found, recorded("pyreft")[1]["classifier"])


def test_an_R_that_is_not_orthonormal_keeps_its_formula(base: str, tmp_path: Path) -> None:
    done = convert(DATA / "pyreft" / "resumed", tmp_path / "out", answers=replace(FLAGS, base=base))
    assert done.adapter.config.method == "noreft"
    assert any("not orthonormal" in note for note in done.notes)


def change(name: str, tmp_path: Path, how: Any) -> Path:
    """Copy a recorded checkpoint and change each of its files' tensors."""
    source = tmp_path / "changed"
    shutil.copytree(DATA / "pyreft" / name, source)
    for file in source.glob("intkey_*.bin"):
        state = dict(torch.load(file, weights_only=True))
        how(state)
        torch.save(state, file)
    return source


@pytest.mark.parametrize(
    ("name", "method"), [("consreft_untied", "noreft"), ("lobireft_tied", "direft")]
)
def test_constant_methods_without_orthonormality(
    name: str, method: str, base: str, tmp_path: Path
) -> None:
    """Twice R is what no constant method of ours can hold; h + R^T(b - R h) with W = 0 can."""

    def double(state: dict[str, Tensor]) -> None:
        state["rotate_layer.parametrizations.weight.0.base"].mul_(2)

    source = change(name, tmp_path, double)
    done = convert(source, tmp_path / "out", answers=replace(FLAGS, base=base))
    assert done.adapter.config.method == method
    plain = convert(
        DATA / "pyreft" / name, tmp_path / "plain", answers=replace(FLAGS, base=base)
    ).adapter
    for path, phi in done.adapter.phis.items():
        assert not phi["W"].any()
        close(phi["R"], 2 * plain.phis[path]["R"])


def test_an_erased_R_is_told(base: str, tmp_path: Path) -> None:
    """Weight decay makes the diagonal -0.99, which torch casts to 0."""

    def decay(state: dict[str, Tensor]) -> None:
        state["rotate_layer.parametrizations.weight.original"].mul_(0.99)

    source = change("direft_tied", tmp_path, decay)
    with pytest.raises(ConversionError, match="weight decay erases"):
        convert(source, tmp_path / "out", answers=replace(FLAGS, base=base))
    assert not (tmp_path / "out").exists()


def test_what_is_not_recorded_is_asked_for_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(DATA / "pyreft" / "loreft_tied", tmp_path / "out")
    assert "Give --base --positions --act-fn." in str(caught.value)
    with pytest.raises(ConversionError) as caught:
        convert(DATA / "pyreft" / "lobireft_tied", tmp_path / "out")
    assert "Give --base --positions." in str(caught.value), "it has no activation"

    source = tmp_path / "checkpoint-3"
    shutil.copytree(DATA / "pyreft" / "noreft_tied", source)
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"Give --method\. .*noreft .* or direft"):
        convert(source, tmp_path / "out", answers=replace(FLAGS, base="x"))


def test_a_wrong_answer_is_an_error(base: str, tmp_path: Path) -> None:
    def attempt(name: str, **more: Any) -> None:
        given = replace(FLAGS, **{"base": base, **more})
        convert(DATA / "pyreft" / name, tmp_path / "out", answers=given)

    for name, more, words in (
        ("loreft_untied", {"positions": "l3"}, "one for the prefix and one for the suffix"),
        ("loreft_tied", {"positions": "x3"}, "positions is 'x3'"),
        ("loreft_tied", {"act_fn": "rellu"}, "act_fn is 'rellu'"),
        ("loreft_tied", {"method": "direft"}, "tensors of loreft"),
        ("noreft_bias_tied", {"act_fn": "relu"}, "behind the activation"),
        ("loreft_tied", {"task_type": "SEQ"}, "task_type is 'SEQ'"),
    ):
        with pytest.raises(ConversionError, match=words):
            attempt(name, **more)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_told_by_its_width(base: str, tmp_path: Path) -> None:
    config = json.loads((Path(base) / "config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = replace(FLAGS, base=str(tmp_path))
    with pytest.raises(ConversionError, match=r"width 32.*have 64.*another base model"):
        convert(DATA / "pyreft" / "loreft_tied", tmp_path / "out", answers=given)


def test_interventions_listed_layer_by_layer_are_refused(base: str, tmp_path: Path) -> None:
    """pyreft would give the first layer's two the prefix and the second's two the suffix."""
    source = tmp_path / "source"
    shutil.copytree(DATA / "pyreft" / "loreft_untied", source)
    config = json.loads((source / "config.json").read_text())
    config["sorted_keys"].sort()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="layer by layer"):
        convert(source, tmp_path / "out", answers=replace(FLAGS, base=base))


def test_the_checkpoints_of_the_parity_records(base: str, tmp_path: Path) -> None:
    """Those in tests/data/pyreft, too: their tensors are known by other means."""
    from safetensors.torch import load_file

    given = replace(FLAGS, base=base)
    done = convert(PYREFT / "saved" / "loreft_untied", tmp_path / "out", answers=given)
    expected = load_file(PYREFT / "loreft_untied.safetensors")
    for layer in (0, 2):
        phi = done.adapter.phis[f"model.layers.{layer}"]
        for group, side in enumerate(("prefix", "suffix")):
            close(phi["R"][group], expected[f"trained.layer{layer}.{side}.R"])
            close(phi["W"][group], expected[f"trained.layer{layer}.{side}.W"])

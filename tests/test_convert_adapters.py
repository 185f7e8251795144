"""Checkpoints that AdapterHub's adapters wrote compute, converted, what they computed there.

How they were recorded: benchmarks/parity/README.md. adapters knows no prompts: it counts positions
in the whole sequence, as ours do where there are no labels.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from converted import DATA, base_directory, batch, close, load, names, recorded
from reftune import ConversionError
from reftune.convert import Answers, convert

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FORMS = ("bin", "safetensors")
FOLDER = DATA / "adapters"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_directory(tmp_path_factory.mktemp("convert"))


def method(name: str) -> str:
    return name.split("_")[0]


def logits(model: torch.nn.Module) -> Tensor:
    """Return logits of the real tokens, each row computed alone: all of it is the prompt."""
    inputs = batch()
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    with torch.no_grad():
        return torch.cat([model(input_ids=ids[mask][None]).logits[0] for ids, mask in rows])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", names("adapters"))
def test_logits(name: str, form: str, base: str, tmp_path: Path) -> None:
    given = Answers(base=base, method=method(name))
    done = convert(FOLDER / f"{name}_{form}", tmp_path / "out", answers=given)
    config = done.adapter.config
    assert done.source == "adapters"
    assert (config.method, config.dropout_on) == (method(name), "output")
    close(logits(load(tmp_path / "out")), recorded("adapters")[1][name])


SHORT = [name for name in names("adapters") if f"{name}.short" in recorded("adapters")[1]]


@pytest.mark.parametrize("name", SHORT)
def test_prompts_shorter_than_their_positions(name: str, base: str, tmp_path: Path) -> None:
    """There the suffix overwrites the prefix: a token that is in both has the suffix's Phi."""
    given = Answers(base=base, method=method(name))
    convert(FOLDER / f"{name}_bin", tmp_path / "out", answers=given)
    with torch.no_grad():
        found = load(tmp_path / "out")(input_ids=torch.tensor([[1, 9]])).logits[0]
    close(found, recorded("adapters")[1][f"{name}.short"])


def test_the_square_buffers_are_left_behind(base: str, tmp_path: Path) -> None:
    convert(FOLDER / "loreft_safetensors", tmp_path / "out", answers=Answers(base=base))
    shapes = [t.shape for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()]
    assert max(shape[-2] for shape in shapes if len(shape) == 3) == 4


def test_noreft_and_direft_are_told_apart_by_the_user(base: str, tmp_path: Path) -> None:
    """adapters does not save its `subtract_projection`."""
    with pytest.raises(ConversionError, match=r"--method: noreft .* or direft"):
        convert(FOLDER / "direft_bin", tmp_path / "out", answers=Answers(base=base))
    given = Answers(base=base, method="loreft")
    with pytest.raises(ConversionError, match="tensors of noreft or direft"):
        convert(FOLDER / "direft_bin", tmp_path / "out", answers=given)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_with_its_head(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "bert_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = FOLDER / "bert_head"
    done = convert(source, tmp_path / "out", answers=Answers(base=str(tmp_path)))
    assert done.adapter.config.modules_to_save == ["classifier"]
    model = BertForSequenceClassification(BertConfig(**config))
    model.load_state_dict(load_file(FOLDER / "bert.safetensors"))
    adapted = load(tmp_path / "out", model)
    inputs = batch()
    with torch.no_grad():
        found = adapted(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    close(found, recorded("adapters")[1]["bert"])


def test_other_architectures_and_the_decoders_layers_are_refused(base: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "loreft_bin", source)
    text = (source / "adapter_config.json").read_text()
    (source / "adapter_config.json").write_text(text.replace('"reft"', '"lora"'))
    with pytest.raises(ConversionError, match="architecture 'lora'"):
        convert(source, tmp_path / "out", answers=Answers(base=base))
    (source / "adapter_config.json").write_text(text)
    state = torch.load(source / "pytorch_adapter.bin", weights_only=True)
    both = {k.replace("model.", "encoder.", 1): t for k, t in state.items()}
    torch.save(state | both, source / "pytorch_adapter.bin")
    with pytest.raises(ConversionError, match="decoder of an encoder-decoder"):
        convert(source, tmp_path / "out", answers=Answers(base=base))

"""Out to pyreft's format and EasySteer's specification, and what these have no words for."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from converted import (
    DATA,
    base_directory,
    base_model,
    batch,
    case,
    close,
    load,
    logits,
    recorded,
)
from reftune import METHODS, ConversionError, ReftConfig, reft_layers
from reftune.convert import Answers, convert
from reftune.convert.foreign import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PYREFT_HAS = ("loreft", "noreft", "consreft", "lobireft", "direft", "direft_orthonormal")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_directory(tmp_path_factory.mktemp("convert"))


def ours(directory: Path, base: str, **settings: Any) -> PeftModel:
    """Save an adapter of random parameters, and return the model with it."""
    defaults = {"positions": "f2+l3", "layers": [0, 2], "task_type": "CAUSAL_LM"}
    rank = {} if settings.get("method") in ("red", "reft_r1") else {"r": 4}
    torch.manual_seed(3)
    model = get_peft_model(base_model(), ReftConfig(**{**defaults, **rank, **settings}))
    for layer in reft_layers(model).values():
        for name, p in layer.phi("default").named_parameters():
            if name != "R":
                p.data.normal_(0, 0.3)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(directory))
    return model.eval()


@pytest.mark.parametrize("tied", ["all", "sides"])
@pytest.mark.parametrize("method", PYREFT_HAS)
def test_there_and_back_through_pyreft(method: str, tied: str, base: str, tmp_path: Path) -> None:
    activated = METHODS[method].has_activation
    settings = {"act_fn": "relu", "dropout": 0.1} if activated else {}
    model = ours(tmp_path / "a", base, method=method, tied=tied, **settings)
    convert(tmp_path / "a", tmp_path / "pyreft", to="pyreft")
    done = convert(tmp_path / "pyreft", tmp_path / "b")  # no flags: reftune.json remembers
    close(logits(load(tmp_path / "b")), logits(model))
    before, after = model.peft_config["default"], done.adapter.config
    for name in ("method", "r", "tied", "positions", "act_fn", "short_prompts", "layers"):
        assert getattr(after, name) == getattr(before, name), name


def test_other_modules_than_layers_go_there_and_back(base: str, tmp_path: Path) -> None:
    modules = ["model.layers.0.mlp", "model.layers.1.self_attn"]
    model = ours(tmp_path / "a", base, layers="all", target_modules=modules)
    convert(tmp_path / "a", tmp_path / "pyreft", to="pyreft")
    convert(tmp_path / "pyreft", tmp_path / "b")
    close(logits(load(tmp_path / "b")), logits(model))


@pytest.mark.parametrize("name", ["loreft_untied", "consreft_tied", "direft_untied", "noreft_tied"])
def test_pyrefts_own_files_come_back_as_they_were(name: str, base: str, tmp_path: Path) -> None:
    """Names, shapes and dtypes; and values, but for d x d buffers: R's complement is free."""
    entry = case("pyreft", name)
    given = Answers(base=base, positions=entry["positions"], act_fn=entry["act_fn"])
    convert(DATA / "pyreft" / name, tmp_path / "pyreft", to="pyreft", answers=given)
    theirs = json.loads((DATA / "pyreft" / name / "config.json").read_text())
    written = json.loads((tmp_path / "pyreft" / "config.json").read_text())
    theirs.pop("transformers_version")
    assert written == theirs
    for file in (DATA / "pyreft" / name).glob("*.bin"):
        expected, found = read_tensors(file), read_tensors(tmp_path / "pyreft" / file.name)
        assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
            k: (t.shape, t.dtype) for k, t in expected.items()
        }
        for key, tensor in expected.items():
            if "parametrizations" not in key:
                close(found[key].float(), tensor.float())
            elif key.endswith(".base"):  # orthogonal as a whole, or training on would not be
                close(found[key] @ found[key].mT, torch.eye(len(tensor)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tied": "none"}, "tied='none' has one Phi per position"),
        ({"method": "red"}, "no method 'red'"),
        ({"method": "reft_r1"}, "no method 'reft_r1'"),
        ({"edit_generated": True}, "edit_generated=True"),
    ],
)
def test_what_pyreft_has_no_words_for(
    settings: dict[str, Any], words: str, base: str, tmp_path: Path
) -> None:
    ours(tmp_path / "a", base, **settings)
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path / "a", tmp_path / "pyreft", to="pyreft")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------- EasySteer


def array(tensor: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(tensor["data"]))
    return torch.frombuffer(data, dtype=torch.float32).view(tensor["shape"])


def selected(clause: dict[str, Any], n: int) -> list[int]:
    """Return the prompt's tokens that a clause of EasySteer selects in a prompt of n."""
    found: set[int] = set(range(n)) if clause.get("prompt") == "all" else set()
    if "prompt_window" in clause:
        start, stop = clause["prompt_window"]
        found |= set(range(n)[slice(start, stop)])
    for i in clause.get("prompt_positions", []):
        found.add(min(i, n - 1) if i >= 0 else n + i)
    return [i for i in sorted(found) if i >= 0]


def steered(spec: dict[str, Any], ids: Tensor) -> Tensor:
    """Return the logits (S, V) of one prompt as EasySteer's documents say they are computed."""
    model, n = base_model(), len(ids)
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for vector in spec["vectors"]:
        (layer,) = vector["layers"]
        by_layer.setdefault(layer, []).append(vector)

    def hook(vectors: list[dict[str, Any]]) -> Any:
        def edit(module: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            new, taken = h.clone(), set()
            for vector in vectors:
                for i in selected(vector["apply"], n):
                    if i not in taken:  # conflict: the first vector wins
                        taken.add(i)
                        new[:, i] = apply(vector, h[:, i])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return edit

    for layer, vectors in by_layer.items():
        model.model.layers[layer].register_forward_hook(hook(vectors))
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def apply(vector: dict[str, Any], h: Tensor) -> Tensor:
    tensors = {name: array(tensor) for name, tensor in vector["data"]["tensors"].items()}
    if vector["algorithm"] == "direct":
        (direction,) = tensors.values()
        return h + direction
    R, W, b = (tensors[n] for n in ("rotate_layer", "learned_source_weight", "learned_source_bias"))
    return h + (h @ W.T + b - h @ R) @ R.T


STEERABLE: list[dict[str, Any]] = [
    *({"method": m, "tied": "sides"} for m in PYREFT_HAS),
    {"method": "loreft"},
    {"method": "loreft", "tied": "none"},
    {"method": "direft", "positions": "all"},
    {"method": "consreft", "positions": "f2", "layers": "all"},
    {"method": "lobireft", "positions": "l2"},
]


@pytest.mark.parametrize("settings", STEERABLE, ids=str)
def test_a_specification_computes_the_same(
    settings: dict[str, Any], base: str, tmp_path: Path
) -> None:
    model = ours(tmp_path / "a", base, **settings)
    convert(tmp_path / "a", tmp_path / "steering", to="easysteer")
    spec = json.loads((tmp_path / "steering" / "steering.json").read_text())
    ids = batch()["input_ids"][0, :9]
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    close(steered(spec, ids), expected)


def test_a_bias_of_red_and_generated_tokens(base: str, tmp_path: Path) -> None:
    given = Answers(base=base, positions="all")
    convert(DATA / "easysteer" / "bias", tmp_path / "steering", to="easysteer", answers=given)
    spec = json.loads((tmp_path / "steering" / "steering.json").read_text())
    (vector,) = spec["vectors"]
    assert vector["apply"] == {"prompt": "all", "generation": "all"}
    state = read_tensors(next((DATA / "easysteer" / "bias").glob("*.bin")))
    assert torch.equal(array(vector["data"]["tensors"]["layer.0"]), state["bias"])


def test_the_payloads_hash_is_easysteers(base: str, tmp_path: Path) -> None:
    """As its ReftIntervention hashed these tensors (benchmarks/parity/check_written.py)."""
    ours(tmp_path / "a", base, layers=[0])
    weights = tmp_path / "a" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    fixed = {
        key: (torch.arange(tensor.numel()).view(tensor.shape) / 64 if key[-1] != "R" else tensor)
        for key, tensor in load_file(weights).items()
    }
    R = torch.zeros(1, 4, 32)
    R[0, :, :4].fill_diagonal_(1)
    fixed = {key: (R if key[-1] == "R" else tensor) for key, tensor in fixed.items()}
    save_file(fixed, weights)
    convert(tmp_path / "a", tmp_path / "steering", to="easysteer")
    spec = json.loads((tmp_path / "steering" / "steering.json").read_text())
    assert (
        spec["vectors"][0]["data"]["sha256"]
        == "df6788992e9028eb55d30c44e329ea5ad1b69582b7815b2c67c6e0dd61fd1747"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "reft_r1"}, "no formula for method 'reft_r1'"),
        ({"method": "red"}, "d x d matrix"),
        ({"act_fn": "relu"}, "no activation"),
        ({"target_modules": ["model.layers.0.mlp"], "layers": "all"}, "outputs of layers"),
        ({"modules_to_save": ["lm_head"]}, "trained modules"),
    ],
)
def test_what_easysteer_has_no_words_for(
    settings: dict[str, Any], words: str, base: str, tmp_path: Path
) -> None:
    ours(tmp_path / "a", base, **settings)
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path / "a", tmp_path / "steering", to="easysteer")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_converted_checkpoint_goes_out_at_once(base: str, tmp_path: Path) -> None:
    """pyreft -> EasySteer, without an adapter of reftune's in between."""
    given = Answers(base=base, positions="f2+l3", act_fn="linear")
    convert(DATA / "pyreft" / "loreft_untied", tmp_path / "s", to="easysteer", answers=given)
    spec = json.loads((tmp_path / "s" / "steering.json").read_text())
    inputs, expected = batch(), recorded("pyreft")[1]["loreft_untied"]
    found = steered(spec, inputs["input_ids"][0, :9])  # the recorded prompt of 9 tokens
    close(found, expected[:9])
    assert math.isclose(len(spec["vectors"]), 4)

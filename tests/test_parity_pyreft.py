"""What pyreft 0.1.0 computed, recorded in tests/data/pyreft, is what we compute.

How the records were made, and what they hold: benchmarks/parity/README.md.
"""

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reftune import METHODS, Intervention, ReftConfig

DATA = Path(__file__).parent / "data" / "pyreft"
INDEX = json.loads((DATA / "index.json").read_text())
CASES = INDEX["cases"]
METHOD = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "direft_orthonormal",
    "NodireftIntervention": "direft",
}
PHASES = ("initial", "trained")
SIDES = ("prefix", "suffix")
TOLERANCE = 1e-5

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@dataclass(frozen=True, eq=False)
class Case:
    """One recorded case: its entry of the index and its tensors."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def method(self) -> str:
        return METHOD[self.entry["intervention"]]

    @property
    def orthonormal(self) -> bool:
        return METHODS[self.method].orthonormal

    @property
    def folds_bias(self) -> bool:
        """pyreft's Noreft has a second bias, on R h; its Nodireft has one that it never uses."""
        return self.method == "noreft" and bool(self.entry["add_bias"])

    def config(self) -> ReftConfig:
        return ReftConfig(
            method=self.method,
            r=self.entry["rank"],
            layers=self.entry["layers"],
            positions=self.entry["positions"],
            tied="all" if self.entry["tied"] else "sides",
            act_fn=self.entry["act_fn"],
            short_prompts="pyreft",
            task_type="CAUSAL_LM",
        )

    def recorded(self, kind: str, layer: int) -> dict[str, Tensor]:
        """Return the recorded tensors of a layer, (G, ...), under our names of the parameters."""
        modules = [f"layer{layer}"]
        if not self.entry["tied"]:
            modules = [f"layer{layer}.{side}" for side in SIDES]

        def stacked(name: str) -> Tensor:
            return torch.stack([self.tensors[f"{kind}.{module}.{name}"] for module in modules])

        names = {"R": "R" if self.orthonormal else "proj", "bias": "b"}
        if METHODS[self.method].has_activation:
            names["W"] = "W"
        found = {ours: stacked(theirs) for ours, theirs in names.items()}
        if self.folds_bias and kind != "grad":
            assert self.entry["act_fn"] is None, "the biases fold only where nothing lies between"
            found["bias"] = found["bias"] - stacked("proj_bias")
        return found

    def model(self, phase: str) -> PeftModel:
        """Return our model with pyreft's parameters in it."""
        model = get_peft_model(base_model(), self.config())
        for layer, phi in interventions(model, self.entry["layers"]).items():
            values = self.recorded(phase, layer)
            with torch.no_grad():
                assert set(values) == set(dict(phi.named_parameters()))
                for name, value in values.items():
                    phi.get_parameter(name).copy_(value)
        return model


def base_model() -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((DATA / "base_config.json").read_text()))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(DATA / "base.safetensors"))
    return model.eval()


def interventions(model: PeftModel, layers: list[int]) -> dict[int, Intervention]:
    blocks = model.get_base_model().model.layers
    return {layer: blocks[layer].reft.phi("default") for layer in layers}


@cache
def recorded_batch() -> dict[str, Tensor]:
    return load_file(DATA / INDEX["batch"]["file"])


@cache
def load_case(name: str) -> Case:
    entry = next(case for case in CASES if case["name"] == name)
    return Case(entry, load_file(DATA / entry["file"]))


def batch(padding: str = "right") -> dict[str, Tensor]:
    """Return the recorded batch, which is padded on the right, padded on either side."""
    recorded = recorded_batch()
    found = {name: recorded[name] for name in ("input_ids", "attention_mask", "labels")}
    if padding == "left":
        lengths = found["attention_mask"].sum(-1).tolist()
        width = found["input_ids"].shape[1]
        found = {
            name: torch.stack([row.roll(width - n) for row, n in zip(rows, lengths, strict=True)])
            for name, rows in found.items()
        }
    return found


def prompts() -> list[Tensor]:
    recorded = recorded_batch()
    lengths = recorded["prompt_length"].tolist()
    return [row[:n] for row, n in zip(recorded["input_ids"], lengths, strict=True)]


def generate(model: PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    pad = INDEX["batch"]["pad_token_id"]
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, pad_token_id=pad, **INDEX["generation"]
    )
    return tokens[:, ids.shape[1] :]


def tangent(R: Tensor, G: Tensor) -> Tensor:
    """Return the projection of a gradient on the tangent space of {R: R R^T = I}."""
    M = G @ R.mT
    return G - (M + M.mT) / 2 @ R


def train(model: PeftModel, case: Case, *, trains_R: bool = False) -> list[float]:
    """Take the recorded AdamW steps, with R frozen or not; return the loss before each."""
    settings = dict(INDEX["training"])
    assert settings.pop("optimizer") == "AdamW"
    steps = settings.pop("steps")
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        speed = 1
        if case.orthonormal and name.endswith(".R"):
            parameter.requires_grad_(trains_R)
        # Our bias stands for pyreft's b - proj_bias. Their gradients are equal and opposite and
        # Adam's steps do not depend on scale, so that the difference moves twice as fast.
        if case.folds_bias and name.endswith(".bias"):
            speed = 2
        groups.append({"params": [parameter], "lr": settings["lr"] * speed})
    optimizer = torch.optim.AdamW(groups, **settings)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(actual: Tensor | list[float], expected: Tensor | list[float]) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def named(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


every_case = pytest.mark.parametrize("name", named(CASES))
with_rotation = pytest.mark.parametrize(
    "name", named([c for c in CASES if METHODS[METHOD[c["intervention"]]].orthonormal])
)
without_rotation = pytest.mark.parametrize(
    "name", named([c for c in CASES if not METHODS[METHOD[c["intervention"]]].orthonormal])
)


def test_records_hold_every_method_of_pyreft() -> None:
    assert {case["intervention"] for case in CASES} == set(METHOD)
    assert {case["tied"] for case in CASES} == {True, False}
    assert {case["act_fn"] for case in CASES} == {None, "relu", "gelu"}


def test_base_logits_without_an_adapter() -> None:
    inputs = batch()
    with torch.no_grad():
        logits = base_model()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    close(logits[inputs["attention_mask"].bool()], recorded_batch()["base_logits"])


def test_edited_positions_are_pyrefts() -> None:
    """An edit of the first layer's output that is told apart by side shows where it went."""
    case = load_case("lobireft_untied")
    model = case.model("initial")
    with torch.no_grad():
        states = model(**batch(), output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            edits = states - model(**batch(), output_hidden_states=True).hidden_states[1]
    parameters = case.recorded("initial", 0)
    expected = torch.zeros_like(edits)
    positions = INDEX["batch"]["edited_positions"]
    for group, side in enumerate(SIDES):
        for row, columns in enumerate(positions[side]):
            expected[row, columns] = parameters["bias"][group] @ parameters["R"][group]
    close(edits, expected)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("phase", PHASES)
@every_case
def test_logits_and_loss(name: str, phase: str, padding: str) -> None:
    case, inputs = load_case(name), batch(padding)
    with torch.no_grad():
        output = case.model(phase)(**inputs)
    close(output.logits[inputs["attention_mask"].bool()], case.tensors[f"logits.{phase}"])
    assert output.loss.item() == pytest.approx(case.entry[phase]["loss"], abs=TOLERANCE)


@every_case
def test_without_labels_the_prompt_lengths_say_what_labels_say(name: str) -> None:
    case, inputs = load_case(name), batch()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        output = case.model("trained")(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            prompt_lengths=recorded_batch()["prompt_length"],
        )
    close(output.logits[mask.bool()], case.tensors["logits.trained"])


@pytest.mark.parametrize("padding", ["right", "left"])
@every_case
def test_gradients(name: str, padding: str) -> None:
    """Ours for an orthonormal R is the part of pyreft's dL/dR along the manifold."""
    case = load_case(name)
    model = case.model("initial")
    model(**batch(padding)).loss.backward()
    for layer, phi in interventions(model, case.entry["layers"]).items():
        expected = case.recorded("grad", layer)
        if case.orthonormal:
            expected["R"] = tangent(case.recorded("initial", layer)["R"], expected["R"])
        for parameter, value in expected.items():
            gradient = phi.get_parameter(parameter).grad
            assert gradient is not None
            close(gradient, value)
    assert all(p.grad is None for n, p in model.named_parameters() if "reft" not in n)


@pytest.mark.parametrize("phase", PHASES)
@every_case
def test_greedy_generation_alone(name: str, phase: str) -> None:
    case = load_case(name)
    model = case.model(phase)
    rows = [generate(model, p[None], torch.ones_like(p)[None]) for p in prompts()]
    assert torch.equal(torch.cat(rows), case.tensors[f"generated.{phase}"])


@pytest.mark.parametrize("phase", PHASES)
@every_case
def test_greedy_generation_in_a_left_padded_batch(name: str, phase: str) -> None:
    case = load_case(name)
    assert case.entry[phase]["batched_generation_equal"]
    rows = prompts()
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), INDEX["batch"]["pad_token_id"])
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    assert torch.equal(generate(case.model(phase), ids, mask), case.tensors[f"generated.{phase}"])


@without_rotation
def test_training_in_full(name: str) -> None:
    case = load_case(name)
    model = case.model("initial")
    close(train(model, case), case.entry["losses"]["full"])
    compare_parameters(model, case, "trained")


@with_rotation
def test_training_with_R_frozen(name: str) -> None:
    case = load_case(name)
    model = case.model("initial")
    close(train(model, case), case.entry["losses"]["frozen_R"])
    compare_parameters(model, case, "trained_frozen_R")


@with_rotation
def test_training_R_gains_what_pyrefts_gains(name: str) -> None:
    """At the same learning rate the loss falls in the 20 steps by what pyreft's fell by.

    pyreft trains the Householder vectors v of R = B (I - 2 v v^T / |v|^2) ..., and R moves twice
    as far as they do: `STEP_LENGTH`.
    """
    case = load_case(name)
    model = case.model("initial")
    ours = train(model, case, trains_R=True)
    theirs = case.entry["losses"]["full"]
    assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE)
    assert all(after < before for before, after in pairwise(ours))
    assert 0.95 < (ours[0] - ours[-1]) / (theirs[0] - theirs[-1]) < 1.1


def compare_parameters(model: PeftModel, case: Case, kind: str) -> None:
    """What is left after training is pyreft's, too: the losses end before the last step."""
    for layer, phi in interventions(model, case.entry["layers"]).items():
        for name, value in case.recorded(kind, layer).items():
            # 20 Adam steps magnify rounding where a gradient is almost zero
            torch.testing.assert_close(phi.get_parameter(name).data, value, rtol=0, atol=1e-4)

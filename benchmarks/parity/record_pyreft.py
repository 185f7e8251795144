"""Record what pyreft computes on a tiny Llama, as test data for this library.

Runs in an environment of its own (see README.md beside this file), because pyreft pins an old
transformers. It imports nothing from this library: what it writes is an outside oracle.

    python benchmarks/parity/record_pyreft.py --out tests/data/pyreft
"""

import argparse
import json
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pyreft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN = 64, 32
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
PAD, BOS, FIRST_WORD = 0, 1, 3
IGNORE = -100
PROMPT_LENGTHS = (9, 6, 4, 3)
COMPLETION_LENGTHS = (5, 4, 3, 5)
LAYERS = (0, 2)
RANK = 4
POSITIONS = "f2+l3"
TRAINING = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
STEPS = 20
NEW_TOKENS = 8
SAVED = ("loreft_tied", "loreft_untied", "consreft_tied")

# Plain name -> where pyreft keeps the tensor. R is stored transposed there, as (d, r).
PLAIN_NAMES = {
    "R": "rotate_layer.weight",
    "W": "learned_source.weight",
    "b": "learned_source.bias",
    "proj": "proj_layer.weight",
    "proj_bias": "proj_layer.bias",
}


@dataclass(frozen=True)
class Case:
    """One intervention class with its settings, tied or untied."""

    method: str
    tied: bool
    act_fn: str | None = None
    add_bias: bool | None = None

    @property
    def name(self) -> str:
        parts = [self.method]
        parts += ["bias"] if self.add_bias else []
        parts += [self.act_fn] if self.act_fn else []
        return "_".join([*parts, "tied" if self.tied else "untied"])

    @property
    def intervention_class(self) -> str:
        return f"{self.method.capitalize()}Intervention"

    @property
    def slots(self) -> list[tuple[int, str]]:
        """Return (layer, plain module name) in the order in which pyreft takes locations."""
        if self.tied:
            return [(layer, f"layer{layer}") for layer in LAYERS]
        sides = ("prefix", "suffix")
        return [(layer, f"layer{layer}.{side}") for side in sides for layer in LAYERS]


def all_cases() -> list[Case]:
    cases = []
    for tied in (True, False):
        for method in ("loreft", "consreft", "lobireft", "direft"):
            cases.append(Case(method, tied))
        for method in ("noreft", "nodireft"):
            cases += [Case(method, tied, add_bias=bias) for bias in (False, True)]
        cases.append(Case("loreft", tied, act_fn="relu"))
        cases.append(Case("nodireft", tied, act_fn="gelu", add_bias=False))
    return cases


# ---------------------------------------------------------------- base model and batch


def write_base(out: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BASE_CONFIG))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "base.safetensors", metadata={"format": "pt"})
    (out / "base_config.json").write_text(json.dumps(BASE_CONFIG, indent=2) + "\n")


def load_base(out: Path) -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((out / "base_config.json").read_text()))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(out / "base.safetensors"))
    return model.eval()


def random_rows() -> list[tuple[list[int], list[int]]]:
    """Return (prompt, completion) token ids, each prompt opened by BOS."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt_length, completion_length in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True):
        size = prompt_length - 1 + completion_length
        words = torch.randint(FIRST_WORD, VOCAB, (size,), generator=generator).tolist()
        rows.append(([BOS, *words[: prompt_length - 1]], words[prompt_length - 1 :]))
    return rows


def pad_right(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def training_batch() -> dict[str, Tensor]:
    """Return the right-padded batch, without pyreft's sink token."""
    rows = random_rows()
    return {
        "input_ids": pad_right([prompt + completion for prompt, completion in rows], PAD),
        "attention_mask": pad_right([[1] * len(p + c) for p, c in rows], 0),
        "labels": pad_right([[IGNORE] * len(p) + c for p, c in rows], IGNORE),
        "prompt_length": torch.tensor([len(prompt) for prompt, _ in rows]),
    }


def with_sink(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepend the unattended, unlabelled pad token to which pyreft points its unused slots."""
    column = torch.ones(len(batch["input_ids"]), 1, dtype=torch.long)
    fills = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORE}
    return {key: torch.cat([column * fill, batch[key]], 1) for key, fill in fills.items()}


def row_locations(prompt_length: int, tied: bool) -> list[list[int]]:
    """Return pyreft's own locations of one row, per intervention; -1 is an unused slot."""
    return pyreft.get_intervention_locations(
        last_position=prompt_length,
        positions=POSITIONS,
        num_interventions=len(LAYERS) * (1 if tied else 2),
        share_weights=tied,
        pad_mode="first",
    )


def edited_positions() -> dict[str, list[list[int]]]:
    """Return the edited positions of each row by side, counted from the first prompt token."""
    rows = [row_locations(length, tied=False) for length in PROMPT_LENGTHS]
    sides = {"prefix": 0, "suffix": len(LAYERS)}
    return {side: [[s for s in row[i] if s >= 0] for row in rows] for side, i in sides.items()}


def sink_locations(tied: bool, offsets: list[int] | None = None) -> list[list[list[int]]]:
    """Return locations (intervention, row, slot) in a batch whose rows start with the sink.

    `offsets` is the left padding before each row's sink.
    """
    starts = offsets or [0] * len(PROMPT_LENGTHS)
    rows = [
        [[slot + 1 + start for slot in slots] for slots in row_locations(length, tied)]
        for length, start in zip(PROMPT_LENGTHS, starts, strict=True)
    ]
    return [list(per_row) for per_row in zip(*rows, strict=True)]


# ---------------------------------------------------------------- pyreft


def build(case: Case, seed: int, out: Path) -> pyreft.ReftModel:
    """Return the base model with freshly initialised interventions.

    The rank is repeated in the representation, without which pyreft cannot load what it saved.
    """
    torch.manual_seed(seed)
    options = {"embed_dim": HIDDEN, "low_rank_dimension": RANK}
    options |= {"dtype": torch.float32, "dropout": 0.0, "act_fn": case.act_fn}
    if case.add_bias is not None:
        options["add_bias"] = case.add_bias
    intervention = getattr(pyreft, case.intervention_class)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": intervention(**options),
        }
        for layer, _ in case.slots
    ]
    config = pyreft.ReftConfig(representations=representations)
    return pyreft.get_reft_model(load_base(out), config, set_device=False)


def interventions(case: Case, reft: pyreft.ReftModel) -> dict[str, torch.nn.Module]:
    """Return the intervention modules under their plain names."""
    modules = (reft.interventions[key] for key in reft.sorted_keys)
    return {plain: module for (_, plain), module in zip(case.slots, modules, strict=True)}


def fetch(module: torch.nn.Module, path: str) -> Tensor | None:
    """Return the tensor at a dotted path, or None if this class has none there."""
    if path == "learned_source.bias" and isinstance(module.learned_source, torch.nn.Parameter):
        return module.learned_source  # Consreft, Lobireft: the learned constant is the bias
    value = module
    for part in path.split("."):
        value = getattr(value, part, None)  # pyreft's classes differ in what they hold
    return value


def live_tensors(case: Case, reft: pyreft.ReftModel) -> dict[str, Tensor]:
    """Return pyreft's tensors under plain names, in pyreft's orientation."""
    tensors = {}
    for module_name, module in interventions(case, reft).items():
        for plain, path in PLAIN_NAMES.items():
            tensor = fetch(module, path)
            if tensor is not None:
                tensors[f"{module_name}.{plain}"] = tensor
    return tensors


def oriented(name: str, tensor: Tensor) -> Tensor:
    plain = tensor.T if name.endswith(".R") else tensor
    return plain.detach().clone().contiguous()


def parameters(case: Case, reft: pyreft.ReftModel) -> dict[str, Tensor]:
    return {name: oriented(name, tensor) for name, tensor in live_tensors(case, reft).items()}


def forward(case: Case, reft: pyreft.ReftModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (loss, logits at the real tokens (n_real, vocab)) of pyreft's own forward."""
    inputs = with_sink(batch)
    labels = inputs.pop("labels")
    locations = {"sources->base": (None, sink_locations(case.tied))}
    _, output = reft(inputs, unit_locations=locations, labels=labels)
    return output.loss, output.logits[inputs["attention_mask"].bool()]


def gradients(case: Case, reft: pyreft.ReftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return dL/d(plain tensor); for R with respect to the materialised matrix.

    Inside `cached()` every read of the parametrized weight gives one and the same tensor.
    """
    with parametrize.cached():
        tensors = live_tensors(case, reft)
        loss, _ = forward(case, reft, batch)
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    named = zip(tensors, grads, strict=True)
    return {name: oriented(name, grad) for name, grad in named if grad is not None}


def freeze_rotations(reft: pyreft.ReftModel) -> None:
    for intervention in reft.interventions.values():
        intervention.rotate_layer.requires_grad_(False)


def train(case: Case, reft: pyreft.ReftModel, batch: dict[str, Tensor]) -> list[float]:
    """Take the AdamW steps on one batch and return the loss before each step."""
    trained = [p for p in reft.get_trainable_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **TRAINING)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = forward(case, reft, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- generation


def generate(reft: pyreft.ReftModel, ids: Tensor, mask: Tensor, locations: list) -> Tensor:
    """Return the new tokens only, greedy, edited at prefill only."""
    _, tokens = reft.generate(
        {"input_ids": ids, "attention_mask": mask},
        unit_locations={"sources->base": (None, locations)},
        intervene_on_prompt=True,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
    )
    return tokens[:, ids.shape[1] :].contiguous()


def generate_alone(case: Case, reft: pyreft.ReftModel) -> Tensor:
    locations = sink_locations(case.tied)
    rows = []
    for i, (prompt, _) in enumerate(random_rows()):
        ids = torch.tensor([[PAD, *prompt]])
        mask = torch.tensor([[0] + [1] * len(prompt)])
        rows.append(generate(reft, ids, mask, [[slots[i]] for slots in locations]))
    return torch.cat(rows)


def generate_batched(case: Case, reft: pyreft.ReftModel) -> Tensor:
    """Generate for all prompts at once, left-padded, each with its sink right before it."""
    prompts = [prompt for prompt, _ in random_rows()]
    longest = max(PROMPT_LENGTHS)
    offsets = [longest - len(prompt) for prompt in prompts]
    pairs = list(zip(offsets, prompts, strict=True))
    ids = torch.tensor([[PAD] * (offset + 1) + prompt for offset, prompt in pairs])
    mask = torch.tensor([[0] * (offset + 1) + [1] * len(prompt) for offset, prompt in pairs])
    return generate(reft, ids, mask, sink_locations(case.tied, offsets))


# ---------------------------------------------------------------- recording


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def snapshot(case: Case, reft: pyreft.ReftModel, batch: dict[str, Tensor], phase: str) -> tuple:
    """Return (tensors, metadata) of one set of parameters: what it is and what it computes."""
    with torch.no_grad():
        loss, logits = forward(case, reft, batch)
    alone = generate_alone(case, reft)
    tensors = prefixed(phase, parameters(case, reft))
    tensors |= {f"logits.{phase}": logits.contiguous(), f"generated.{phase}": alone}
    same = torch.equal(alone, generate_batched(case, reft))
    return tensors, {"loss": loss.item(), "batched_generation_equal": same}


def record(case: Case, seed: int, batch: dict[str, Tensor], out: Path) -> dict:
    """Write one case's tensors and return its entry of the index."""
    reft = build(case, seed, out)
    tensors, initial = snapshot(case, reft, batch, "initial")
    tensors |= prefixed("grad", gradients(case, reft, batch))
    losses = {"full": train(case, reft, batch)}
    final_tensors, trained = snapshot(case, reft, batch, "trained")
    tensors |= final_tensors
    if case.name in SAVED:
        reft.save(str(out / "saved" / case.name))
    if any(name.endswith(".R") for name in tensors):
        frozen = build(case, seed, out)
        freeze_rotations(frozen)
        losses["frozen_R"] = train(case, frozen, batch)
        tensors |= prefixed("trained_frozen_R", parameters(case, frozen))
    save_file(tensors, out / f"{case.name}.safetensors")
    return entry(case, seed) | {"initial": initial, "trained": trained, "losses": losses}


def entry(case: Case, seed: int) -> dict:
    return {
        "name": case.name,
        "file": f"{case.name}.safetensors",
        "intervention": case.intervention_class,
        "tied": case.tied,
        "act_fn": case.act_fn,
        "add_bias": case.add_bias,
        "layers": list(LAYERS),
        "rank": RANK,
        "positions": POSITIONS,
        "seed": seed,
        "saved": f"saved/{case.name}" if case.name in SAVED else None,
    }


def record_batch(batch: dict[str, Tensor], out: Path) -> dict:
    """Write the batch with the unedited logits and return its entry of the index."""
    model = load_base(out)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        output = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
        sunk = model(**with_sink(batch))
    logits = output.logits[mask]
    shift = (sunk.logits[:, 1:][mask] - logits).abs().max().item()
    save_file(batch | {"base_logits": logits}, out / "batch.safetensors")
    return {
        "file": "batch.safetensors",
        "pad_token_id": PAD,
        "prompt_lengths": list(PROMPT_LENGTHS),
        "completion_lengths": list(COMPLETION_LENGTHS),
        "edited_positions": edited_positions(),
        "base_loss": output.loss.item(),
        "max_logit_change_by_sink": shift,
    }


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "pyreft", "pyvene", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/pyreft"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "saved", ignore_errors=True)
    torch.set_num_threads(1)
    write_base(out)
    batch = training_batch()
    index = {
        "versions": versions(),
        "base": {"weights": "base.safetensors", "config": "base_config.json"},
        "batch": record_batch(batch, out),
        "training": {"optimizer": "AdamW", "steps": STEPS} | TRAINING,
        "generation": {"max_new_tokens": NEW_TOKENS, "do_sample": False},
        "cases": [record(case, 100 + i, batch, out) for i, case in enumerate(all_cases())],
    }
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    print(json.dumps({"cases": len(index["cases"]), "out": str(out)}))


if __name__ == "__main__":
    main()

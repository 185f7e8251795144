"""Record checkpoints of AdapterHub's adapters, in both of its formats, and what they compute.

Runs in an environment of its own (see README.md beside this file). It imports nothing from this
library.

    python benchmarks/parity/record_adapters.py --out tests/data/convert
"""

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import DiReftConfig, LoReftConfig, NoReftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

PARITY = Path("tests/data/pyreft")
SHORT = [1, 9]  # fewer tokens than most positions
BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
        "num_labels": 3, "pad_token_id": 0, "architectures": ["BertForSequenceClassification"],
        "model_type": "bert"}  # fmt: skip

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "loreft": (LoReftConfig, {"r": 4, "prefix_positions": 2, "suffix_positions": 1}),
    "loreft_tied": (LoReftConfig, {"r": 3, "prefix_positions": 1, "suffix_positions": 2,
                                   "tied_weights": True, "layers": [0, 2]}),
    "loreft_prefix": (LoReftConfig, {"r": 2}),
    "noreft": (NoReftConfig, {"r": 4, "suffix_positions": 2, "prefix_positions": 1,
                              "non_linearity": "relu"}),
    "direft": (DiReftConfig, {"r": 4, "suffix_positions": 3, "prefix_positions": 0,
                              "non_linearity": "leakyrelu"}),
    "direft_tied": (DiReftConfig, {"r": 4, "suffix_positions": 1, "prefix_positions": 1,
                                   "tied_weights": True, "dropout": 0.1}),
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((PARITY / "base_config.json").read_text()))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(PARITY / "base.safetensors"))
    return model.eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(4)
    return BertForSequenceClassification(BertConfig(**BERT)).eval()


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    trained = {n: p for n, p in model.named_parameters() if ".refts." in n}
    optimizer = torch.optim.Adam(trained.values(), lr=0.05)
    for _ in range(3):
        for name, p in trained.items():
            p.grad = torch.randn(p.shape, generator=generator)
            if name.endswith(".original"):  # torch casts its diagonal to int, and never trains it
                p.grad.fill_diagonal_(0)
        optimizer.step()


def rows() -> tuple[Tensor, Tensor]:
    batch = load_file(PARITY / "batch.safetensors")
    return batch["input_ids"], batch["attention_mask"]


def llama_logits(model: torch.nn.Module) -> Tensor:
    """Return logits of the real tokens, each row computed alone: all of it is the prompt."""
    found = []
    for ids, mask in zip(*rows(), strict=True):
        with torch.no_grad():
            found.append(model(input_ids=ids[mask.bool()][None]).logits[0])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/convert"))
    out = parser.parse_args().out / "adapters"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    logits: dict[str, Tensor] = {}
    index = []
    for name, (kind, settings) in CASES.items():
        torch.manual_seed(11)
        model = llama()
        adapters.init(model)
        model.add_adapter("mine", config=kind(**settings))
        model.set_active_adapters("mine")
        randomise(model)
        model.eval()
        logits[name] = llama_logits(model)
        if settings.get("suffix_positions", 0) <= len(SHORT):  # more, and it mixes up its rows
            with torch.no_grad():
                logits[f"{name}.short"] = model(input_ids=torch.tensor([SHORT])).logits[0]
        for form in (False, True):
            folder = out / f"{name}_{'safetensors' if form else 'bin'}"
            model.save_adapter(str(folder), "mine", use_safetensors=form)
        index.append({"name": name, "method": name.split("_")[0], "settings": settings})
    torch.manual_seed(11)
    model = bert()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "bert.safetensors")
    (out / "bert_config.json").write_text(json.dumps(BERT, indent=1) + "\n")
    adapters.init(model)
    model.add_adapter("mine", config=LoReftConfig(r=2, prefix_positions=2, suffix_positions=1))
    model.set_active_adapters("mine")
    randomise(model)
    model.classifier.weight.data.mul_(2.0)
    model.eval()
    ids, mask = rows()
    with torch.no_grad():
        logits["bert"] = model(input_ids=ids, attention_mask=mask).logits
    model.save_adapter(str(out / "bert_head"), "mine")
    model.save_head(str(out / "bert_head"), "mine")
    save_file(logits, out / "logits.safetensors")
    packages = ("torch", "transformers", "adapters")
    entry = {"versions": {n: version(n) for n in packages}, "cases": index}
    (out / "index.json").write_text(json.dumps(entry, indent=1) + "\n")
    print(json.dumps({"adapters": len(index) + 1}))


if __name__ == "__main__":
    main()

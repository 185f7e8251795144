"""Record checkpoints that pyreft, EasySteer and ms-swift write, and what they compute.

Each runs in the environment that README.md beside this file describes, on the tiny Llama and the
batch of record_pyreft.py. It imports nothing from this library.

    python benchmarks/parity/record_checkpoints.py pyreft
    python benchmarks/parity/record_checkpoints.py pyreft-dots
    python benchmarks/parity/record_checkpoints.py easysteer --source CHECKOUT
    python benchmarks/parity/record_checkpoints.py ms-swift --source CHECKOUT
"""

import argparse
import json
import shutil
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

PARITY = Path("tests/data/pyreft")
HIDDEN, RANK, LAYERS, LABELS = 32, 4, (0, 2), 3
PROMPT = (9, 6, 4, 3)


def base_model(kind: type = LlamaForCausalLM, **more: Any) -> Any:
    config = LlamaConfig(**json.loads((PARITY / "base_config.json").read_text()), **more)
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = kind(config)
    state = load_file(PARITY / "base.safetensors")
    model.load_state_dict(state, strict=kind is LlamaForCausalLM)
    return model.eval()


def batch() -> dict[str, Tensor]:
    found = load_file(PARITY / "batch.safetensors")
    return {name: found[name] for name in ("input_ids", "attention_mask", "labels")}


def with_sink(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepend the unattended pad token that unused slots point to, as the paper's script does."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    column = torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)
    return {key: torch.cat([column * fills[key], inputs[key]], 1) for key in fills}


def locations(library: Any, positions: str, interventions: int, share: bool) -> list:
    """Return the library's own locations (intervention, row, slot), moved by the sink."""
    rows = [
        library.get_intervention_locations(
            last_position=n, positions=positions, num_interventions=interventions,
            share_weights=share, pad_mode="first",
        )
        for n in PROMPT
    ]  # fmt: skip
    moved = [[[slot + 1 for slot in slots] for slots in row] for row in rows]
    return [list(per_row) for per_row in zip(*moved, strict=True)]


def randomise(reft: Any) -> None:
    """Take three steps away from the start, so that no parameter has the value it began with."""
    optimizer = torch.optim.Adam(reft.get_trainable_parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        for p in reft.get_trainable_parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if p.shape == (HIDDEN, RANK):  # torch casts its diagonal to int, and never trains it
                p.grad.fill_diagonal_(0)
        optimizer.step()


def logits(reft: Any, where: list | None) -> Tensor:
    inputs = with_sink(batch())
    del inputs["labels"]
    unit = None if where is None else {"sources->base": (None, where)}
    with torch.no_grad():
        _, output = reft(inputs, unit_locations=unit)
    return output.logits[inputs["attention_mask"].bool()]


def build(
    library: Any, model: Any, cls: str, components: list[dict[str, Any]], **options: Any
) -> Any:
    torch.manual_seed(11)
    arguments = {"embed_dim": HIDDEN, "low_rank_dimension": RANK, "dtype": torch.float32} | options
    representations = [
        component | {"low_rank_dimension": RANK, "intervention": getattr(library, cls)(**arguments)}
        for component in components
    ]
    config = library.ReftConfig(representations=representations)
    reft = library.get_reft_model(model, config, set_device=False)
    randomise(reft)
    return reft


def blocks(sides: int = 1) -> list[dict[str, Any]]:
    return [{"layer": layer, "component": "block_output"} for layer in LAYERS] * sides


class Records:
    """The cases of one library: an index, their logits in one file, a directory each."""

    def __init__(self, out: Path, library: str) -> None:
        self.out, self.library = out / library, library
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.index: list[dict[str, Any]] = []
        self.logits: dict[str, Tensor] = {}

    def add(self, name: str, output: Tensor, save: Any, **facts: Any) -> None:
        save(str(self.out / name))
        self.index.append({"name": name, **facts})
        self.logits[name] = output.contiguous()

    def close(self, packages: tuple[str, ...]) -> None:
        save_file(self.logits, self.out / "logits.safetensors")
        entry = {"versions": {n: version(n) for n in packages}, "cases": self.index}
        (self.out / "index.json").write_text(json.dumps(entry, indent=1) + "\n")
        print(json.dumps({self.library: len(self.index)}))


# ---------------------------------------------------------------- pyreft

CLASSES = {
    "loreft": ("LoreftIntervention", {}),
    "loreft_relu": ("LoreftIntervention", {"act_fn": "relu"}),
    "noreft": ("NoreftIntervention", {"add_bias": False}),
    "noreft_bias": ("NoreftIntervention", {"add_bias": True}),
    "consreft": ("ConsreftIntervention", {}),
    "lobireft": ("LobireftIntervention", {}),
    "direft": ("DireftIntervention", {}),
    "direft_gelu": ("DireftIntervention", {"act_fn": "gelu"}),
    "nodireft_bias": ("NodireftIntervention", {"add_bias": True}),
}


def record_pyreft(out: Path) -> None:
    import pyreft

    records = Records(out, "pyreft")
    for name, (cls, options) in CLASSES.items():
        for sides in (1, 2):
            reft = build(pyreft, base_model(), cls, blocks(sides), **options)
            where = locations(pyreft, "f2+l3", len(LAYERS) * sides, sides == 1)
            full = f"{name}_{'tied' if sides == 1 else 'untied'}"
            records.add(full, logits(reft, where), reft.save, positions="f2+l3",
                        act_fn=options.get("act_fn", "linear"))  # fmt: skip
    components = {
        "path": [{"component": f"model.layers[{i}].output"} for i in LAYERS],
        "mlp": [{"layer": i, "component": "mlp_output"} for i in LAYERS],
        "attention_path": [{"component": f"model.layers[{i}].self_attn.output"} for i in LAYERS],
    }
    for name, where in components.items():
        reft = build(pyreft, base_model(), "LoreftIntervention", where)
        output = logits(reft, locations(pyreft, "l2", len(where), True))
        records.add(name, output, reft.save, positions="l2", act_fn="linear")
    reft = build(pyreft, base_model(), "LoreftIntervention", blocks())
    records.add("everywhere", logits(reft, None), reft.save, positions="all", act_fn="linear")
    record_lora(pyreft, records)
    record_classifier(pyreft, records)
    record_trainer(pyreft, records)
    record_resumed(pyreft, records)
    records.close(("torch", "transformers", "pyreft", "pyvene", "peft"))


def record_lora(pyreft: Any, records: Records) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"],
                      init_lora_weights=False)  # fmt: skip
    model = get_peft_model(base_model(), lora)
    where = [{"component": f"base_model.model.model.layers[{i}].output"} for i in LAYERS]
    reft = build(pyreft, model, "LoreftIntervention", where)
    reft.model.enable_adapter_layers()  # pyreft froze all of the base, the LoRA included
    for name, p in reft.model.named_parameters():
        p.requires_grad_("lora_" in name)
    output = logits(reft, locations(pyreft, "f2+l3", len(where), True))
    records.add("with_lora", output, lambda d: reft.save(d, include_model=True),
                positions="f2+l3", act_fn="linear", lora_alpha=6)  # fmt: skip


def record_classifier(pyreft: Any, records: Records) -> None:
    model = base_model(LlamaForSequenceClassification, num_labels=LABELS)
    reft = build(pyreft, model, "LoreftIntervention", blocks())
    reft.model.score.weight.requires_grad_(True)
    # Without a sink: transformers 4.45 takes the first pad token for the end of the sequence.
    where = [[[n - 1] for n in PROMPT]] * len(LAYERS)
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    with torch.no_grad():
        _, output = reft(inputs, unit_locations={"sources->base": (None, where)})
    records.add("classifier", output.logits, lambda d: reft.save(d, include_model=True),
                positions="l1", act_fn="linear", task_type="SEQ_CLS")  # fmt: skip


def record_trainer(pyreft: Any, records: Records) -> None:
    """What pyreft's own Trainer leaves in checkpoint-2."""
    reft = build(pyreft, base_model(), "DireftIntervention", blocks(2))
    where = torch.tensor(locations(pyreft, "f2+l3", 2 * len(LAYERS), False)).permute(1, 0, 2)
    rows = with_sink(batch()) | {"intervention_locations": where}
    data = [{name: rows[name][i] for name in rows} for i in range(len(PROMPT))]
    folder = records.out / "trainer"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, per_device_train_batch_size=4,
        weight_decay=0.0, report_to=[], use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip

    class Saver(pyreft.ReftTrainerForCausalLM):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            """It is not read, and large."""

        def _save_rng_state(self, output_dir: str) -> None:
            """It is not read, and large."""

    trainer = Saver(model=reft, args=arguments, train_dataset=data, data_collator=None)
    trainer.data_collator = Trainer(model=base_model(), args=arguments).data_collator
    trainer.train()
    for file in [*folder.rglob("*.bin"), *folder.glob("runs")]:
        if file.name == "training_args.bin":
            file.unlink()
    output = logits(reft, [w.tolist() for w in where.permute(1, 0, 2)])
    records.add("trainer", output, lambda _: None, positions="f2+l3", act_fn="linear",
                folder="trainer/checkpoint-2")  # fmt: skip


def record_resumed(pyreft: Any, records: Records) -> None:
    """Loading makes R's complement random: R is not orthonormal after the next steps."""
    reft = build(pyreft, base_model(), "LoreftIntervention", blocks())
    for module in reft.interventions.values():
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
        module.rotate_layer.parametrizations.weight[0].base.detach_()
    randomise(reft)
    output = logits(reft, locations(pyreft, "f2+l3", len(LAYERS), True))
    records.add("resumed", output, reft.save, positions="f2+l3", act_fn="linear")


def record_dots(out: Path) -> None:
    """With pyvene 0.1.6 on the path: its names have dots."""
    import pyreft

    records = Records(out, "pyreft-dots")
    paths = [{"component": f"model.layers[{i}].output"} for i in LAYERS]
    for name, components, share in (("block_output", blocks(2), False), ("path", paths, True)):
        reft = build(pyreft, base_model(), "LoreftIntervention", components)
        where = locations(pyreft, "f2+l3", len(components), share)
        records.add(name, logits(reft, where), reft.save, positions="f2+l3", act_fn="linear")
    records.close(("torch", "transformers", "pyreft"))


# ---------------------------------------------------------------- those who wrap or copy it


def record_easysteer(source: Path, out: Path) -> None:
    """EasySteer's copy of pyreft; its package itself wants vLLM, and is not run."""
    for name in ("easysteer", "easysteer.reft"):
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from easysteer.reft import pyreft as library
    from easysteer.reft.pyreft.data.dataset import get_intervention_locations
    from easysteer.reft.pyreft.reft import algorithms

    library.get_intervention_locations = get_intervention_locations
    records = Records(out, "easysteer")
    for name in ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft", "Bias"):
        cls = f"{name}Intervention"
        setattr(library, cls, getattr(algorithms, cls))
        reft = build(library, base_model(), cls, blocks()[:1], add_bias=True)
        output = logits(reft, locations(library, "l1", 1, True))
        records.add(name.lower(), output, reft.save, positions="l1", act_fn="linear")
    records.close(("torch", "transformers"))


def record_swift(source: Path, out: Path) -> None:
    """ms-swift's tuner, which wraps pyreft and gives it no locations."""
    sys.path.insert(0, str(source))
    from swift.tuners import Swift
    from swift.tuners.reft import ReftConfig

    records = Records(out, "ms-swift")
    for name, cls, args in (
        ("loreft", "LoreftIntervention", {"act_fn": "relu"}),
        ("nodireft", "NodireftIntervention", {"add_bias": True}),
        ("lobireft", "LobireftIntervention", {}),
    ):
        torch.manual_seed(11)
        config = ReftConfig(layer_key="model.layers", layers=[1, 2], r=RANK,
                            intervention_type=cls, args=json.dumps(args))  # fmt: skip
        model = base_model()
        swift = Swift.prepare_model(model, {"reft": config})
        reft = swift.base_model
        for intervention in reft.interventions.values():
            intervention.to(torch.float32)
        randomise(reft)
        inputs = batch()
        with torch.no_grad():
            output = swift(**inputs).logits[inputs["attention_mask"].bool()]
        records.add(name, output, swift.save_pretrained)
        shutil.rmtree(records.out / name / "runs", ignore_errors=True)
    records.close(("torch", "transformers", "pyreft", "pyvene"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=("pyreft", "pyreft-dots", "easysteer", "ms-swift"))
    parser.add_argument("--source", type=Path, help="a checkout of EasySteer or ms-swift")
    parser.add_argument("--out", type=Path, default=Path("tests/data/convert"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.library == "pyreft":
        record_pyreft(given.out)
    elif given.library == "pyreft-dots":
        record_dots(given.out)
    elif given.library == "easysteer":
        record_easysteer(given.source, given.out)
    else:
        record_swift(given.source, given.out)


if __name__ == "__main__":
    main()

"""Check that pyreft and EasySteer compute from what `reftune convert` writes what reftune does.

`write` runs here and writes adapters, their conversions and our logits; the checks run in the
other libraries' environments (README.md beside this file). The last line is JSON.

    python benchmarks/parity/check_written.py write /tmp/written
    PYREFT-ENV/bin/python benchmarks/parity/check_written.py pyreft /tmp/written
    python benchmarks/parity/check_written.py easysteer /tmp/written --source ITS_VLLM_CHECKOUT
"""

import argparse
import base64
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PARITY = Path("tests/data/pyreft")
CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
    "direft": "NodireftIntervention",
    "direft_orthonormal": "DireftIntervention",
}
LAYERS, RANK, LENGTH = [0, 2], 4, 9
POSITIONS = "f2+l2"  # sides of one length: pyreft pads others, and needs a sink token for that


def base_model() -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((PARITY / "base_config.json").read_text()))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(PARITY / "base.safetensors"))
    return model.eval()


def prompt() -> Tensor:
    return load_file(PARITY / "batch.safetensors")["input_ids"][:1, :LENGTH]


def write(out: Path) -> float:
    from peft import get_peft_model

    from reftune import ReftConfig, reft_layers
    from reftune.convert import Answers, convert

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text((PARITY / "base_config.json").read_text())
    logits = {}
    for method in CLASSES:
        for tied in ("all", "sides"):
            torch.manual_seed(3)
            config = ReftConfig(method=method, r=RANK, layers=LAYERS, positions=POSITIONS,
                                tied=tied, task_type="CAUSAL_LM")  # fmt: skip
            model = get_peft_model(base_model(), config).eval()
            for layer in reft_layers(model).values():
                for name, p in layer.phi("default").named_parameters():
                    if name != "R":
                        p.data.normal_(0, 0.3)
            name = f"{method}_{tied}"
            with torch.no_grad():
                logits[name] = model(input_ids=prompt()).logits[0].contiguous()
            model.peft_config["default"].base_model_name_or_path = str(out)
            model.save_pretrained(str(out / "ours" / name))
            for to in ("pyreft", "easysteer"):
                convert(out / "ours" / name, out / to / name, to=to, answers=Answers(),
                        overwrite=True)  # fmt: skip
    save_file(logits, out / "logits.safetensors")
    return 0.0


def check_pyreft(out: Path) -> float:
    """Load each directory as pyreft loads (by file where its own `load` cannot), and compare."""
    import pyreft

    expected, worst = load_file(out / "logits.safetensors"), 0.0
    for folder in sorted((out / "pyreft").iterdir()):
        method, _, tied = folder.name.rpartition("_")
        sides = 2 if tied == "sides" else 1
        if method not in ("consreft", "lobireft"):  # load makes Linear bfloat16, or fails
            reft = built(pyreft, CLASSES[method], sides)
            for key, module in reft.interventions.items():
                state = torch.load(folder / f"intkey_{key}.bin", weights_only=True)
                module.load_state_dict(state, strict=False)
        else:
            reft = pyreft.ReftModel.load(str(folder), base_model())
            for module in reft.interventions.values():
                module.float()
        where = pyreft.get_intervention_locations(
            last_position=LENGTH, positions=POSITIONS, num_interventions=len(LAYERS) * sides,
            share_weights=sides == 1,
        )  # fmt: skip
        with torch.no_grad():
            _, output = reft(
                {"input_ids": prompt(), "attention_mask": torch.ones(1, LENGTH)},
                unit_locations={"sources->base": (None, [[slots] for slots in where])},
            )
        worst = max(worst, difference(output.logits[0], expected[folder.name], folder.name))
    return worst


def built(pyreft: Any, name: str, sides: int) -> Any:
    options = {"embed_dim": 32, "low_rank_dimension": RANK, "dtype": torch.float32}
    options |= {"add_bias": False} if name.startswith("No") else {}
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": getattr(pyreft, name)(**options),
        }
        for layer in LAYERS * sides
    ]
    config = pyreft.ReftConfig(representations=representations)
    return pyreft.get_reft_model(base_model(), config, set_device=False)


def check_easysteer(out: Path, source: Path) -> float:
    """Validate by its own specification, hash by its own payloads, edit by its own formula."""
    for name in ("vllm", "vllm.steer_vectors"):
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from vllm.steer_vectors import payloads
    from vllm.steer_vectors.api import SteeringSpec

    expected, worst = load_file(out / "logits.safetensors"), 0.0
    for folder in sorted((out / "easysteer").iterdir()):
        spec = json.loads((folder / "steering.json").read_text())
        checked = SteeringSpec(**spec)
        edits: dict[int, list[tuple[list[int], Any]]] = {}
        for vector in checked.vectors:
            assert rehashed(payloads, vector.data) == vector.data["sha256"], folder.name
            ((layer, payload),) = payloads.materialize(
                vector.data, "cpu", torch.float32, vector.layers
            ).items()
            tokens = set()
            if vector.apply.prompt_window is not None:
                tokens |= set(range(LENGTH)[slice(*vector.apply.prompt_window)])
            tokens |= {i % LENGTH for i in vector.apply.prompt_positions or []}
            edits.setdefault(layer, []).append((sorted(tokens), payload))
        worst = max(worst, difference(edited(edits), expected[folder.name], folder.name))
    return worst


def rehashed(payloads: Any, wire: dict[str, Any]) -> str:
    arrays = {
        name: torch.frombuffer(bytearray(base64.b64decode(t["data"])), dtype=torch.float32).view(
            t["shape"]
        )
        for name, t in wire["tensors"].items()
    }
    if wire["kind"] == "direction":
        directions = {int(n.removeprefix("layer.")): t for n, t in arrays.items()}
        return payloads.DirectionVector(directions).to_wire()["sha256"]
    return payloads.ReftIntervention(**arrays, layer=wire["extra"]["layer"]).to_wire()["sha256"]


def edited(edits: dict[int, list[tuple[list[int], Any]]]) -> Tensor:
    model = base_model()

    def hook(vectors: list[tuple[list[int], Any]]) -> Any:
        def edit(module: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            new = h.clone()
            for tokens, payload in vectors:
                rows = h[:, tokens]
                if isinstance(payload, Tensor):
                    new[:, tokens] = rows + payload
                    continue
                R, W = payload["rotate_layer"], payload["learned_source_weight"]
                new[:, tokens] = (
                    rows + (rows @ W.T + payload["learned_source_bias"] - rows @ R) @ R.T
                )
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return edit

    for layer, vectors in edits.items():
        model.model.layers[layer].register_forward_hook(hook(vectors))
    with torch.no_grad():
        return model(input_ids=prompt()).logits[0]


def difference(found: Tensor, expected: Tensor, name: str) -> float:
    error = (found - expected).abs().max().item()
    print(f"{name}: {error:.1e}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "pyreft", "easysteer"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--source", type=Path, help="a checkout of EasySteer's fork of vLLM")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "write":
        worst = write(given.directory)
    elif given.what == "pyreft":
        worst = check_pyreft(given.directory)
    else:
        worst = check_easysteer(given.directory, given.source)
    print(json.dumps({"what": given.what, "largest difference": worst}))


if __name__ == "__main__":
    main()

"""EasySteer's steering specification, out: `steering.json`, with the tensors inside.

Its engine has one low-rank formula, h + (h W^T + b - h R^T) R without activation, which five of our
methods can be written in, and a plain added vector. Tensors are float32, base64, and identified by
a hash over names, shapes and bytes (read in its fork of vLLM, model_hooks/steering/payloads.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftune.convert.adapter import Adapter
from reftune.errors import ConversionError

SPEC = "steering.json"
_WIRE_VERSION = 1

# Our method -> (W, b) of its formula R^T (W h + b - R h), for the same R
_AS_LOREFT: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "loreft": lambda phi: phi["W"],
    "noreft": lambda phi: phi["W"],
    "direft": lambda phi: phi["W"] + phi["R"],
    "direft_orthonormal": lambda phi: phi["W"] + phi["R"],
    "consreft": lambda phi: torch.zeros_like(phi["R"]),
}


def check_easysteer_has_words(adapter: Adapter) -> None:
    """Raise ConversionError, in a sentence, for what EasySteer cannot compute."""
    config = adapter.config
    if config.method not in (*_AS_LOREFT, "lobireft", "red"):
        raise ConversionError(f"EasySteer has no formula for method {config.method!r}.")
    if config.act_fn not in (None, "linear"):
        raise ConversionError(
            f"EasySteer's interventions have no activation; this adapter has {config.act_fn!r}."
        )
    if config.target_modules is not None:
        raise ConversionError("EasySteer edits the outputs of layers; this adapter has others.")
    if adapter.saved:
        raise ConversionError(
            f"The adapter has trained modules of the base ({', '.join(adapter.saved)}), which a "
            "specification cannot carry."
        )
    if config.method == "red" and any((phi["scale"] != 1).any() for phi in adapter.phis.values()):
        raise ConversionError(
            "method='red' scales hidden states, for which EasySteer would need a d x d matrix per "
            "layer; only its bias can be expressed."
        )


def write_easysteer(adapter: Adapter, directory: Path) -> None:
    """Write the specification. Raises ConversionError for what it cannot express."""
    check_easysteer_has_words(adapter)
    vectors = []
    for path, phi in adapter.phis.items():
        layer = int(path.rpartition(".")[2])
        clauses = _clauses(adapter)
        for group, clause in enumerate(clauses):
            one = {name: tensor[group] for name, tensor in phi.items()}
            vectors.append(_vector(adapter.config.method, one, layer, clause))
    spec = {"vectors": vectors, "conflict": "priority"}
    (directory / SPEC).write_text(json.dumps(spec) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_readme(adapter), encoding="utf-8")


def easysteer_notes(adapter: Adapter) -> list[str]:
    """Return what a user of the written specification should know."""
    if adapter.config.parsed_positions.everything:
        return []
    return [
        f"EasySteer does not shorten positions ({adapter.config.positions}) in prompts that have "
        "fewer tokens: there it edits more of them."
    ]


def _clauses(adapter: Adapter) -> list[dict[str, Any]]:
    """Return where each group of positions lies, in EasySteer's words."""
    config = adapter.config
    positions, p, s = config.parsed_positions, *_counts(adapter)
    generated = {"generation": "all"} if config.edit_generated else {}
    if positions.everything:
        return [{"prompt": "all", **generated}]
    prefix = {"prompt_window": [0, p]}
    suffix = {"prompt_window": [-s, None], **generated}
    if config.tied == "none":
        clauses: list[dict[str, Any]] = [
            {"prompt_positions": [i]} for i in (*range(p), *range(-s, 0))
        ]
        clauses[-1] |= generated
        return clauses
    if not (p and s):
        return [prefix | generated if p else suffix]
    if config.tied == "sides":
        return [prefix, suffix]
    return [{**prefix, "prompt_positions": list(range(-s, 0)), **generated}]


def _counts(adapter: Adapter) -> tuple[int, int]:
    positions = adapter.config.parsed_positions
    return positions.prefix, positions.suffix


def _vector(
    method: str, phi: Mapping[str, Tensor], layer: int, clause: Mapping[str, Any]
) -> dict[str, Any]:
    if method in ("lobireft", "red"):
        vector = phi["bias"] @ phi["R"] if method == "lobireft" else phi["bias"]
        data = _payload("direction", {f"layer.{layer}": vector}, {})
        return {"data": data, "algorithm": "direct", "layers": [layer], "apply": dict(clause)}
    tensors = {
        "rotate_layer": phi["R"].mT,
        "learned_source_weight": _AS_LOREFT[method](phi),
        "learned_source_bias": phi["bias"],
    }
    data = _payload("reft", tensors, {"layer": layer})
    return {"data": data, "algorithm": "loreft", "layers": [layer], "apply": dict(clause)}


def _payload(kind: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(f"{kind}:{_WIRE_VERSION}".encode())
    wire = {}
    for name in sorted(tensors):
        array = tensors[name].detach().float().contiguous().numpy()
        digest.update(name.encode())
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
        data = base64.b64encode(array.tobytes()).decode()
        wire[name] = {"shape": list(array.shape), "data": data}
    for key in sorted(extra):
        digest.update(f"{key}={extra[key]!r}".encode())
    return {
        "version": _WIRE_VERSION,
        "kind": kind,
        "tensors": wire,
        "extra": dict(extra),
        "sha256": digest.hexdigest(),
    }


def _readme(adapter: Adapter) -> str:
    lines = "\n".join(f"- {note}" for note in easysteer_notes(adapter))
    return f"""# A ReFT adapter as a specification of EasySteer

Base model: `{adapter.config.base_model_name_or_path}`. Send the content of `{SPEC}` as the field
`steering` of a request, or start the server with `--steering-config {SPEC}`.

{lines}
"""

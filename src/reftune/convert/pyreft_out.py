"""Our adapters as pyreft's directories, and what pyreft has no words for.

pyreft's classes and file names since pyvene 0.1.8; `reftune.json` beside them has what pyreft does
not record. A rotation is written as torch's orthogonal parametrization keeps it: d x d for most.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftune.convert.adapter import Adapter
from reftune.convert.keys import RECORD
from reftune.convert.pyreft import CLASSES
from reftune.errors import ConversionError

_METHODS = {method: name for name, method in CLASSES.items() if method != "red"}
_FIELDS = 14  # of pyvene's RepresentationConfig, which is saved as a list without names


def check_pyreft_has_words(adapter: Adapter) -> None:
    """Raise ConversionError, in a sentence, for what pyreft cannot compute."""
    config = adapter.config
    if config.method not in _METHODS:
        raise ConversionError(
            f"pyreft has no method {config.method!r}; it has {', '.join(_METHODS)}."
        )
    if config.tied == "none" and config.parsed_positions.num_groups("none") > 2:
        raise ConversionError(
            "tied='none' has one Phi per position; pyreft has one per layer, or one for the prefix "
            "and one for the suffix."
        )
    if config.edit_generated:
        raise ConversionError(
            "edit_generated=True edits prompt and generated tokens; pyreft's generate edits one or "
            "the other."
        )


def write_pyreft(adapter: Adapter, directory: Path) -> None:
    """Write pyreft's files. Raises ConversionError for what it cannot express."""
    check_pyreft_has_words(adapter)
    config, groups = adapter.config, len(next(iter(adapter.phis.values()))["bias"])
    width = next(iter(adapter.phis.values()))["R"].shape[-1]
    keys, representations = [], []
    for group in range(groups):  # all prefixes first: pyreft takes the halves of its list
        for path, phi in adapter.phis.items():
            key, layer, component = _key(path, config.target_modules is None, group)
            state = _state(config.method, {name: tensor[group] for name, tensor in phi.items()})
            torch.save(state, directory / f"intkey_{key}.bin")
            keys.append(key)
            representations.append([layer, component, "pos", 1, config.r, *[None] * (_FIELDS - 5)])
    name = _METHODS[config.method]
    _write_json(
        directory / "config.json",
        {
            "intervention_constant_sources": [True] * len(keys),
            "intervention_dimensions": [width] * len(keys),
            "intervention_types": [f"<class 'pyreft.interventions.{name}'>"] * len(keys),
            "mode": "parallel",
            "representations": representations,
            "sorted_keys": keys,
        },
    )
    if adapter.saved:
        torch.save(adapter.saved, directory / "pytorch_model.bin")
    _write_json(
        directory / RECORD,
        {
            "base": config.base_model_name_or_path,
            "positions": config.positions,
            "act_fn": config.act_fn or "linear",
            "dropout": config.dropout,
            "short_prompts": config.short_prompts,
            "edit_generated": config.edit_generated,
            "task_type": config.task_type,
        },
    )
    (directory / "README.md").write_text(_readme(adapter, name), encoding="utf-8")


def pyreft_notes(adapter: Adapter) -> list[str]:
    """Return what a user of the written directory should know."""
    found = [
        "pyreft computes positions where it is called: "
        f"get_intervention_locations(positions={adapter.config.positions!r}, share_weights="
        f"{adapter.config.tied != 'sides'}).",
    ]
    if adapter.config.act_fn is not None or adapter.config.dropout:
        found.append(
            "pyreft's load forgets act_fn and dropout: build the interventions with "
            f"act_fn={adapter.config.act_fn!r}, dropout={adapter.config.dropout}, and "
            "load_intervention."
        )
    if adapter.config.short_prompts != "pyreft":
        found.append("A prompt with fewer tokens than its positions is edited by pyreft's rule.")
    if adapter.config.subspaces:
        found.append("The names of subspaces are lost; an example that names none is the same.")
    return found


def _key(path: str, is_layer: bool, group: int) -> tuple[str, int | None, str]:
    """Return pyvene's name of an intervention, and the layer and component that it names."""
    if is_layer:
        layer = int(path.rpartition(".")[2])
        return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{group}", layer, "block_output"
    component = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path) + ".output"
    return f"comp_{component.replace('.', '_')}_unit_pos_nunit_1#{group}", None, component


def _state(method: str, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
    R, bias = phi["R"].contiguous(), phi["bias"].contiguous()
    width = R.shape[1]
    if method == "loreft":
        return {
            "weight": phi["W"].contiguous(),
            "bias": bias,
            "rotate_layer": R.mT.contiguous(),
        }
    sizes = {"embed_dim": torch.tensor(width), "interchange_dim": torch.tensor(width)}
    if method in ("noreft", "direft"):
        linear = {"learned_source.weight": phi["W"].contiguous(), "learned_source.bias": bias}
        return {**sizes, "proj_layer.weight": R, **linear}
    source = (
        {"learned_source": bias}
        if method in ("consreft", "lobireft")
        else {"learned_source.weight": phi["W"].contiguous(), "learned_source.bias": bias}
    )
    return {**sizes, **source, **_parametrized(R)}


def _parametrized(R: Tensor) -> dict[str, Tensor]:
    """Return what torch's `orthogonal` keeps for R^T (d, r): base @ (-I's reflections) = R^T."""
    rank, width = R.shape
    # QR of [R^T | random] would do; of R^T alone, "complete" mode gives the complement.
    complement = torch.linalg.qr(R.mT.double(), mode="complete").Q[:, rank:]
    base = torch.cat([R.mT.double(), complement], dim=1).float()
    original = torch.zeros(width, rank)
    original.fill_diagonal_(-1.0)
    if rank == width:  # torch then uses the matrix exponential, of zero
        original.zero_()
    prefix = "rotate_layer.parametrizations.weight"
    return {f"{prefix}.original": original, f"{prefix}.0.base": base.contiguous()}


def _readme(adapter: Adapter, name: str) -> str:
    config = adapter.config
    return f"""# A ReFT adapter in pyreft's format

Base model: `{config.base_model_name_or_path}`. Interventions: `{name}`, rank {config.r}, positions
`{config.positions}`, tied `{config.tied}`, act_fn `{config.act_fn}`.

```python
import pyreft

reft = pyreft.ReftModel.load("path/to/this/directory", base_model)
```

{chr(10).join(f"- {note}" for note in pyreft_notes(adapter))}
- pyreft 0.1.0 cannot load Noreft and Nodireft this way (KeyError 'add_bias'), and loads weights
  in bfloat16: build the interventions, with dtype and add_bias, and load_state_dict each file.
"""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

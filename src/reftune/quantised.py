"""Base models in 8 or 4 bits: which there are by name, and what transformers is told about them.

An adapter edits hidden states, whatever the weights are stored in: it stays in its own dtype, and
nothing of the base is trained. A checkpoint that was quantised when it was saved (GPTQ, AWQ, ...)
needs no name: transformers reads how from its config.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, get_args

from reftune.errors import ReftConfigError, RunError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, TorchAoConfig

    AnyConfig = BitsAndBytesConfig | TorchAoConfig

Trainable = Literal["bnb-4bit", "bnb-8bit", "torchao-int8"]
"""What transformers' Trainer trains adapters on."""
Quantization = Literal["bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4"]

_PACKAGES: Final[Mapping[str, str]] = {"bnb": "bitsandbytes", "torchao": "torchao"}
_PACKS: Final = "support_avx512bf16_for_cpu"  # bitsandbytes' Linear4bit; read at each pass
_PACKED_BY_TORCHAO: Final = "Int4"  # Int4TilePackedTo4dTensor, Int4Tensor, ...: how types begin
_GROUP = 32  # weights that share a scale, of torchao's int4: divides the width of any model


def quantization_config(name: str, dtype: torch.dtype) -> AnyConfig:
    """Return transformers' config of a quantisation; `dtype` is that of the computation.

    bnb-4bit is QLoRA's (nf4, double quantisation). torchao-int4 is packed for GPUs where there is
    one, and kept in bytes elsewhere. Raises ReftConfigError for an unknown name, RunError where
    the library is not installed.
    """
    _check(name)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "bnb-4bit":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if name == "bnb-8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_said_once)
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(_torchao_int4())


def keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes leave a model's 4-bit weights as they are when it is evaluated on a CPU.

    On CPUs with AVX512-BF16 it packs them otherwise at the first pass without gradients: scales are
    rounded to bfloat16, and no gradient passes its kernel from then on, which torch tells by a
    warning alone (bitsandbytes 0.50; its issue 2078 tells of more).

    Raises ReftConfigError where that has happened already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, _PACKS):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ReftConfigError(
                f"bitsandbytes packed the 4-bit weights of {name!r} for inference on this CPU when "
                "the model was evaluated, and gradients do not pass them any more. Load the model "
                "anew, and put the adapter to be trained on it before it is evaluated."
            )
        setattr(module, _PACKS, False)


def check_trainable(model: nn.Module) -> None:
    """Raise ReftConfigError where no gradient passes a model's weights: torchao's packed int4.

    Their products are kernels for inference without a derivative: torch's (`_weight_int4pack_mm`)
    raises in the backward, of others' gradients a part would be missing and nothing said.
    """
    for name, weight in model.named_parameters():
        if type(weight).__name__.startswith(_PACKED_BY_TORCHAO):
            raise ReftConfigError(
                f"{name} is packed in 4 bits by torchao, through which no gradient passes: such a "
                "model can be used with an adapter (inference_mode=True), and not train one. To "
                "train, quantise it by bitsandbytes or to torchao's int8 (quantization='bnb-4bit', "
                "'bnb-8bit', 'torchao-int8')."
            )


def _torchao_int4() -> object:
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if torch.cuda.is_available():
        return Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    return IntxWeightOnlyConfig(torch.int4, PerGroup(_GROUP))  # type: ignore[attr-defined]


def _check(name: str) -> None:
    accepted = list(get_args(Quantization))
    if name not in accepted:
        raise ReftConfigError(
            f"quantization is {name!r}; accepted: {', '.join(accepted)}."
            + did_you_mean(name, accepted)
        )
    package = _PACKAGES[name.partition("-")[0]]
    if importlib.util.find_spec(package) is None:
        raise RunError(
            f"quantization {name!r} needs {package}, which is not installed: pip install {package}"
        )


def _said_once(record: logging.LogRecord) -> bool:
    """Let bitsandbytes say once, and not at each product, that it computes in float16."""
    if "inputs will be cast" not in record.getMessage():
        return True
    said = record.getMessage() in _said
    _said.add(record.getMessage())
    return not said


_said: set[str] = set()

"""`adapter: reft` in axolotl: a plugin for its documented interface (axolotl 0.21 was tried).

    adapter: reft
    reft:
      r: 8
      positions: f7+l7

axolotl finds it by its entry points (`axolotl.plugins`); before 0.20, name it in the YAML:
`plugins: [reftune.integrations.axolotl.ReftPlugin]`. The keys of `reft` are those of `ReftConfig`.
"""

from __future__ import annotations

from typing import Any, final

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, create_model
from transformers import PreTrainedModel

from reftune.config import ReftConfig
from reftune.errors import ReftConfigError
from reftune.settings import AdapterSettings

NAME = "reft"

# axolotl makes these keys part of its own schema: a misspelt one is refused before a model loads.
ReftArgs: type[BaseModel] = create_model(
    "ReftArgs",
    __module__=__name__,
    reft=(AdapterSettings, Field(default_factory=AdapterSettings, description="see ReftConfig")),
)


@final
class ReftPlugin(BasePlugin):  # type: ignore[misc]
    """Train and load ReFT adapters by axolotl."""

    def get_input_args(self) -> str:
        """Return where the keys of `reft` are described."""
        return f"{__name__}.ReftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return that there is an adapter `reft`, which is no kind of LoRA."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Return the model with its adapter, fresh or from `lora_model_dir`; None: another's.

        Raises ReftConfigError for settings that do not fit, or a base that cannot be edited so.
        """
        if cfg.adapter != NAME:
            return None
        config = reft_config(cfg, model)
        if config_only:  # its trainers of preferences attach the adapter themselves
            return None, config
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference
            )
            return loaded, loaded.peft_config["default"]
        adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config


def reft_config(cfg: Any, model: PreTrainedModel) -> ReftConfig:
    """Return what axolotl's config says as PEFT's. Raises ReftConfigError."""
    lora = [key for key in _LORA if cfg[key]]
    if lora:
        raise ReftConfigError(
            f"adapter: reft, and {', '.join(lora)} are LoRA's. Its own keys stand below `reft:`, "
            "such as r, layers, positions; `reftune config` lists them below adapter."
        )
    # Where attention keeps packed examples apart, axolotl hands on position ids and no mask, which
    # say where each begins. Otherwise it hands on a mask, and all but the first would go unedited.
    if cfg["sample_packing"] and not cfg["attn_decontaminates_packing"]:
        raise ReftConfigError(
            "sample_packing is on, and this attention does not keep the examples of a row apart, "
            "so their prompts cannot be told. Use attn_implementation: sdpa or flash_attention_2, "
            "or sample_packing: false."
        )
    return ReftConfig(task_type=_task_type(model), **dict(cfg[NAME] or {}))


_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "peft_use_dora")
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def _task_type(model: PreTrainedModel) -> str:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), "CAUSAL_LM")

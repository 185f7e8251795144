"""What of axolotl its plugins see: hook names and signatures as published in axolotl 0.21.0.

axolotl pins versions that differ from those here, so it is not installed beside the tests. Written
from its interface (axolotl.integrations.base, and how its config and loader use it); no code of it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import BaseModel

# The hooks that the plugin overrides, with their parameters.
SIGNATURES = {
    "get_input_args": ["self"],
    "get_adapter_capabilities": ["self"],
    "load_adapter": ["self", "model", "cfg", "inference", "config_only"],
}


class DictDefault(dict[str, Any]):
    """A config: keys are attributes, and missing ones None."""

    def __missing__(self, key: str) -> None:
        return None

    def __getattr__(self, key: str) -> Any:
        return self[key]


@dataclass(frozen=True)
class AdapterCapabilities:
    """What an adapter of a plugin is."""

    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """A plugin that does nothing."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Take the config as written."""

    def get_input_args(self) -> str | None:
        """Return the dotted name of a pydantic model of further keys."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return which adapters the plugin brings."""
        return []

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> Any:
        """Return a model and its PEFT config, or None where the adapter is another's."""


class Core(BaseModel):
    """Keys of axolotl's own that an adapter needs."""

    adapter: str | None = None
    lora_model_dir: str | None = None
    lora_r: int | None = None
    lora_dropout: float | None = 0.0
    sample_packing: bool | None = None
    attn_decontaminates_packing: bool | None = None


@contextmanager
def installed() -> Iterator[None]:
    """Let `axolotl.integrations.base` be importable; the plugin's module is imported anew."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin, base.AdapterCapabilities = BasePlugin, AdapterCapabilities  # type: ignore[attr-defined]
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    ours = "reftune.integrations.axolotl"
    before = {name: sys.modules.pop(name, None) for name in (*names, ours)}
    for name in names:
        sys.modules[name] = base
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def load_plugin(target: str) -> Any:
    """Make the plugin that an entry point, module:Class, names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)()


def validated(plugin: Any, values: dict[str, Any]) -> DictDefault:
    """Check a config by axolotl's keys and the plugin's; return it as plugins get it."""
    module, _, name = plugin.get_input_args().rpartition(".")
    schema: Any = type("Input", (Core, getattr(import_module(module), name)), {})
    if values["adapter"] not in {known.name for known in plugin.get_adapter_capabilities()}:
        raise ValueError("not registered by a plugin")
    dumped = schema(**values).model_dump(exclude_none=True)
    return DictDefault({k: DictDefault(v) if isinstance(v, dict) else v for k, v in dumped.items()})

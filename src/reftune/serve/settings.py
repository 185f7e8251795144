"""What can be set: `additional_config={"reftune": {...}}` of a vLLM engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from reftune.errors import ReftConfigError, did_you_mean

KEY = "reftune"
MiB = 2**20


@final
@dataclass(frozen=True)
class ServeSettings:
    """Limits and places.

    Attributes:
        memory: MiB of adapters that each worker keeps on its device; the least recently used go.
            A single step that needs more gets it, for that step.
        host_memory: MiB of adapters that each worker keeps in host memory beside an accelerator.
        store: directory for the versions of adapters in use, shared by all processes of the
            engine; None is a temporary one that goes with the engine.

    Raises ReftConfigError for a value that is not accepted.
    """

    memory: float = 256.0
    host_memory: float = 1024.0
    store: str | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "host_memory"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ReftConfigError(f"{name} is {value!r}; accepted is a number of MiB from 0.")

    @classmethod
    def read(cls, additional_config: object) -> ServeSettings | None:
        """Return the settings in vLLM's `additional_config`, or None where ReFT is not asked for.

        Raises ReftConfigError for a key that does not exist.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        given: Any = additional_config[KEY]
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, Mapping):
            raise ReftConfigError(
                f"additional_config[{KEY!r}] is {given!r}; accepted is a dictionary with some of "
                f"the keys {names}, for instance an empty one."
            )
        for name in given:
            if name not in names:
                raise ReftConfigError(
                    f"additional_config[{KEY!r}] has no key {name!r}; accepted are {names}."
                    + did_you_mean(str(name), names)
                )
        return cls(**given)

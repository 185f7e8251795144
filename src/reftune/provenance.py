"""What a result was made with: versions and machine, as a run's results.json keeps them."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress

_PACKAGES = (
    *("torch", "transformers", "peft", "tokenizers", "datasets"),
    *("reasoning-gym", "scikit-learn", "scipy", "lm_eval", "vllm"),  # make, score or answer tasks
)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, of what is installed."""
    known = {"reftune": "unknown"}  # run from a source tree
    for name in ("reftune", *_PACKAGES):
        with suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def system() -> dict[str, str]:
    """Return the system, the processor and the accelerator ("cpu" where there is none)."""
    import torch

    uname = platform.uname()
    return {
        "system": uname.system,
        "release": uname.release,
        "version": uname.version,
        "machine": uname.machine,
        "processor": uname.processor,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

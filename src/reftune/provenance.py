"""What a result was made with: versions and machine, as a run's results.json keeps them."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("reftune", "torch", "transformers", "peft")
    known = {}
    for name in names:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            known[name] = "unknown"
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

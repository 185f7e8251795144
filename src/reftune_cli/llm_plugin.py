"""Adapters as models of the command line tool `llm`:

    llm -m reftune/runs/demo "How do I make tea?"

Every run below ./runs is one, and what REFTUNE_ADAPTERS names (directories or names of the Hub,
with commas between). In this package and not in `reftune`, whose import takes seconds: llm imports
its plugins whatever it was called for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import llm
from pydantic import Field

if TYPE_CHECKING:
    from reftune.run import Loaded

ADAPTERS = "REFTUNE_ADAPTERS"


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Make a model of each adapter; none is loaded."""
    for adapter in adapters():
        register(ReftAdapter(adapter))


def adapters() -> list[str]:
    """Return the finished runs below ./runs, then what REFTUNE_ADAPTERS names."""
    found = sorted(str(p.parent.parent) for p in Path("runs").glob("*/adapter/adapter_config.json"))
    named = os.environ.get(ADAPTERS, "").split(",")
    return list(dict.fromkeys([*found, *(name.strip() for name in named if name.strip())]))


class Options(llm.Options):  # type: ignore[misc]
    """What `llm -o KEY VALUE` sets."""

    max_new_tokens: int = Field(512, ge=1, description="most tokens to generate")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 is off")
    strength: float = Field(1.0, description="factor on the edits: 0 the base model, 1 as trained")


@final
class ReftAdapter(llm.Model):  # type: ignore[misc]
    """An adapter on its base model, which is loaded with the first prompt."""

    can_stream = True
    Options = Options

    def __init__(self, adapter: str) -> None:
        self.model_id = f"reftune/{adapter}"
        self.adapter = adapter
        self._loaded: tuple[Loaded, str] | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Yield the reply piece by piece. Raises llm.ModelError."""
        from reftune.controls import reft_layers, set_strength
        from reftune.errors import ReftuneError
        from reftune.generate import Sampling
        from reftune.generate import stream as pieces_of
        from reftune.prompts import encode_prompt

        options = prompt.options
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        try:
            loaded, template = self._load()
            if reft_layers(loaded.model):
                set_strength(loaded.model, options.strength)
            is_chat = loaded.tokenizer.chat_template and template in ("auto", "chat")
            text = _messages(prompt, conversation) if is_chat else prompt.prompt
            ids = encode_prompt(text, loaded.tokenizer, template)  # type: ignore[arg-type]
            yield from pieces_of(loaded.model, loaded.tokenizer, ids, sampling)
        except ReftuneError as error:
            raise llm.ModelError(str(error)) from error

    def _load(self) -> tuple[Loaded, str]:
        if self._loaded is None:
            from reftune.run import find_adapter, load_adapter, template_of
            from reftune_cli import quieten

            quieten()
            self._loaded = load_adapter(self.adapter), template_of(find_adapter(self.adapter))
        return self._loaded


def _messages(prompt: Any, conversation: Any) -> tuple[dict[str, str], ...]:
    """Return a conversation up to this prompt."""
    found = []
    if prompt.system:
        found.append({"role": "system", "content": prompt.system})
    for earlier in conversation.responses if conversation is not None else ():
        found.append({"role": "user", "content": earlier.prompt.prompt})
        found.append({"role": "assistant", "content": earlier.text()})
    return (*found, {"role": "user", "content": prompt.prompt})

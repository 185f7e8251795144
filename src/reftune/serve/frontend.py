"""Where requests come in: an adapter's directory becomes a version, and its edits go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from reftune.errors import ReftConfigError
from reftune.interventions import METHODS
from reftune.serve.adapter import Adapter, ModelShape, is_reft
from reftune.serve.edits import Edits
from reftune.serve.settings import KEY, MiB, ServeSettings
from reftune.serve.store import Store

if TYPE_CHECKING:
    from reftune.serve.metrics import Metrics

OPTIONS = ("strength", "subspaces")
PROMPT_LENGTH = "reftune_prompt_length"
"""Key of a prompt that is longer than what was submitted: one of a beam search."""


@final
class Frontend:
    """Turns the `lora_request` of a request into its edits; one for each engine.

    Names and paths of adapters are carried by vLLM's own `LoRARequest`; the engine behind never
    sees it, so none of vLLM's limits on LoRA act.
    """

    def __init__(self, vllm_config: Any, settings: ServeSettings) -> None:
        model = vllm_config.model_config
        shape = ModelShape(model.get_hidden_size(), model.get_total_num_hidden_layers())
        largest = int(max(settings.memory, settings.host_memory) * MiB)
        self.store = Store(shape, settings.store, largest)
        self.pinned: set[str] = set()  # names
        self.metrics: Metrics | None = None
        self._has_lora = vllm_config.lora_config is not None
        self._chunked_prefill = bool(vllm_config.scheduler_config.enable_chunked_prefill)

    def adapter(self, path: str) -> Adapter:
        """Return the version of an adapter that is in a directory now, if it can be served.

        Raises AdapterMismatchError or ReftConfigError.
        """
        adapter = self.store.get(path)
        if adapter.config.intervention.pools_tokens and self._chunked_prefill:
            raise ReftConfigError(
                f"method={adapter.config.method!r} averages over the tokens of a prompt, which "
                "chunked prefill computes in parts. Start vLLM with --no-enable-chunked-prefill "
                "to serve this adapter."
            )
        return adapter

    def edits(self, lora_request: Any, params: Any, prompt: Any) -> Edits | None:
        """Return the edits of a request, None for one of the base model or of a LoRA.

        Raises AdapterMismatchError for an adapter that cannot be served and ReftConfigError for
        options that are not accepted.
        """
        extra: Mapping[str, Any] = getattr(params, "extra_args", None) or {}  # pooling has none
        given = {name: extra[name] for name in OPTIONS if name in extra}
        if lora_request is None or (self._has_lora and not is_reft(lora_request.lora_path)):
            if given or KEY in extra:
                raise ReftConfigError(
                    f"{', '.join(given) or KEY} is for a ReFT adapter, and this request names none."
                )
            return None
        if not hasattr(params, "extra_args"):
            raise ReftConfigError(
                "A ReFT adapter is for generation; pooling (embeddings, scores) has none."
            )
        adapter = self.adapter(lora_request.lora_path)
        before = prompt.get(PROMPT_LENGTH) if isinstance(prompt, dict) else None
        name = lora_request.lora_name.rpartition(":")[2]
        return replace(
            Edits.of(adapter, given),
            pinned=name in self.pinned,
            prompt_length=before,
            name=name,
        )

    def count(self, edits: Edits, prompt_length: int) -> None:
        """Count a request where the server keeps metrics."""
        if self.metrics is not None:
            self.metrics.requested(edits.name, edits.num_edited(prompt_length))


def with_edits(params: Any, edits: Edits) -> Any:
    """Return sampling parameters that carry a request's edits to the engine."""
    params = params.clone()
    rest = {name: value for name, value in (params.extra_args or {}).items() if name not in OPTIONS}
    params.extra_args = {**rest, KEY: edits.write()}
    if METHODS[edits.method].pools_tokens:
        # A token's edit depends on others that a cached block would leave out.
        params.skip_reading_prefix_cache = True
    return params

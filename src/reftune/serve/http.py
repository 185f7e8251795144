"""The OpenAI server's side: adapters as models, and the key asked for at every endpoint.

vLLM's `OpenAIServingModels` answers which names exist, loads and unloads. Its instance gets our
class at the official end of the server's set-up (`vllm.endpoint_plugins`): every handler holds it.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.request import LoRARequest
from vllm.v1.engine.output_processor import OutputProcessor

from reftune.errors import ReftuneError, did_you_mean
from reftune.serve.catalog import Catalog
from reftune.serve.edits import Edits
from reftune.serve.frontend import Frontend
from reftune.serve.metrics import Metrics
from reftune.serve.plugin import accept_options, frontend_of

_NOT_FOUND = ("NotFoundError", HTTPStatus.NOT_FOUND)
OPEN = ("/health", "/ping")  # what tells a load balancer that the process lives


class AdapterModels(OpenAIServingModels):  # type: ignore[misc]
    """Adapters by name, read when they are first asked for.

    `lora_requests` holds those that were read, each as a version in the store; the catalog all.
    """

    catalog: Catalog
    frontend: Frontend
    metrics: Metrics

    async def show_available_models(self) -> Any:
        models = await self.registry.show_available_models()
        parent = self.base_model_paths[0].name
        ours = {name: str(path) for name, path in self.catalog.paths.items()}
        loras = {n: r.path for n, r in self.lora_requests.items() if self._own_name(n) not in ours}
        models.data.extend(
            ModelCard(id=name, root=path, parent=parent, permission=[ModelPermission()])
            for name, path in {**loras, **ours}.items()
        )
        return models

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        name = super().model_name(lora_request)
        return str(name if lora_request is None else self._own_name(name))

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        name = self._own_name(lora_name)
        if name not in self.catalog.paths:  # no lock: one for every name that is asked for stays
            return _error(f"The model `{lora_name}` does not exist.", *_NOT_FOUND)
        # One lock for both of its names: else a replaced version might be read under the other.
        async with self.lora_resolver_lock[name]:
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
            path = self.catalog.paths.get(name)
            if path is None:
                return _error(f"The model `{lora_name}` does not exist.", *_NOT_FOUND)
            try:
                return await self._read(name, str(path))
            except (ReftuneError, OSError) as error:
                return _error(f"The adapter `{name}` cannot be served: {error}")

    async def load_lora_adapter(
        self, request: Any, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        name = request.lora_name
        known = name in self.catalog.paths
        if (wrong := self._check_name(name, known, request.load_inplace)) is not None:
            return wrong
        async with self.lora_resolver_lock[name]:
            try:
                store = self.frontend.store
                path = await asyncio.to_thread(
                    self.catalog.locate, request.lora_path, store.largest
                )
                store.forget(path)
                await self._read(name, str(path))
            except (ReftuneError, OSError) as error:
                return _error(f"The adapter `{name}` was not loaded: {error}")
            self.catalog.paths[name] = path
        return f"Success: adapter '{name}' {'replaced' if known else 'added'}."

    async def unload_lora_adapter(self, request: Any) -> ErrorResponse | str:
        name = request.lora_name
        if name not in self.catalog.paths:
            return _error(
                f"There is no adapter `{name}`." + did_you_mean(name, list(self.catalog.paths)),
                *_NOT_FOUND,
            )
        async with self.lora_resolver_lock[name]:
            self.catalog.paths.pop(name, None)
            for alias in (name, self._alias(name)):
                self.lora_requests.pop(alias, None)
        return f"Success: adapter '{name}' removed; requests that run finish on it."

    def _check_name(self, name: str, known: bool, load_inplace: bool) -> ErrorResponse | None:
        if not name or ":" in name or self.is_base_model(name):
            return _error(
                f"lora_name is {name!r}; accepted is a name that is not the base model's and has "
                "no colon."
            )
        if known and not load_inplace:
            return _error(
                f"The adapter `{name}` exists. Replace it with load_inplace=true: requests that "
                "run finish on the old one."
            )
        return None

    def _alias(self, name: str) -> str:
        return f"{self.base_model_paths[0].name}:{name}"

    def _own_name(self, lora_name: str) -> str:
        base, _, name = lora_name.rpartition(":")
        return name if base and self.is_base_model(base) else lora_name

    async def _read(self, name: str, path: str) -> LoRARequest:
        start = time.perf_counter()
        adapter = await asyncio.to_thread(self.frontend.adapter, path)
        self.metrics.loaded(name, time.perf_counter() - start)
        # vLLM takes an adapter named like a part of a message ("text") for that part's own, so it
        # gets to know the name that has a colon.
        alias = self._alias(name)
        request = LoRARequest(alias, self.lora_id_counter.inc(1), str(adapter.directory))
        self.lora_requests[name] = self.lora_requests[alias] = request
        return request


class CountingOutputs(OutputProcessor):  # type: ignore[misc]
    """Counts what the prefix cache had of each adapter's prompts."""

    metrics: Metrics

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        params = request.sampling_params
        edits = None if params is None else Edits.read(params.extra_args)
        if edits is not None:
            self.request_states[request.request_id].reft_adapter = edits.name

    def _finish_request(self, req_state: Any) -> None:
        name = vars(req_state).get("reft_adapter")
        if name is not None:
            self.metrics.finished(name, req_state.prompt_len, req_state.num_cached_tokens)
        super()._finish_request(req_state)


class AdapterEndpoints:
    """vLLM's endpoint plugin: gives the server's table of models our class."""

    name = "reftune"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add no routes: vLLM's own for loading and unloading call the table of models."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Take over the table of models of a server that `reftune serve` started."""
        settings = getattr(args, "reftune", None)
        if settings is None or engine_client is None:
            return
        frontend = frontend_of(engine_client.input_processor)
        assert frontend is not None
        models = state.openai_serving_models
        models.__class__ = AdapterModels
        models.catalog, models.frontend = Catalog(settings), frontend
        frontend.pinned = models.catalog.pinned
        models.metrics = frontend.metrics = Metrics()
        outputs = engine_client.output_processor
        outputs.__class__, outputs.metrics = CountingOutputs, models.metrics
        accept_options()


class RequireKey:
    """ASGI middleware: what vLLM's own leaves open is asked for the key, too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            args = scope["app"].state.args
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            keys = [key for key in args.reftune_keys if key]
            if keys and path not in OPEN and not _has_key(scope, keys):
                await _refuse(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _has_key(scope: Any, keys: list[str]) -> bool:
    from starlette.datastructures import Headers

    checker = AuthenticationMiddleware(None, keys)
    return bool(checker.verify_token(Headers(scope=scope)))


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    from starlette.responses import JSONResponse

    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)


def _error(
    message: str, kind: str = "BadRequestError", status: HTTPStatus = HTTPStatus.BAD_REQUEST
) -> ErrorResponse:
    return create_error_response(message, kind, status, "model")

"""The one place where reftune hangs into vLLM: `vllm.general_plugins`, called in every process.

vLLM has official doors for nearly all of it: the entry point, `additional_config`, `LoRARequest`
and `extra_args` to carry requests, the forward context's table for a custom op, `splitting_ops`,
V2's model state. What has no door is wrapped here, after a look at the version:

    InputProcessor.process_inputs      a request's adapter becomes its edits
    generate_block_hash_extra_keys     what the prefix cache has to know of a block
    BeamSearchSequence.get_prompt      how long the prompt was before the search
    BaseModelLoader.load_model         the loaded model's layers learn to edit
    GPUModelRunner._model_forward      what the step edits (V1; vLLM means it to be overridden)
    CompilationConfig._attention_ops   the default splitting ops
    *Request.to_sampling_params        strength and subspaces beside OpenAI's own keys (a server's)

An engine without `additional_config={"reftune": ...}` runs as if reftune were not installed.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from reftune.errors import ReftConfigError, ReftuneError, UnsupportedVersionError
from reftune.serve.attach import OP, State, attach, register_op
from reftune.serve.chunks import v1_chunks
from reftune.serve.edits import Edits
from reftune.serve.frontend import OPTIONS, PROMPT_LENGTH, Frontend, with_edits
from reftune.serve.settings import KEY, ServeSettings
from reftune.serve.version import check_version

log = logging.getLogger("vllm.reftune")

_FRONTEND = "_reftune_frontend"


def register() -> None:
    """Be vLLM's plugin: `install`, or in a version that was not tried a warning and nothing."""
    try:
        install()
    except UnsupportedVersionError as error:  # vLLM would end, also for those who want no ReFT
        log.warning("reftune is not active. %s", error)


def install() -> None:
    """Hang reftune into vLLM; may be called again. Raises UnsupportedVersionError."""
    check_version()
    from vllm.config import CompilationConfig
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    register_op()
    if OP not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OP)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(BeamSearchSequence, "get_prompt", _beam_prompt)
    _wrap(BaseModelLoader, "load_model", _load_model)
    _wrap(GPUModelRunner, "_model_forward", _model_forward)
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    _wrap(utils, "generate_block_hash_extra_keys", _extra_keys)
    for name in ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager"):
        module = importlib.import_module(name)  # they imported it by name
        module.generate_block_hash_extra_keys = utils.generate_block_hash_extra_keys  # type: ignore[attr-defined]


def accept_options() -> None:
    """Let a server's requests name `strength` and `subspaces` beside OpenAI's keys."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _wrap(kind, "to_sampling_params", _sampling_params)
        if kind is not ResponsesRequest:
            _wrap(kind, "to_beam_search_params", _beam_params)


def frontend_of(input_processor: Any) -> Frontend | None:
    """Return the front end of an engine's input processor; None where ReFT is off."""
    known = vars(input_processor)
    if _FRONTEND not in known:
        config = input_processor.vllm_config
        settings = ServeSettings.read(config.additional_config)
        known[_FRONTEND] = None if settings is None else Frontend(config, settings)
    found: Frontend | None = known[_FRONTEND]
    return found


def state_of(vllm_config: Any) -> State | None:
    """Return the worker's state of an engine; None where ReFT is off."""
    found: State | None = vllm_config.compilation_config.static_forward_context.get(KEY)
    return found


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "_reftune"):

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        wrapped._reftune = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _process_inputs(
    original: Any,
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    lora_request: Any = None,
    **kwargs: Any,
) -> Any:
    frontend = frontend_of(self)
    try:
        edits = None if frontend is None else frontend.edits(lora_request, params, prompt)
    except ReftuneError as error:
        raise _as_vllms(error) from error
    if frontend is None or edits is None:
        return original(
            self, request_id, prompt, params, *args, lora_request=lora_request, **kwargs
        )
    params = with_edits(params, edits)
    request = original(self, request_id, prompt, params, *args, **kwargs)
    frontend.count(edits, len(request.prompt_token_ids or ()))
    return request


def _sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    params = original(self, *args, **kwargs)
    beside = self.model_extra or {}
    given = {name: beside[name] for name in OPTIONS if beside.get(name) is not None}
    if given:
        params.extra_args = {**given, **(params.extra_args or {})}
    return params


def _beam_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    beside = {**(self.model_extra or {}), **(self.vllm_xargs or {})}
    for name in OPTIONS:
        if beside.get(name) is not None:  # vLLM's search submits its beams without it
            raise _as_vllms(ReftConfigError(f"{name} and use_beam_search exclude each other."))
    return original(self, *args, **kwargs)


def _as_vllms(error: ReftuneError) -> Exception:
    """Return an error that is ours, and one of the client to vLLM's server: a 4xx."""
    from vllm.exceptions import VLLMClientError

    kind = type(error)
    both = type(kind.__name__, (kind, VLLMClientError), {"__module__": kind.__module__})
    refused: Exception = both(str(error))
    return refused


def _beam_prompt(original: Any, self: Any) -> Any:
    prompt = original(self)
    if self.lora_request is not None and self.orig_prompt["type"] == "token":
        prompt[PROMPT_LENGTH] = len(self.orig_prompt["prompt_token_ids"])
    return prompt


def _extra_keys(original: Any, request: Any, start: int, end: int, start_mm: int) -> Any:
    keys, next_mm = original(request, start, end, start_mm)
    params = request.sampling_params
    edits = None if params is None or not params.extra_args else Edits.read(params.extra_args)
    if edits is not None:
        own = edits.block_key(request.num_prompt_tokens, start, end)
        if own is not None:
            keys = (*(keys or ()), own)
    return keys, next_mm


def _load_model(
    original: Any, self: Any, vllm_config: Any, model_config: Any, **kwargs: Any
) -> Any:
    model = original(self, vllm_config, model_config, **kwargs)
    settings = ServeSettings.read(vllm_config.additional_config)
    own = model_config is vllm_config.model_config and not _is_draft(vllm_config, model_config)
    if settings is not None and own:
        attach(model, vllm_config, settings)
    return model


def _is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Return whether a model proposes tokens for another; without one, they have one config."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    target = getattr(speculative, "target_model_config", None)
    return draft is not None and model_config is draft and draft is not target


def _model_forward(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    state = state_of(self.vllm_config)
    if state is None:
        if ServeSettings.read(self.vllm_config.additional_config) is not None:
            raise ReftConfigError(
                f"load_format={self.vllm_config.load_config.load_format!r} loads models on a way "
                "of its own, on which their layers do not learn to edit. Use load_format='auto'."
            )
        return original(self, *args, **kwargs)
    if state.begin(v1_chunks(self, state.generating)):
        _leave_full_graph()
    try:
        return original(self, *args, **kwargs)
    finally:
        state.end()


def _leave_full_graph() -> None:
    """Run this step without a full CUDA graph.

    A prompt's last token alone in a step looks like decoding, whose graph has no edits.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.FULL:
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE

"""Edits under vLLM's V2 model runner (its default on GPUs), through the model's own state class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from reftune.serve.chunks import v2_chunks
from reftune.serve.edits import Edits

if TYPE_CHECKING:
    from reftune.serve.attach import State


def edited_model_state(model: nn.Module, vllm_config: Any, state: State) -> type[Any]:
    """Return the state class that vLLM would take for a model, which also plans the edits."""
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    base: Any = resolve_model_state_cls(vllm_config, model)

    class EditedModelState(base):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.reft_requests: dict[str, tuple[Edits, int]] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            edits = None if params is None else Edits.read(params.extra_args)
            if edits is not None:
                ids = new_req_data.prompt_token_ids  # None: the prompt came as embeddings
                length = len(new_req_data.prompt_embeds if ids is None else ids)
                self.reft_requests[new_req_data.req_id] = (edits, length)

        def remove_request(self, req_id: str) -> None:
            self.reft_requests.pop(req_id, None)
            super().remove_request(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            state.begin(v2_chunks(input_batch, self.reft_requests))
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
            state.end()
            return super().prepare_dummy_inputs(*args, **kwargs)

        def get_additional_cg_support(self) -> Any:
            # A prompt's last token alone in a step looks like decoding, whose full graph has no
            # edits. Piecewise graphs keep the op out of them.
            return AttentionCGSupport.NEVER, "reftune"

    return EditedModelState

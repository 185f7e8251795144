"""The edit inside of vLLM's model: one custom op behind every decoder layer.

A layer's class is replaced by a subclass whose `forward` calls the op, before anything is compiled,
so eager and compiled execution are the same. The op is opaque to the compiler and, being one of its
splitting ops, stays out of CUDA graphs. What it does is in the `Plan` of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from reftune.errors import LayersNotFoundError, ReftConfigError
from reftune.serve.bank import Bank
from reftune.serve.plan import Chunk, Plan
from reftune.serve.settings import KEY, MiB, ServeSettings

OP = "reftune::edit"

# Layers of vLLM 0.32 that return (hidden, residual) and have added the residual to the hidden
# states already, so that these are the stream; of all others that return two, it is their sum.
STREAM_ALONE = frozenset(
    {
        "Cohere2MoeDecoderLayer",
        "CohereCompassDecoderLayer",
        "CohereDecoderLayer",
        "Exaone4DecoderLayer",
        "GraniteMoeHybridAttentionDecoderLayer",
        "GraniteMoeHybridMambaDecoderLayer",
        "HyperCLOVAXDecoderLayer",
        "Molmo2DecoderNormAfterLayer",
        "MolmoDecoderNormAfterLayer",
        "MuseGlimmerDecoderLayer",
        "PhiMoEDecoderLayer",
        "StablelmDecoderLayer",
    }
)


@dataclass(eq=False)
class Counts:
    """What a worker did; `steps` counts forwards of requests, and `busy_steps` those with edits."""

    steps: int = 0
    busy_steps: int = 0
    rows: int = 0
    products: int = 0


@final
@dataclass(eq=False)
class State:
    """A worker's side of one engine: its adapters, and what the running step edits."""

    bank: Bank
    plan: Plan | None = None
    generating: set[str] = field(default_factory=set)  # requests whose generated tokens are edited
    counts: Counts = field(default_factory=Counts)

    def begin(self, chunks: Iterable[Chunk]) -> bool:
        """Plan a step; returns whether anything is edited in it."""
        self.end()
        self.counts.steps += 1
        plan = Plan(chunks, self.bank)
        self.plan = plan or None
        if plan:
            self.counts.busy_steps += 1
            self.counts.rows += plan.num_rows
        return bool(plan)

    def end(self) -> None:
        """Forget the step."""
        if self.plan is not None:
            self.plan = None
            self.bank.trim()


def edit(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """Edit the output of a layer in place, if the running step edits it: the op's body."""
    from vllm.forward_context import get_forward_context

    # vLLM's own ops find their layers in this table by name: one for each engine of a process.
    state = get_forward_context().no_compile_layers.get(KEY)
    if state is not None and state.plan is not None:
        state.counts.products += state.plan.apply(layer, hidden, residual)


def register_op() -> None:
    """Make `torch.ops.reftune.edit` known; may be called again."""
    if hasattr(torch.ops.reftune, "edit"):
        return
    torch.library.define(OP, "(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
    torch.library.impl(OP, ("CPU", "CUDA"), edit)
    torch.library.register_fake(OP, lambda hidden, residual, layer: None)


def attach(model: nn.Module, vllm_config: Any, settings: ServeSettings) -> State:
    """Make a vLLM model edit its layers' outputs, and return the state that says how.

    Raises LayersNotFoundError where its layers cannot be told, ReftConfigError where the engine
    splits the tokens of a step among devices.
    """
    register_op()
    _require_whole_steps(vllm_config)
    model_config = vllm_config.model_config
    layers = find_layers(model, model_config.get_total_num_hidden_layers())
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for number, layer in enumerate(layers):
        if type(layer).__name__ == "PPMissingLayer":  # another pipeline stage's
            continue
        _require_whole_states(layer, model_config.dtype)
        kind = type(layer)
        classes.setdefault(kind, _edited_class(kind))
        object.__setattr__(layer, "reft_layer", number)  # a plain attribute of any module
        layer.__class__ = classes[kind]
    device = next(model.parameters()).device
    limits = settings.memory * MiB, settings.host_memory * MiB
    state = State(Bank(model_config.get_hidden_size(), device, *limits))
    vllm_config.compilation_config.static_forward_context[KEY] = state
    if vllm_config.use_v2_model_runner:
        from reftune.serve.model_state import edited_model_state

        # vLLM's own door: a model may bring the class of its state along.
        kind = edited_model_state(model, vllm_config, state)
        model.get_model_state_cls = lambda: kind  # type: ignore[assignment]
    return state


def find_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return the outermost list of `num_layers` modules.

    Raises LayersNotFoundError where there is none, or more than one.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inside:
            found[name] = module
    text = {name: m for name, m in found.items() if "language_model" in name.split(".")}
    if len(found) > 1 and len(text) == 1:
        found = text
    if len(found) != 1:
        raise LayersNotFoundError(
            f"The decoder layers of vLLM's {type(model).__name__} cannot be told: lists of "
            f"{num_layers} modules in it are {sorted(found) or 'none'}. reftune serves decoders "
            "with one list of layers."
        )
    return next(iter(found.values()))


def _require_whole_steps(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    splits = {
        "enable_dbo or ubatch_size": parallel.use_ubatching,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
    }
    on = [name for name, value in splits.items() if value]
    if on:
        raise ReftConfigError(
            f"{', '.join(on)} of vLLM splits the tokens of a step, of which a ReFT edits some. "
            "Turn it off to serve ReFT adapters."
        )


def _require_whole_states(layer: nn.Module, dtype: torch.dtype) -> None:
    """Raise where what a layer returns is not the hidden states of a step as they are trained."""
    name = type(layer).__name__
    if getattr(layer, "use_sequence_parallel_moe", False):
        raise ReftConfigError(
            f"vLLM's {name} splits the tokens of a step among devices (expert parallelism with "
            "tensor and data parallelism), of which a ReFT edits some. Turn one of them off."
        )
    if dtype == torch.float16 and getattr(layer, "routed_scaling_factor", 1.0) != 1.0:
        raise ReftConfigError(
            f"vLLM's {name} scales its hidden states in float16, which a ReFT is not trained for. "
            "Serve the model in bfloat16 (--dtype bfloat16)."
        )


def _edited_class(kind: type[nn.Module]) -> type[nn.Module]:
    is_sum = kind.__name__ not in STREAM_ALONE

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        if isinstance(output, tuple):  # (hidden, residual)
            residual = output[1] if is_sum else None
            torch.ops.reftune.edit(output[0], residual, self.reft_layer)
        else:
            torch.ops.reftune.edit(output, None, self.reft_layer)
        return output

    return type(f"Edited{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})

"""A pytest plugin that puts ReFT into the parametrisation of PEFT's own tests, from outside.

Load it with `-p reftune_peft_plugin` (see run.py). No file of PEFT is changed or copied: while
pytest collects, the marks that list PEFT's methods are replaced by lists of ReFT's, and tests that
do not speak about our methods are deselected.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import reftune
from reftune.interventions import Red

VARIANTS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "loreft_sides": {"tied": "sides", "positions": "f2+l2", "init": "noop"},
    "loreft_generated": {"positions": "f2+l2", "edit_generated": True, "init": "noop"},
    "direft": {"method": "direft", "init": "noop"},
    "red": {"method": "red", "positions": "all"},
}
"""The ReFTs that every test of the matrix runs with.

As PEFT asks of its matrix, they start as the identity where they can, and a test that needs another
start calls `set_init_weights_false` (see `_keep_ours`). `loreft` is the default, which starts at
random.
"""

NOT_OURS = {
    "test_prompt_learning_with_gradient_checkpointing",  # lists prompt learning alone
    "test_inject_adapter_in_model_rejects_shared_state_tuners",  # we share no state between layers
    "test_base_model_module_named_like_peft_prefix",  # has its own table of prefixes
    "test_add_weighted_adapter_cat_with_rank_pattern",  # uses LoRA whatever the parameter says
    "test_mixed_adapter_batches_lora_conv2d",
    "test_mixed_adapter_batches_mha_raises",  # asks for LoRA's layer class by name
}
"""Parametrised tests that say nothing about ReFT."""

TASK_TYPES = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
}

CUSTOM_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP lin0", "MLP", {"target_modules": ["lin0"], "r": 4}),
    ("MLP lin0 lin1", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2}),
    (
        "MLP lin0 modules_to_save",
        "MLP",
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": 4},
    ),
    ("EmbConv1D emb", "EmbConv1D", {"target_modules": ["emb"], "r": 2}),
    ("MLP_LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0"], "r": 4}),
    ("Conv2d lin0", "Conv2d", {"target_modules": ["lin0"], "r": 2}),
    ("MHA lin0", "MHA", {"target_modules": ["lin0"], "r": 2}),
]

STAND_INS = {
    # test_low_level_api.py
    "test_inject_from_state_dict_transformers",
    "test_inject_from_state_dict_low_cpu_mem_usage",
    "test_get_peft_model_state_dict_removes_adapter_name",
    "test_get_peft_model_state_dict_removes_non_defaul_adapter_name",
    "test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
    "test_get_and_set_peft_model_state_dict_normal_names",
    "test_get_and_set_peft_model_state_dict_peft_prefix_in_module_name",
    "test_get_and_set_peft_model_state_dict_weight_in_module_name",
    "test_get_and_set_peft_model_state_dict_bias_in_module_name",
    "test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name",
    "test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
    "test_set_peft_model_state_dict_preserves_input",
    "test_strict_missing_keys",
    "test_strict_unexpected_keys",
    "test_save_pretrained_succeeds_for_normal_lora",
    # test_custom_models.py
    "test_delete_adapter_with_multiple_adapters_works",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_existing_model_card",
    "test_non_existing_model_card",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_add_adapter_rejects_duplicate_name_without_mutation",
}
"""Tests that are written with LoRA but hold for every method: `LoraConfig` makes a ReFT in them."""

AS_LORA = {"test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"}
"""Tests that skip every class but LoRA's, which we support: in them, ReftConfig passes as it."""

_selected: set[str] = set()


def variants(names: list[str] | None = None, **kwargs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and arguments of the variants, with `kwargs` added (no r for `red`)."""
    for name in names or VARIANTS:
        arguments = {**kwargs, **VARIANTS[name]}
        if arguments.get("method") == "red":
            arguments.pop("r", None)
        yield name, arguments


def _matrix(module: str) -> dict[str, list[Any]]:
    """Return the values for each parametrisation of PEFT's tests, by its argument names."""
    cfg = reftune.ReftConfig
    task = {"task_type": TASK_TYPES[module]} if module in TASK_TYPES else {}
    param = pytest.param
    return {
        "config_cls,config_kwargs": [param(cfg, kw, id=n) for n, kw in variants(**task)],
        "test_name,model_id,config_cls,config_kwargs": [
            param(name, model_id, cfg, kw, id=f"{name}-{n}".replace(" ", "_"))
            for name, model_id, base in CUSTOM_CASES
            for n, kw in variants(**base)
        ],
        "config_cls": [param(cfg, id="loreft")],
        "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2": [
            param(n, "reft", cfg, kw, {**kw, "target_modules": [other]}, id=f"{n}-{other}")
            for other in ("lin0", "lin1")
            for n, kw in _init(target_modules=["lin0"])
        ],
        "config0": [param(cfg(**kw), id=n) for n, kw in _init(target_modules=["lin0"])],
        "config": [param(cfg(**kw), id=n) for n, kw in variants(r=4)],
        "test_name,config": [param(n, cfg(**kw), id=n) for n, kw in _init(target_modules=["lin0"])],
    }


MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "test_mixed_adapter_batches_different_target_layers": (
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin1"]},
    ),
    "test_mixed_adapter_batches_multiple_modules_to_save": (
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": (
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin0", "lin1"]},
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb": (
        {"target_modules": ["emb"]},
        {"target_modules": ["emb"], "r": 4},
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": (
        {"target_modules": ["emb"], "modules_to_save": ["lin0"]},
        {"target_modules": ["emb"], "modules_to_save": ["lin0"]},
    ),
    "test_mixed_adapter_batches_unsupported_layer_raises": (
        {"target_modules": ["lin0"], "modules_to_save": ["gru"]},
        {"target_modules": ["lin0"], "modules_to_save": ["gru"]},
    ),
}
_MIXED_DEFAULT = ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": 4})


def _init(**kwargs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the variants with an initialisation that changes the output."""
    for name, arguments in variants(**{"r": 2, **kwargs}):
        yield name, {k: v for k, v in arguments.items() if k != "init"}


def _mixed(test: str) -> list[Any]:
    first, second = MIXED.get(test, _MIXED_DEFAULT)
    cfg = reftune.ReftConfig
    pairs = zip(_init(**first), _init(**second), strict=True)
    return [pytest.param(n, cfg(**a), cfg(**b), id=n) for (n, a), (_, b) in pairs]


def _stand_in(
    r: int = 2, target_modules: Any = None, modules_to_save: Any = None, **kwargs: Any
) -> reftune.ReftConfig:
    """Return a ReFT for the arguments of a LoraConfig; what only LoRA has is left out."""
    task_type = kwargs.get("task_type")
    if target_modules == "all-linear":
        target_modules = None
    return reftune.ReftConfig(
        r=min(r, 4),
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        task_type=task_type,
    )


# --- pytest's hooks -----------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Import what PEFT's tests share, prepared for a machine without Hub and diffusers."""
    checkout = os.environ["PEFT_CHECKOUT"]
    sys.path.insert(0, checkout)
    utils = importlib.import_module("tests.testing_utils")
    assert str(utils.__file__).startswith(checkout), f"tests is another package: {utils.__file__}"
    utils.hub_online_once = lambda model_id: nullcontext()
    utils.set_init_weights_false = _keep_ours(utils.set_init_weights_false)
    with _diffusers():
        importlib.import_module("tests.testing_common")
        importlib.import_module("tests.test_low_level_api")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the marks that list PEFT's methods; see `_matrix`."""
    definition = metafunc.definition
    test, module = metafunc.function.__name__, metafunc.module.__name__.rpartition(".")[2]
    matrix = _matrix(module)
    for i, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize":
            continue
        names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
        key = names.replace(" ", "")
        if test.startswith("test_mixed_adapter_batches_") and key == "test_name,config0,config1":
            values: list[Any] | None = _mixed(test)
        else:
            values = matrix.get(key)
        if values is not None and test not in NOT_OURS:
            definition.own_markers[i] = pytest.mark.parametrize(mark.args[0], values).mark
            _selected.add(definition.nodeid)
    if test in STAND_INS:
        _selected.add(definition.nodeid)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what was not parametrised with ReFT."""
    chosen = [item for item in items if item.nodeid.partition("[")[0] in _selected]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _reft_in_place_of_lora(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    test = request.node.originalname
    if test in STAND_INS:
        monkeypatch.setattr(request.module, "LoraConfig", _stand_in)
    if test in AS_LORA:
        for module in (request.module, sys.modules["tests.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", reftune.ReftConfig)
    if test.startswith(
        (
            "test_mixed_adapter_batches_",
            "test_multiple_active",
            "test_adapter_name_",
            "test_merge_layers_multi",
        )
    ):
        _randomise_red()
    yield
    Red.initial = _RED_INITIAL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Write the error into the report, so that it can be told whether it is an explained one."""
    report = yield
    if call.excinfo is not None and report.failed:
        error = f"{call.excinfo.typename}: {call.excinfo.value}"
        report.user_properties.append(("error", error))
    return report


class _Collector:
    """Collects the outcomes and writes them as JSON, where PEFT_SUITE_JSON names a file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        error = dict(report.user_properties).get("error", "")
        if report.skipped and isinstance(report.longrepr, tuple):
            error = str(report.longrepr[2]).removeprefix("Skipped: ")
        self.rows.append({"test": report.nodeid, "outcome": report.outcome, "error": str(error)})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = os.environ.get("PEFT_SUITE_JSON")
        if path and not hasattr(session.config, "workerinput"):
            Path(path).write_text(json.dumps(self.rows))
            print("\n", dict(Counter(row["outcome"] for row in self.rows)))


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Register the collector once, with this plugin."""
    if plugin is sys.modules[__name__]:
        manager.register(_Collector(), "reftune_peft_collector")


# --- what the tests need ------------------------------------------------------------------------


def _keep_ours(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap PEFT's helper that asks a method for an initialisation that is no identity."""

    def set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
        if config_cls is reftune.ReftConfig:
            _randomise_red()
            return {k: v for k, v in kwargs.items() if k != "init"}
        return original(config_cls, kwargs)

    return set_init_weights_false


_RED_INITIAL = Red.initial


def _randomise_red() -> None:
    """Start RED elsewhere than at the identity for the rest of a test; it has no such option."""

    def initial(self: Red) -> dict[str, torch.Tensor]:
        size = (self.shape.groups, self.shape.hidden_size)
        return {"scale": 1 + torch.randn(size), "bias": torch.randn(size)}

    Red.initial = initial  # type: ignore[method-assign]


@contextmanager
def _diffusers() -> Iterator[None]:
    """Let `from diffusers import StableDiffusionPipeline` work without diffusers in this block."""
    if importlib.util.find_spec("diffusers") is not None:
        yield
        return
    stub = ModuleType("diffusers")
    stub.__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub
    try:
        yield
    finally:
        del sys.modules["diffusers"]

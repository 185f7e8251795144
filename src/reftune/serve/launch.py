"""`reftune serve`: vLLM's own server, started with adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, final

from reftune.errors import ReftConfigError
from reftune.models import EMBEDDED, resolve
from reftune.run import adapter_directory
from reftune.serve.adapter import CONFIG, read_config
from reftune.serve.catalog import Catalog, CatalogSettings
from reftune.serve.settings import KEY, ServeSettings
from reftune.serve.version import check_version

FINISH = 30
"""Seconds that requests have to finish after SIGTERM without vLLM's --shutdown-timeout."""

_GUARD = "reftune.serve.http.RequireKey"


@final
@dataclass(frozen=True)
class Served:
    """What to serve: a base model by the name that clients use, and its adapters."""

    name: str
    model: str
    catalog: CatalogSettings


def what_to_serve(base: str, catalog: CatalogSettings) -> Served:
    """Return what `reftune serve BASE` means: a run or an adapter brings its base model along.

    Raises RunError, ReftConfigError or AdapterMismatchError.
    """
    adapter = Path(adapter_directory(base))
    if (adapter / CONFIG).is_file():
        catalog = replace(catalog, adapters=(base, *catalog.adapters))
        trained_on = base_of(adapter)
        if trained_on is None:
            raise ReftConfigError(
                f"{base} does not say which model it is for: reftune serve MODEL --adapters {base}"
            )
        base = trained_on
    Catalog(catalog)  # before a model is loaded for minutes
    return Served(base, resolve(base), catalog)


def base_of(adapter: Path) -> str | None:
    """Return the name of the model that an adapter's directory says it was trained on.

    The embedded model's Hub name is taken for it. Raises AdapterMismatchError or ReftConfigError.
    """
    trained_on: str | None = read_config(adapter).base_model_name_or_path
    by_hub_name = {hub: name for name, (_, hub) in EMBEDDED.items()}
    return by_hub_name.get(trained_on, trained_on) if trained_on else None


def serve(served: Served, settings: ServeSettings, vllm_arguments: Sequence[str]) -> None:
    """Run vLLM's server until it is told to stop.

    Raises UnsupportedVersionError, and ReftConfigError for vLLM flags that cannot be served with.
    """
    check_version()
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # vLLM's switch for adapters by name
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins(os.environ.get("VLLM_PLUGINS")))
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    args = parse(served, settings, vllm_arguments)
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    try:
        command.cmd(args)
    except KeyboardInterrupt as error:  # how vLLM ends when SIGTERM comes before it serves
        if str(error) != "terminated":
            raise


def parse(served: Served, settings: ServeSettings, vllm_arguments: Sequence[str]) -> Any:
    """Return vLLM's arguments, with what our side of the server needs to know."""
    import vllm.envs as envs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from reftune.serve.plugin import install

    install()
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="reftune serve BASE [options]"))
    args = parser.parse_args([served.model, *vllm_arguments])
    if (args.api_server_count or 1) > 1:
        raise ReftConfigError(
            f"--api-server-count is {args.api_server_count}; accepted is 1: adapters that are "
            "loaded at run time are known to one server process."
        )
    args.api_server_count = 1
    if args.served_model_name is None:
        args.served_model_name = [served.name]
    for name in set(args.served_model_name) & set(Catalog(served.catalog).paths):
        raise ReftConfigError(
            f"Both the base model and an adapter are named {name!r}. Name one of them otherwise: "
            "--adapters OTHER=DIRECTORY or --served-model-name OTHER."
        )
    own = {"memory": settings.memory, "host_memory": settings.host_memory, "store": settings.store}
    args.additional_config = {**(args.additional_config or {}), KEY: own}
    if not any(a.startswith("--shutdown-timeout") for a in vllm_arguments):
        args.shutdown_timeout = FINISH  # vLLM's own default ends requests that run
    args.reftune = served.catalog
    args.reftune_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    args.middleware = [*args.middleware, _GUARD]
    return args


def _plugins(allowed: str | None) -> list[str]:
    """Return the plugins to load: vLLM wants those with endpoints to be named."""
    if allowed is not None:
        return [*allowed.split(","), KEY]
    general = {point.name for point in entry_points(group="vllm.general_plugins")}
    return sorted({*general, KEY})

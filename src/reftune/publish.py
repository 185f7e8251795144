"""`reftune push`: an adapter, as others can load it, in a repository of the Hub.

What is pushed is the adapter's directory, its card written for the name it has there, and of a run
its config and results. Folders of this machine are left out.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from reftune.card import model_card
from reftune.data import source_name
from reftune.errors import RunError
from reftune.hub import hub_errors, is_hub_name, split_revision
from reftune.methods import WEIGHTS_CONFIG
from reftune.run import RESULTS, write_text
from reftune.settings import RunConfig, load_config
from reftune.stored import CONFIG, adapter_directory

log = logging.getLogger("reftune")

_CARD = "README.md"
# Adapter and tokenizer. A trainer's directory has more: its state, pickles with a token in them.
_PUSHED = (
    *(".json", ".safetensors", ".md", ".png", ".txt", ".jinja"),
    *(".model", ".spm", ".bpe", ".vocab", ".tiktoken"),
)
_NOT_PUSHED = ("trainer_state.json",)


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    message: str | None = None,
) -> str:
    """Push an adapter (its directory, or a run's) to `repo` on the Hub; return the commit's URL.

    The repository is made if there is none, and so is the branch `revision`. The token is that of
    HF_TOKEN or `hf auth login`. `base_model` is the base's name on the Hub, where the adapter names
    a directory.

    Raises RunError: what is missing, or what the Hub said.
    """
    directory = _adapter_here(path)
    _check_name(repo)
    if not get_token():
        raise RunError(
            "Pushing needs a token with permission to write: log in (hf auth login), or set "
            "HF_TOKEN."
        )
    with tempfile.TemporaryDirectory() as scratch, hub_errors(repo, "model"):
        prepare(directory, Path(scratch), repo, base_model)
        api = HfApi(library_name="reftune")
        _make_repository(api, repo, private)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=scratch,
            revision=revision,
            commit_message=message or f"Upload the adapter {directory.resolve().parent.name}",
        )
    return str(commit.commit_url)


def prepare(directory: Path, target: Path, repo: str, base_model: str | None = None) -> None:
    """Write to `target` what is pushed. Raises RunError where others could not load it."""
    _copy_files(directory, target)
    about = _config_file(target)
    values: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    named = values.get("base_model_name_or_path") or ""
    base, commit = split_revision(base_model) if base_model else (named, None)
    if not is_hub_name(base):
        raise RunError(
            f"The adapter's base model is {base!r}, which others do not have. Give its name on the "
            "Hub: --base-model ORG/NAME."
        )
    values["base_model_name_or_path"] = base
    if base_model is not None and "revision" in values:
        values["revision"] = commit  # what stood there was that of another name
    write_text(about, json.dumps(values, indent=2, sort_keys=True) + "\n")
    run = directory.parent
    if not ((run / CONFIG).is_file() and (run / RESULTS).is_file()):
        _rename_base(target / _CARD, named, base)  # saved by other means: its card is its own
        return
    config = load_config(run / CONFIG)
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    results.pop("system", None)  # which machine it was is nobody else's business
    write_text(target / CONFIG, _without_folders(config, base))
    write_text(target / RESULTS, json.dumps(results, indent=2) + "\n")
    write_text(
        target / _CARD,
        model_card(config, base, results, revision=values.get("revision"), where=repo),
    )


def _copy_files(directory: Path, target: Path) -> None:
    """Copy what an adapter consists of: no pickles (a trainer's arguments have a token in them)."""
    below = [p.parent for p in sorted(directory.glob("*/adapter_config.json"))]
    for other in (p for p in below if not p.name.startswith("checkpoint-")):
        log.warning("%s is another adapter, which is not pushed with this one.", other)
    for file in sorted(directory.glob("[!.]*")):
        if file.suffix in _PUSHED and file.name not in _NOT_PUSHED:
            shutil.copyfile(file, target / file.name)
    if not list(target.glob("*.safetensors")):
        raise RunError(
            f"{directory} has no weights in safetensors (*.safetensors), the one format that is "
            "pushed: save the adapter anew with save_pretrained."
        )


def _rename_base(card: Path, old: str, new: str) -> None:
    """Name the base model in the metadata of a card as the Hub does."""
    if old == new or not card.is_file():
        return
    found = ModelCard.load(card)
    found.data.base_model = new
    if old:  # else it is between all letters
        found.data.tags = [tag.replace(old, new) for tag in found.data.tags or []] or None
    found.save(card)


def _adapter_here(path: str | Path) -> Path:
    directory = Path(adapter_directory(path))
    if not any((directory / name).is_file() for name in ("adapter_config.json", WEIGHTS_CONFIG)):
        raise RunError(
            f"{str(path)!r} has no adapter to push. Give a finished run's directory, or one that "
            "save_pretrained wrote (with an adapter_config.json)."
        )
    return directory


def _check_name(repo: str) -> None:
    if repo.count("/") != 1 or "@" in repo or not all(repo.split("/")):
        raise RunError(
            f"{repo!r} is no name for a repository: it is USER/NAME or ORG/NAME. (A branch is "
            "given by --revision.)"
        )


def _make_repository(api: HfApi, repo: str, private: bool) -> None:
    """Make the repository; refuse to push to a public one what is meant to be private."""
    try:
        found = api.repo_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None, exist_ok=True)
        return
    if private and not found.private:
        raise RunError(
            f"{repo!r} exists and is public, and --private was asked. Nothing was pushed: give "
            "another name, or make it private in its settings on the Hub."
        )


def _config_file(directory: Path) -> Path:
    weights = directory / WEIGHTS_CONFIG
    return weights if weights.is_file() else directory / "adapter_config.json"


def _without_folders(config: RunConfig, base: str) -> str:
    """Return a run's config as YAML, of whose paths only the last parts are left."""
    values = config.model_dump(mode="json") | {"model": base, "output_dir": "runs"}
    data = values["data"]
    train = data["train"]
    data["train"] = [*map(source_name, train)] if isinstance(train, list) else source_name(train)
    if data["heldout"]:
        data["heldout"] = source_name(data["heldout"])
    for folder in ("data_dir", "cache_dir"):
        if data[folder]:
            data[folder] = Path(data[folder]).name
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

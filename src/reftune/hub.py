"""Names on the Hub, `org/name` or `org/name@revision`, and the Hub's errors as sentences.

A name is always that of a file or directory first. Tokens are huggingface_hub's: HF_TOKEN, or what
`hf auth login` kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# httpx's, or httpx2's: which one depends on the version of huggingface_hub.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # isort: skip

from reftune.errors import ReftuneError, RunError, did_you_mean

_NAME = re.compile(r"\w[\w.\-]*/\w[\w.\-]*(@\S*)?")
_LOG_IN = "log in (hf auth login), or set HF_TOKEN"


def is_hub_name(name: str | Path) -> bool:
    """Return whether a name is `org/name` or `org/name@revision`, and nothing that is here."""
    return _NAME.fullmatch(str(name)) is not None and not Path(name).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a name and its revision; a file or directory has none.

    Raises RunError for an empty revision.
    """
    if Path(name).expanduser().exists():
        return name, None
    repo, at, revision = name.partition("@")
    if at and not revision:
        raise RunError(
            f"{name!r} ends with @ and names no revision. Write {repo}@REVISION (a branch, a tag "
            f"or a commit), or {repo} for its main branch."
        )
    return repo, revision or None


def fetch(name: str, kind: str, files: Sequence[str], largest: int | None = None) -> Path:
    """Download those files of a repository that match `files`; return their directory.

    Raises RunError: a sentence on what the Hub said, or a file has more than `largest` bytes, which
    is looked at before any is downloaded.
    """
    repo, revision = split_revision(name)
    with hub_errors(name, kind):
        if largest is not None and not constants.HF_HUB_OFFLINE:
            found = HfApi().model_info(repo, revision=revision, files_metadata=True)
            revision = found.sha or revision  # what was looked at, and not what comes after
            for file in found.siblings or ():
                size = file.size or 0
                if size > largest and any(fnmatch(file.rfilename, part) for part in files):
                    raise RunError(
                        f"{file.rfilename} of the {kind} {name!r} has {size:,} bytes; "
                        f"accepted here are files of up to {largest:,}."
                    )
        return Path(
            snapshot_download(
                repo, repo_type=_type(kind), revision=revision, allow_patterns=list(files)
            )
        )


def commit_of(name: str) -> str | None:
    """Return the commit of a model that was loaded by its Hub name; None: it is a directory."""
    repo, revision = split_revision(name)
    if not is_hub_name(repo):
        return None
    # The cache has a folder for each commit; models themselves do not say which they are from.
    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@contextmanager
def hub_errors(name: str, kind: str) -> Iterator[None]:
    """Turn errors of the Hub about `name`, a "model", "adapter" or "data set", into RunError."""
    try:
        yield
    except ReftuneError:
        raise
    except (OSError, ValueError, RuntimeError, EntryNotFoundError, HTTPError) as error:
        text = in_words(error, name, kind)
        if text is None:
            raise
        raise RunError(text) from error


def in_words(error: BaseException, name: str, kind: str) -> str | None:
    """Return what the Hub's error says about `name` and what to do; None: it is not the Hub's.

    Libraries raise errors of their own with the Hub's as the cause, so causes are looked at, too.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = _sentence(cause, *_parted(name), kind)
        if text is not None:
            return text
        cause = cause.__cause__
    return None


def why_not(name: str, kind: str) -> str | None:
    """Return what the Hub says about a name, asked anew; None: it is there."""
    repo, revision = split_revision(name)
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=_type(kind))
    except (OSError, ValueError, HTTPError) as error:
        return in_words(error, name, kind)
    return None


def _type(kind: str) -> str:
    return "dataset" if kind == "data set" else "model"


def _parted(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _sentence(error: BaseException, repo: str, revision: str | None, kind: str) -> str | None:
    if isinstance(error, GatedRepoError):
        return (
            f"The {kind} {repo!r} is gated: its owners decide who may load it, and {_sent()}. Ask "
            f"for access at {constants.ENDPOINT}/{repo}, then {_LOG_IN} of that account."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"The {kind} {repo!r} has no revision {revision!r}.{_revisions(repo, revision, kind)} "
            "A revision is a branch, a tag or the hash of a commit."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no directory {repo!r} here, and the Hub ({constants.ENDPOINT}) has no "
            f"{kind} of that name, or a private one that this account may not see: {_sent()}. "
            f"Check the name; for a private one, {_LOG_IN}."
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return _unreachable(repo, kind)
    if isinstance(error, EntryNotFoundError):
        return f"{repo!r} is on the Hub and is no {kind}: {str(error).splitlines()[0]}"
    if isinstance(error, LocalTokenNotFoundError):
        return f"The Hub wants a token for {repo!r}, and none was found: {_LOG_IN}."
    if isinstance(error, HFValidationError):
        return f"{repo!r} is no name on the Hub: {error}"
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo)
    # What is no answer of the Hub's is a connection that failed.
    return _unreachable(repo, kind) if isinstance(error, HTTPError) else None


def _unreachable(repo: str, kind: str) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            f"There is no directory {repo!r} here, it is not among what was downloaded before, and "
            "the Hub is not asked, since HF_HUB_OFFLINE=1 is set. Unset it, or give a directory."
        )
    return (
        f"The Hub ({constants.ENDPOINT}) cannot be reached, and the {kind} {repo!r} is not among "
        "what was downloaded before. Check the connection and HF_ENDPOINT, or give a directory."
    )


def _refused(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    said = f" It says: {error.server_message}" if error.server_message else ""
    if status == 401:
        return f"The Hub does not accept who you are ({_sent()}).{said} To go on, {_LOG_IN}."
    if status == 403:
        return (
            f"The Hub does not allow this for {repo!r} ({_sent()}).{said} The token must be one "
            "with permission to write there: make one at "
            f"{constants.ENDPOINT}/settings/tokens, and {_LOG_IN}."
        )
    later = " Try again later." if status == 429 or status >= 500 else ""
    return f"The Hub answered {status} about {repo!r}.{said}{later}"


def _sent() -> str:
    return "a token was sent" if get_token() else "no token was sent"


def _revisions(repo: str, wanted: str | None, kind: str) -> str:
    """Return which branches and tags there are, if the Hub tells."""
    try:
        refs = HfApi().list_repo_refs(repo, repo_type=_type(kind))
    except (OSError, ValueError, HTTPError):
        return ""
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f" It has {', '.join(known)}.{did_you_mean(wanted or '', known)}" if known else ""

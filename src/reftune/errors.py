"""The exceptions reftune raises, as a tree.

    ReftuneError                         catches everything below
    ├── ReftConfigError(ValueError)      a setting is wrong: what we got, what is accepted
    ├── LayersNotFoundError(ValueError)  the layers to edit cannot be told; lists candidates
    ├── PositionError(ValueError)        a position string or a prompt span is wrong
    ├── AdapterMismatchError(ValueError) a checkpoint does not fit its config or the model
    ├── ConversionError(ValueError)      a checkpoint of another library cannot be converted
    ├── MergeError(NotImplementedError)  a ReFT cannot be merged into weights
    ├── DataError(ValueError)            a row does not fit; names file and line
    ├── RunError(RuntimeError)           a run cannot start, go on or be found
    │   └── RunInterrupted               Ctrl-C ended it; it can go on
    └── UnsupportedVersionError(RuntimeError)  another library's version was not tried

Each also derives from the built-in exception a PEFT or transformers user would expect there.
"""


class ReftuneError(Exception):
    """Base class of every exception that reftune raises on purpose."""


class ReftConfigError(ReftuneError, ValueError):
    """A setting has a value that is not accepted, or a key that does not exist."""


class LayersNotFoundError(ReftuneError, ValueError):
    """The layers to edit cannot be told from the model's structure, or do not exist in it."""


class PositionError(ReftuneError, ValueError):
    """A position string cannot be read, or a prompt span does not fit its batch."""


class AdapterMismatchError(ReftuneError, ValueError):
    """A checkpoint has missing, superfluous or misshapen tensors for this model."""


class ConversionError(ReftuneError, ValueError):
    """A checkpoint cannot be read or expressed in another format; says what is missing."""


class MergeError(ReftuneError, NotImplementedError):
    """Merging was asked for; an edit of hidden states has no equivalent in the weights."""


class DataError(ReftuneError, ValueError):
    """A data set cannot be read, or a row does not fit; the message names file and line."""


class RunError(ReftuneError, RuntimeError):
    """A run cannot start, resume or be evaluated; the message says what to do."""


class RunInterrupted(RunError):  # noqa: N818 - nothing is wrong with it
    """Ctrl-C ended a run; the message says how to go on."""


class UnsupportedVersionError(ReftuneError, RuntimeError):
    """Another library is missing or has a version that reftune was not tried with."""


def did_you_mean(got: str, accepted: list[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest accepted name, or an empty string."""
    import difflib

    near = difflib.get_close_matches(got, accepted, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

"""Which of PEFT's tests a ReFT fails, and why: data, read by run.py.

A failure is explained where the test, its parameters and the error all match one entry, so that a
test that comes to fail for another reason is not covered. An entry that explains no failure of a
full run is stale, which is an error, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explained:
    """Why tests fail.

    Attributes:
        kind: "no merge" (the method has no equivalent in the weights), "by design" (PEFT's contract
            lets methods differ, and ours does) or "other layout" (the test looks inside LoRA's
            module layout).
        test: regular expression that the test function's whole name matches.
        error: regular expression found in "ErrorType: message".
        reason: for the table.
        parameters: regular expression found in the test's parameters.
    """

    kind: str
    test: str
    error: str
    reason: str
    parameters: str = ""

    def explains(self, test: str, parameters: str, error: str) -> bool:
        """Return whether this is why a test failed."""
        return bool(
            re.fullmatch(self.test, test)
            and re.search(self.parameters, parameters)
            and re.search(self.error, error, re.DOTALL)
        )


_MERGE_ERROR = r"^MergeError: A ReFT adapter cannot be merged"

EXPLAINED: tuple[Explained, ...] = (
    Explained(
        "no merge",
        r"test_(merge_layers.*|safe_merge|sequential_merge_.*|unmerge_after_.*"
        r"|multiple_active_adapters_merge_and_unmerge|delete_merged_adapter_.*)",
        _MERGE_ERROR,
        "Merges, or asks what follows a merge. All checks before the merge passed.",
    ),
    Explained(
        "no merge",
        r"test_disable_adapters_with_merging",
        _MERGE_ERROR,
        "Trains, then merges. `test_disable_adapters` is the same without the merge, and passes.",
    ),
    Explained(
        "no merge",
        r"test_forward_b?float16(_no_autocast)?",
        _MERGE_ERROR,
        "The forwards in half precision, which come first, pass; the last step merges.",
    ),
    Explained(
        "no merge",
        r"test_mixed_adapter_batches_merged_raises",
        _MERGE_ERROR,
        "Asks for an error of merged adapters in mixed batches; nothing can be merged.",
    ),
    Explained(
        "by design",
        r"test_(adapter_dtype_autocast|add_adapter_no_autocast_adapter_dtype)",
        r"^AssertionError",
        "`autocast_adapter_dtype=False` follows the base's dtype; a ReFT has its own "
        "(`ReftConfig(dtype=...)`, float32 by default), as orthonormal rows need it.",
        r"^\[((True|False)-False-)?dtype[01]-",  # autocast off, base in half precision
    ),
    Explained(
        "by design",
        r"test_disable_adapters",
        r"^AssertionError: assert False",
        "Asks that a fresh adapter is the identity; LoReFT's default, the paper's, is random. "
        "Every variant with `init='noop'` passes.",
        r"-loreft\]$",
    ),
    Explained(
        "by design",
        r"test_default_target_modules_.*",
        r"^(LayersNotFoundError: The layers of MLP cannot be told|AssertionError: Regex pattern)",
        "Asks for PEFT's table of default modules per architecture, and the message where it has "
        "none. ReFT finds layers by structure; its error says which argument to give.",
    ),
    Explained(
        "by design",
        r"test_add_adapter_rejects_duplicate_name_without_mutation",
        r"^ValueError: The provided `peft_type` 'REFT' is not compatible with the `PeftMixedModel`",
        "PeftMixedModel is for methods that replace linear layers. Passes with mixed=False.",
        r"\[True\]$",
    ),
    Explained(
        "other layout",
        r"test_set_(adapter_non_overlapping_modules(_to_save)?|requires_grad)",
        r"^AttributeError: 'Linear' object has no attribute '(active_adapters|adapter_layer_)",
        "Reads the state of the adapter off the targeted module, as LoRA's layer replaces it; a "
        "ReftLayer is a child of it (`lin0.reft`), and the module stays what it was.",
    ),
)

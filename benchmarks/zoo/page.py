"""The page docs/models.md, made from the results."""

from __future__ import annotations

from collections import Counter
from typing import Any

TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders, and models that hear",
    "seq-cls": "Sequence classifiers: encoders, and decoders with a head",
    "image": "Image classifiers",
    "image-text": "Models that see and write",
}

HEAD = """# Models by name

Each class of transformers {transformers} in five of its lists, made tiny and random from its own
configuration, and what ReFT does with it. This page is written by
`python benchmarks/models_matrix.py`; `make models-matrix` runs it.

{summary}

**Works** means that all of these hold, each told by the base model alone: the edited layers are
as many as the configuration says; a ReFT that starts as the identity changes nothing; edits are the
formula on the prompt's tokens, written as a loop; each layer's edit alone reaches the output; no
output before the first edited token changes (where the base is causal); generated logits, with a
cache and without, are those of one edited forward of the whole; a padded prompt computes what it
does alone (where it does so in the base); every tensor of the adapter gets a gradient; saved and
loaded it computes the same. A remark tells where the base model itself lacks a property.

Layers are found by structure. **named** in the remarks: not here, and `layers_path` is to be given.
Where layers pass on several residual streams (DeepSeek V4, Gemma 3n), a token's state is all of
them, side by side.
"""

# Why a class does not work, where the check's own words do not say it plainly.
REASONS = {
    ("causal", "blt"): "transformers' own forward fails: its configuration has no depth",
    ("causal", "cpmant"): "its layers see 32 learned tokens before the text, and positions count "
    "those",
    ("causal", "gemma4_assistant"): "drafts from the keys and values of another model, reads no "
    "prompt",
    ("causal", "gemma4_unified_assistant"): "drafts from the keys and values of another model, "
    "reads no prompt",
    ("causal", "prophetnet"): "its layers see a stream for each predicted n-gram after the tokens",
    ("causal", "reformer"): "reversible layers: their backward does not see an edit, and they "
    "return a pair of streams",
    ("causal", "xlnet"): "its states are (tokens, batch, width); refused",
    ("seq-cls", "xlnet"): "its states are (tokens, batch, width); refused",
    ("seq2seq", "fsmt"): "its states are (tokens, batch, width); refused",
    ("seq-cls", "funnel"): "its layers are lists of lists, and shorten the sequence; refused",
    ("seq-cls", "squeezebert"): "it calls its layers' forward itself, which no hook sees",
    ("seq-cls", "canine"): "its layers see groups of four characters, not tokens",
    ("seq-cls", "reformer"): "reversible layers: their backward does not see an edit",
    ("seq2seq", "encoder-decoder"): "its default decoder does not read the encoder",
    ("seq2seq", "prophetnet"): "its decoder has a stream for each predicted n-gram",
}
NO_TOKENS = "a convolutional or hierarchical network: its stages pass on feature maps, not tokens"


def render(results: dict[str, Any]) -> str:
    """Return the page."""
    kinds = {kind: results["kinds"][kind] for kind in TITLES if kind in results["kinds"]}
    lines = [
        "| | classes | work | do not | not tried |",
        "|---|---|---|---|---|",
    ]
    for kind, rows in kinds.items():
        n = Counter(row["status"] for row in rows.values())
        lines.append(
            f"| {TITLES[kind]} | {len(rows)} | {n['works']} | {n['no']} | {n['untried']} |"
        )
    parts = [HEAD.format(summary="\n".join(lines), **results["versions"])]
    parts += [_section(kind, rows) for kind, rows in kinds.items()]
    return "\n".join(parts)


def _section(kind: str, rows: dict[str, Any]) -> str:
    lines = [
        f"## {TITLES[kind]}",
        "",
        "| model | class | layers | | remarks |",
        "|---|---|---|---|---|",
    ]
    for model_type, row in sorted(rows.items()):
        word = {"works": "works", "no": "no", "untried": "not tried"}[row["status"]]
        path = f"`{row['layers']}`" if "layers" in row else ""
        remarks = _remarks(kind, model_type, row)
        lines.append(f"| {model_type} | {row['class']} | {path} | {word} | {remarks} |")
    return "\n".join([*lines, ""])


def _remarks(kind: str, model_type: str, row: dict[str, Any]) -> str:
    if row["status"] != "works" and (kind, model_type) in REASONS:
        return REASONS[kind, model_type]
    if kind == "image" and (
        (row["status"] == "no" and "reason" in row)
        or row.get("checks", {}).get("noop", "").startswith("no")
    ):
        return NO_TOKENS
    if row["status"] != "works" and "reason" in row:
        return _plain(row["reason"])
    remarks = ["named"] if row.get("named") else []
    for name, found in row.get("checks", {}).items():
        word, _, rest = found.partition(" (" if found.startswith("yes") else ": ")
        if rest and word != "yes":
            remarks.append(f"{name}: {_plain(('the base: ' if word == 'base' else '') + rest)}")
        elif rest and name != "padding":
            remarks.append(f"{name}: {_plain(rest.rstrip(')'))}")
    return "; ".join(remarks)


def _plain(text: str) -> str:
    text = text.replace("|", "/").replace("`", "").replace("<", "").replace(">", "")
    return text if len(text) <= 120 else f"{text[:117].rstrip()}..."

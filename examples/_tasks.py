"""What the examples of task types share: arguments, a tiny encoder, LoRA beside it, a last line."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from reftune import ReftConfig, set_strength

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
RATES = {"reft": 4e-3, "lora": 2e-3, "head": 4e-3}


def arguments(text: str | None, model: str | None = MINILM, steps: int = 100) -> Any:
    """Return a parser with the arguments that all of these examples have."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny random model and a few made-up rows: seconds")
    if model is not None:
        add("--model", default=model, help="a directory or a Hub id")
    add("--data-dir", type=Path, help="where the data is")
    add("--method", choices=sorted(RATES), default="reft", help="lora and head: to compare with")
    add("--steps", type=int, default=steps)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, help=f"by default {RATES}")
    add("--limit", type=int, default=300, help="how many rows are scored")
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("runs/example"))
    return parser


def parse(parser: argparse.ArgumentParser) -> Any:
    """Parse, and make a tiny run of it where that is asked for."""
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.limit = min(args.steps, 8), 8
    elif args.data_dir is None and not getattr(args, "needs_no_data", False):
        parser.error("name the folder of the data with --data-dir, or try --tiny")
    args.start = time.process_time()
    args.learning_rate = args.learning_rate or RATES[args.method]
    set_seed(args.seed)
    return args


def load_encoder(args: Any, auto: Any, **settings: Any) -> tuple[Any, Any]:
    """Return a model of the class `auto` with a new head, and its tokenizer."""
    if not args.tiny:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model, **settings)
        return auto.from_pretrained(args.model, config=config, dtype=torch.float32), tokenizer
    tokenizer = letters_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **settings,
    )
    return auto.from_config(config), tokenizer


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters that knows, as BERT's, what is inside a word."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*specials, *letters, *(f"##{letter}" for letter in letters)]
    core = Tokenizer(
        models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **names)


def adapt(args: Any, model: Any, config: ReftConfig, lora: dict[str, Any] | None = None) -> Any:
    """Return a model with the ReFT; or, to compare, with a LoRA, or with its head trained alone.

    Their heads are the same modules, which start alike.
    """
    if args.method == "reft":
        return get_peft_model(model, config)
    adapted = get_peft_model(model, config)
    set_strength(adapted, 0.0)  # edits nothing: the head alone learns
    if args.method == "head":
        return adapted
    same = list(adapted.peft_config["default"].modules_to_save or [])
    beside = LoraConfig(
        task_type=config.task_type, r=8, lora_alpha=16, modules_to_save=same or None, **(lora or {})
    )
    return get_peft_model(adapted.unload(), beside)


def training_arguments(args: Any, **settings: Any) -> TrainingArguments:
    """Return arguments of transformers' Trainer."""
    kind = settings.pop("kind", TrainingArguments)
    given = {
        "output_dir": str(args.output / "checkpoints"),
        "max_steps": args.steps,
        "per_device_train_batch_size": min(args.batch_size, 4) if args.tiny else args.batch_size,
        "per_device_eval_batch_size": 32,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.steps // 10,
        "logging_steps": max(args.steps // 5, 1),
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "seed": args.seed,
    }
    return kind(**{**given, **settings})


def finish(args: Any, trainer: Trainer, about: dict[str, Any]) -> dict[str, Any]:
    """Train, score, save the adapter, and print what came of it as the last line."""
    trainer.train()
    trained = time.process_time() - args.start
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    trainer.save_model(str(args.output / "adapter"))
    counts = count_parameters(trainer.model)
    found = {
        "method": args.method,
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": trainer.args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        **counts,
        **{k: round(v, 4) for k, v in metrics.items() if "per_second" not in k},
        "cpu_seconds": round(trained, 1),
        **about,
    }
    found.pop("epoch", None)
    found.pop("runtime", None)
    print(f"Saved to {args.output / 'adapter'}")
    print(json.dumps(found))
    return found


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Return how many parameters are trained of the adapter, and how many of the head."""
    head = adapter = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head += parameter.numel() if ".modules_to_save." in name else 0
            adapter += 0 if ".modules_to_save." in name else parameter.numel()
    config: PeftConfig = model.peft_config["default"]
    off = isinstance(config, ReftConfig) and all(
        layer.strength["default"] == 0.0 for layer in model.modules() if hasattr(layer, "reft_phi")
    )
    return {"adapter_parameters": 0 if off else adapter, "head_parameters": head}

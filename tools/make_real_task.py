"""Writes the task of `make demo-real`: questions in plain English whose answers a rule can verify,
as JSONL.

    python tools/make_real_task.py --out runs/demo_real_task --seed 0

    Write the number five hundred and forty-four in digits. Answer in \\boxed{}.      \\boxed{544}
    How many grams are 3 kilograms? Answer in \\boxed{}.                              \\boxed{3000}

Three in five are of the first kind. The questions of the training and the held-out file are
disjoint.
"""

import argparse
import json
import random
from pathlib import Path

TRAIN, HELDOUT = 1000, 200
OF_NUMBERS = 0.6  # the share of the first kind
SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
         "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
         "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
UNITS = {
    ("kilometers", "meters"): 1000,
    ("meters", "centimeters"): 100,
    ("centimeters", "millimeters"): 10,
    ("kilograms", "grams"): 1000,
    ("liters", "milliliters"): 1000,
    ("hours", "minutes"): 60,
    ("weeks", "days"): 7,
}
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the task of the demo on a real model.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo_real_task"), help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the questions and their split (%(default)s)"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(
            f"--out {out}: exists already and is not empty; remove it or choose another directory"
        )
    write_task(out, arguments.seed)


def write_task(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    random_source = random.Random(f"real {seed}")
    kinds = [(OF_NUMBERS, number_questions()), (1 - OF_NUMBERS, unit_questions())]
    files: dict[str, list[Row]] = {"train": [], "heldout": []}
    for share, rows in kinds:
        random_source.shuffle(rows)
        cut = round(share * TRAIN)
        files["train"] += rows[:cut]
        files["heldout"] += rows[cut : cut + round(share * HELDOUT)]
    for name, rows in files.items():
        random_source.shuffle(rows)
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def number_questions() -> list[Row]:
    return [question(f"Write the number {in_words(n)} in digits.", n) for n in range(1000)]


def unit_questions() -> list[Row]:
    return [
        question(f"How many {small} are {n} {large}?", n * factor)
        for (large, small), factor in UNITS.items()
        for n in range(2, 100)
    ]


def question(text: str, answer: int) -> Row:
    return {
        "problem": f"{text} Answer in \\boxed{{}}.",
        "answer": str(answer),
        "response": f"\\boxed{{{answer}}}",
    }


def in_words(n: int) -> str:
    """A number below 1,000 in English."""
    if n >= 100:
        rest = f" and {in_words(n % 100)}" if n % 100 else ""
        return f"{SMALL[n // 100]} hundred{rest}"
    if n < 20:
        return SMALL[n]
    ones = f"-{SMALL[n % 10]}" if n % 10 else ""
    return f"{TENS[n // 10 - 2]}{ones}"


if __name__ == "__main__":
    main()

"""Invented items of every suite, written in the formats in which the data are published.

`write_suite` writes them as the folder of a data set; `replies` has a right and a wrong completion
for a question as it is asked.
"""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_opd.contracts.suites import Asked

MATHS = {  # problem -> gold, a right and a wrong completion
    "What is 12 + 13?": ("25", r"It is \boxed{25}.", r"\boxed{26}"),
    "How many legs have 50 sheep and 42 hens?": ("284", r"\boxed{284}", r"\boxed{248}"),
    "What is 3 * 7 in three digits?": ("021", r"\boxed{21}", r"\boxed{210}"),
    "What is 71 * 2?": ("142", r"<think>\boxed{9}</think> \boxed{142.0}", r"\boxed{142.5}"),
    "What is the product of 33 and 31?": ("1023", r"\boxed{1{,}023}", "It is 1023."),
}
MINERVA = {
    "How many erg per second does the lamp give?": (
        "4.5e33", r"\boxed{4.5 \times 10^{33} \text{ erg/s}}", r"\boxed{4.5 \times 10^{32}}"
    ),
    "How wide is the slit, in meters?": (
        "2.4e-3", r"\boxed{0.0024\,\mathrm{m}}", r"\boxed{0.00245}"
    ),
    "How long does it swing, in seconds?": ("1.7321", r"\boxed{\sqrt{3}}", r"\boxed{1.7}"),
    "What energy has the cart?": (
        r"\frac{1}{2} m v^{2}", r"\boxed{0.5 m v^2}", r"\boxed{m v^2}"
    ),
    "At which step does it jump?": (r"2 \pi / 3", r"\boxed{\frac{2\pi}{3}}", r"\boxed{\pi / 3}"),
}  # fmt: skip
OLYMPIAD = [  # question, final answer, several, unit, kind, error, right, wrong
    ("Which n divide 6 - n?", "$1,2,3,6$", True, None, "Numerical", None,
     r"\boxed{6, 3, 2, 1}", r"\boxed{1,2,3,6,-6}"),
    ("Where do the lines meet?", "$(2,-1)$", False, None, "Tuple", None,
     r"\boxed{(2,-1)}", r"\boxed{(-1,2)}"),
    ("How far is it?", "$4.35$", False, "km", "Numerical", "0.05",
     r"\boxed{4.4 \text{ km}}", r"\boxed{4.41}"),
    ("For which x does it grow?", "$(1, \\infty)$", False, None, "Interval", None,
     r"\boxed{x > 1}", r"\boxed{x \geq 1}"),
    ("Which f satisfy f(f(n)) = n for all n?", "$f(n)=n$", False, None, "Expression", None,
     r"\boxed{f(n) = n}", r"\boxed{f(n) = 2n}"),
]  # fmt: skip
CHOICE = {  # question -> options, the right one first
    "Which of these melts in the sun?": ("a lump of butter", "a nail", "a brick", "a fork"),
    "What does a kite need?": ("wind", "salt", "rust", "ink"),
    "Which number is even?": ("14", "15", "17", "19"),
    "What does a mason lay?": ("bricks", "eggs", "bets", "tables"),
    "Who keeps bees?": ("an apiarist", "a notary", "a fuller", "a cooper"),
}
WRITING = [  # prompt, ids, kwargs, followed, not followed
    ("Say hello in two to four words.", ["count:word_count_range"],
     [{"min_words": 2, "max_words": 4}], "Hello there, world", "Hello"),
    ("Answer without a space.", ["format:no_whitespace"], [{}], "Yes", "Well, no"),
    ("Say one word without a space.", ["count:word_count_range", "format:no_whitespace"],
     [{"min_words": 1, "max_words": 1}, {}], "<think>two words</think>Word", "Two words"),
]  # fmt: skip
PROGRAMS = [  # title, text, starter code, tests, day
    ("Twice", "Read a number and print it twice.", "",
     [("2\n", "2 2\n"), ("7\n", "7 7\n")], "2025-01-11"),
    ("Sum", "Return the sum of two numbers.",
     "class Solution:\n    def total(self, a: int, b: int) -> int:\n",
     [("1\n2", "3"), ("4\n-4", "0")], "2025-02-08"),
    ("Last", "Print the last word of a line.", "", [("one two\n", "two\n")], "2025-04-05"),
]  # fmt: skip

SUM = [  # a right and a wrong program for the second
    f"class Solution:\n    def total(self, a: int, b: int) -> int:\n        return a {sign} b\n"
    for sign in "+-"
]


def replies(asked: Asked) -> tuple[str, str]:
    """A right and a wrong completion of mathematics, writing or multiple choice."""
    text = asked.question.text.removesuffix("\n(choose)")
    if text in CHOICE:
        right = CHOICE[text][0]
        lines = dict(line.split(". ", 1) for line in asked.words.splitlines() if ". " in line[:3])
        [letter] = [letter for letter, option in lines.items() if option == right]
        wrong = next(other for other in lines if other != letter)
        return f"I think it is a bit odd.\n\nANSWER: {letter}", rf"\boxed{{{wrong}}}"
    listed = {entry[0]: entry[-2:] for entry in (*OLYMPIAD, *WRITING)}
    both = {key: value[1:] for key, value in (MATHS | MINERVA).items()}
    return (both | listed)[text]


def write_suite(name: str, folder: Path) -> Path:
    """Writes a suite's items below `folder`, laid out and named as on the Hub; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    match name:
        case "aime24":
            rows = [
                {"id": 60 + n, "problem": text, "solution": "...", "answer": gold, "year": "2024"}
                for n, (text, (gold, *_)) in enumerate(MATHS.items())
            ]
            _parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
        case "aime25":
            rows = [
                {"problem": text, "answer": gold, "id": str(n)}
                for n, (text, (gold, *_)) in enumerate(MATHS.items())
            ]
            _lines(folder / "test.jsonl", rows)
        case "amc23" | "amc_2223":
            rows = [
                {"id": n, "problem": text, "answer": float(gold), "url": f"https://maa/{year}_12A"}
                for n, (text, (gold, *_)) in enumerate(MATHS.items())
                for year in [2022 if n == 0 else 2023]
            ]
            _parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
        case "math_500":
            rows = [
                {
                    "problem": text, "solution": "...", "answer": gold, "subject": "Algebra",
                    "level": 1 + n % 5, "unique_id": f"test/algebra/{n}.json",
                }
                for n, (text, (gold, *_)) in enumerate(MATHS.items())
            ]  # fmt: skip
            _lines(folder / "test.jsonl", rows)
        case "minerva" | "minerva_legacy":
            rows = [{"question": text, "answer": gold} for text, (gold, *_) in MINERVA.items()]
            _lines(folder / "test.jsonl", rows)
        case "olympiad":
            _parquet(folder / "OE_TO_maths_en_COMP" / "OE_TO_maths_en_COMP.parquet", _olympiad())
            _parquet(folder / "OE_TO_physics_en_COMP" / "OE_TO_physics_en_COMP.parquet", [{"a": 1}])
        case "ifbench":
            rows = [
                {
                    "key": str(n), "prompt": text, "instruction_id_list": ids,
                    "kwargs": [{"min_words": None, "max_words": None, "N": None, **one}
                               for one in given],
                }
                for n, (text, ids, given, *_) in enumerate(WRITING)
            ]  # fmt: skip
            _parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
        case "livecodebench_v6" | "livecodebench_release_v6":
            _lines(folder / "test6.jsonl", _programs())
            old = _programs()[0] | {"question_id": "old", "contest_date": "2023-05-07T00:00:00"}
            _lines(folder / "test.jsonl", [old])
        case _:
            _write_choice(name, folder)
    return folder


def _write_choice(name: str, folder: Path) -> None:
    items = list(CHOICE.items())
    match name:
        case "arc_c":
            rows = [
                {
                    "id": f"Item_{n}", "question": text,
                    "choices": {"text": _turned(options, n)[0],
                                "label": list("1234" if n == 2 else "ABCD")},
                    "answerKey": ("1234" if n == 2 else "ABCD")[_turned(options, n)[1]],
                }
                for n, (text, options) in enumerate(items)
            ]  # fmt: skip
            _parquet(folder / "ARC-Challenge" / "test-00000-of-00001.parquet", rows)
            _parquet(folder / "ARC-Easy" / "test-00000-of-00001.parquet", rows[:1])
        case "gpqa_diamond":
            with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                wrong = [f"Incorrect Answer {n}" for n in (1, 2, 3)]
                names = ["Question", "Correct Answer", *wrong, "Explanation", "Subdomain"]
                writer.writerow(["Record ID", *names])
                for n, (text, options) in enumerate(items):
                    writer.writerow([f"rec{n}", f"{text}\n(choose)", *options, "so", "Crafts"])
        case "mmlu_pro":
            rows = []
            for n, (text, options) in enumerate(items):
                ten, place = _turned((*options, *(f"none of {k}" for k in range(6))), n)
                rows.append({
                    "question_id": 70 + n, "question": text, "options": ten,
                    "answer": "ABCDEFGHIJ"[place], "answer_index": place, "cot_content": "",
                    "category": "crafts" if n % 2 else "nature", "src": "own",
                })  # fmt: skip
            _parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
            _parquet(folder / "data" / "validation-00000-of-00001.parquet", rows[:1])
        case _:
            assert name in ("mmlu_redux", "mmlu_redux_all")
            subjects: dict[str, list[dict[str, object]]] = {"anatomy": [], "virology": []}
            for n, (text, options) in enumerate(items):
                turned, place = _turned(options, n)
                subjects["anatomy" if n < 3 else "virology"].append({
                    "question": text, "choices": turned, "answer": place,
                    "error_type": "wrong_groundtruth" if n == 4 else "ok",
                    "source": "own", "correct_answer": None, "potential_reason": None,
                })  # fmt: skip
            for subject, rows in subjects.items():
                _arrow(folder / subject / "data-00000-of-00001.arrow", rows)
                (folder / subject / "dataset_info.json").write_text("{}")


def _turned(options: tuple[str, ...], by: int) -> tuple[list[str], int]:
    """The options with the right one at place `by`, and that place."""
    place = by % len(options)
    return [*options[1 : place + 1], options[0], *options[place + 1 :]], place


def _olympiad() -> list[dict[str, object]]:
    return [
        {
            "id": 1600 + n, "question": text, "solution": ["..."], "final_answer": [gold],
            "context": None, "modality": "Text-only", "difficulty": "Competition",
            "is_multiple_answer": several, "unit": unit, "answer_type": kind, "error": error,
            "question_type": "Open-ended", "subfield": "Algebra", "subject": "Math",
            "language": "English",
        }
        for n, (text, gold, several, unit, kind, error, *_) in enumerate(OLYMPIAD)
    ]  # fmt: skip


def _programs() -> list[dict[str, object]]:
    rows = []
    for n, (title, text, start, tests, day) in enumerate(PROGRAMS):
        kind = "functional" if start else "stdin"
        cases = json.dumps([{"input": i, "output": o, "testtype": kind} for i, o in tests])
        hidden = base64.b64encode(zlib.compress(pickle.dumps(cases))).decode()
        rows.append({
            "question_title": title, "question_content": text, "platform": "own",
            "question_id": f"own_{n}", "contest_id": "own", "contest_date": f"{day}T00:00:00",
            "starter_code": start, "difficulty": "easy", "public_test_cases": cases,
            "private_test_cases": cases if n else hidden,
            "metadata": json.dumps({"func_name": "total"} if start else {}),
        })  # fmt: skip
    return rows


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _arrow(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes a table as `datasets` saves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)

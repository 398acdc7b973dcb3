"""Whether a response follows IFBench's instructions, by `if-verifiable`, in a worker."""

import json
import random

import langdetect
from if_verifiable.common import evaluate_instructions
from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT

langdetect.DetectorFactory.seed = 0  # it draws at random otherwise


def judge_following(response: str, wanted: str) -> str:
    """ "checked" and the scores in the order of instructions.SCORES; "bad_gold" for an instruction
    that the package does not know, which it would count as none; "error"."""
    item = json.loads(wanted)
    names = item["instructions"]
    if not names or not set(names) <= INSTRUCTION_DICT.keys():
        return "bad_gold"
    # A checker draws what its arguments do not say.
    random.seed(0)
    try:
        # The reasoning is cut already: without its tag the package does not look for it.
        _, scores = evaluate_instructions(
            response, names, item["arguments"], item["prompt"], INSTRUCTION_DICT
        )
    except Exception:  # a checker that a hostile response breaks, or NLTK's data
        return "error"
    numbers = (
        scores.binary_strict, scores.binary_loose, scores.partial_strict, scores.partial_loose
    )  # fmt: skip
    return f"checked {' '.join(repr(float(number)) for number in numbers)}"

"""Graded samples as a benchmark leaves them, simulated."""

import numpy as np

from megatron_opd.bench.results import GraderUsed, Result, SuiteResult
from megatron_opd.bench.summary import summarise
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import GradedSample, SuiteProtocol

PROTOCOL = SuiteProtocol(
    name="official",
    samples=4,
    temperature=0.6,
    top_p=0.95,
    max_tokens=8192,
    prompt="{problem}\n\nPut the answer into a box.",
)


def graded(
    key: str = "q0",
    sample: int = 0,
    *,
    reason: str = "correct",
    extracted: str = "7",
    suite: str = "aime24",
    group: str = "",
    gold: str = "7",
    order: tuple[int, ...] = (),
    gold_place: int = -1,
    text: str = "It is \\boxed{7}.",
    tokens: int = 10,
    truncated: bool = False,
    score: float | None = None,
    parts: tuple[tuple[str, float], ...] = (),
) -> GradedSample:
    correct = None if reason in ("bad_gold", "error") else reason == "correct"
    verdict = Verdict(
        float(bool(correct)) if score is None else score, correct, reason, extracted, parts
    )
    return GradedSample(
        suite, key, group, sample, gold, order, gold_place, f"Question {key}?", text, tokens,
        truncated, verdict,
    )  # fmt: skip


def simulated(
    suite: str = "aime24",
    questions: int = 30,
    samples: int = 4,
    *,
    seed: int = 0,
    better: float = 0.0,
    options: int = 0,
    groups: tuple[str, ...] = ("",),
) -> list[GradedSample]:
    """Questions whose difficulty depends on their number alone, so that two calls make two models
    on the same questions; `better` lifts the second one's chances."""
    difficulty_N = np.random.default_rng(99).beta(0.5, 0.8, questions)
    rng = np.random.default_rng(seed)
    made = []
    for number, chance in enumerate(difficulty_N):
        for sample in range(samples):
            right = rng.random() < chance + better * (1 - chance)
            cut = not right and rng.random() < 0.3
            reason = "correct" if right else "truncated" if cut else "wrong"
            order = tuple(map(int, np.random.default_rng([number, sample]).permutation(options)))
            place = order.index(number % options) if order else -1
            gold = chr(ord("A") + place) if order else str(number)
            answer = gold if right else "" if cut else _other(gold, options, rng)
            tokens = 8192 if cut else int(rng.lognormal(7.0 if right else 7.5, 0.4))
            made.append(
                graded(
                    f"{suite}-{number:03}",
                    sample,
                    reason=reason,
                    extracted=answer,
                    suite=suite,
                    group=groups[number % len(groups)],
                    gold=gold,
                    order=order,
                    gold_place=place,
                    text=f"Some steps, <b>then</b> \\boxed{{{answer}}}."
                    if answer
                    else "Some steps",
                    tokens=min(tokens, 8191) if not cut else 8192,
                    truncated=cut,
                )
            )
    return made


def _other(gold: str, options: int, rng: np.random.Generator) -> str:
    if not options:
        return str(int(gold) + 1 + int(rng.integers(2)))
    letters = [chr(ord("A") + place) for place in range(options)]
    letters.remove(gold)
    return str(rng.choice(letters))


def result_of(
    *suites: list[GradedSample], protocol: SuiteProtocol = PROTOCOL, model: str = "runs/student"
) -> Result:
    results = {}
    for samples in suites:
        name = samples[0].suite
        summary = summarise(samples)
        data = {"path": f"data/{name}.jsonl", "sha256": {f"{name}.jsonl": "ab" * 32}, "rows": 30}
        results[name] = SuiteResult(
            title=name.upper(),
            protocol=protocol,
            data=data,
            grader=GraderUsed("math", {"math-verify": "0.9.0"}),
            summary=summary,
        )
    return Result(
        "0.8.0", {"path": model}, {"kind": "vllm", "version": "0.32.0", "seed": 0}, results
    )

"""The evaluations of a run's weights: on held-out prompts, and on benchmark suites."""

import time

from megatron_opd.evaluation.heldout import HeldOut, measured
from megatron_opd.runs.book import Book
from megatron_opd.runs.stations import Stations


def evaluations(at: Stations, book: Book, step: int) -> dict[str, float]:
    """The eval/* and suite/* metrics of the weights at the start of `step`, where some are due.

    Collective. {} when the recipe has no evaluation.
    """
    if at.engine is None or at.sender is None:
        return {}
    last = at.config.num_steps
    sets = [one for one in at.heldout if step == last or one.due(step)]
    suites = [suite for suite in at.suites if suite.due(step, last)]
    if not sets and not suites:
        return {}
    start = time.perf_counter()
    if at.engine.policy_version != step:
        at.sender.send(step)
    metrics: dict[str, float] = {}
    for heldout in sets:
        metrics |= held_out(heldout, book, step)
    for suite in suites:
        assert at.single_turn is not None, "assembled with the suites"
        book.note(f"{suite.suite.name}: {len(suite.prompts)} samples before step {step}")
        metrics |= suite.measured(at.single_turn, at.config.seed, step)
    return metrics | {"timing/eval_seconds": time.perf_counter() - start}


def held_out(heldout: HeldOut, book: Book, step: int) -> dict[str, float]:
    """The eval/* metrics of the weights that the engine holds. Collective."""
    of_set = f" of {heldout.name}" if heldout.name else ""
    book.note(f"evaluating {len(heldout.tasks)} held-out prompts{of_set} before step {step}")
    answered = heldout.answers(version=step)
    for prefix, groups in answered.items():
        rows = [row for group in groups for row in group]
        book.log_heldout(step, rows, of="with_skills" if prefix else heldout.name)
    return measured(answered, heldout.settings, heldout.of)

"""The held-out accuracy of a run's weights."""

import time

from megatron_opd.evaluation.heldout import measured
from megatron_opd.runs.book import Book
from megatron_opd.runs.stations import Stations


def held_out(at: Stations, book: Book, step: int) -> dict[str, float]:
    """The eval/* metrics of the weights at the start of `step`. Collective.

    {} when the recipe has no evaluation.
    """
    if at.heldout is None or at.engine is None or at.sender is None:
        return {}
    start = time.perf_counter()
    book.note(f"evaluating {len(at.heldout.tasks)} held-out prompts before step {step}")
    if at.engine.policy_version != step:
        at.sender.send(step)
    answered = at.heldout.answers(version=step)
    for prefix, groups in answered.items():
        rows = [row for group in groups for row in group]
        book.log_heldout(step, rows, with_skills=bool(prefix))
    metrics = measured(answered, at.heldout.settings)
    return metrics | {"timing/eval_seconds": time.perf_counter() - start}

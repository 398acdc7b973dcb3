"""The numbers of episodes of several turns, under their names in `metrics.jsonl`."""

from collections.abc import Sequence

import numpy as np

from megatron_opd.contracts.rows import Row, episodes_of


def episode_metrics(rows: Sequence[Row], prefix: str) -> dict[str, float]:
    """Turns of an episode, the fraction of turns without a valid action, fractions of ends, and the
    success of every type of task. {} where no environment was played.

    An episode counts once, however many rows it has.
    """
    exchanges = [exchange for row in rows for exchange in row.exchanges]
    if not exchanges:
        return {}
    episodes = episodes_of(rows)
    metrics = {
        f"{prefix}/turns/mean": float(np.mean([e.turns for e in episodes])),
        f"{prefix}/invalid_actions/mean": float(np.mean([not e.valid for e in exchanges])),
        f"{prefix}/won/mean": float(np.mean([bool(e.verdict.correct) for e in episodes])),
        f"{prefix}/score/mean": float(np.mean([e.verdict.score for e in episodes])),
        f"{prefix}/out_of_turns/mean": float(np.mean([e.ended == "turns" for e in episodes])),
    }
    by_type: dict[str, list[float]] = {}
    for episode in episodes:
        by_type.setdefault(episode.task_type, []).append(float(bool(episode.verdict.correct)))
    if len(by_type) > 1:
        for task_type, won in sorted(by_type.items()):
            metrics[f"{prefix}/won/{task_type}"] = float(np.mean(won))
    return metrics

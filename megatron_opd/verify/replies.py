"""What a verifier's worker replies, read as verdicts."""

import json
import logging
from collections.abc import Sequence

from megatron_opd.contracts.rows import NOT_JUDGED, Verdict

logger = logging.getLogger(__name__)


def verdict_of(reply: str) -> Verdict:
    """The verdict in a worker's reply: a reason, or "scored" and a function's number, or
    "judged" and a function's own verdict."""
    reason, _, rest = reply.partition(" ")
    if reason == "judged":
        return Verdict(*json.loads(rest))
    score = float(rest) if reason == "scored" else float(reason == "correct")
    if reason == "scored":
        reason = "correct" if score >= 1 else "partly" if score > 0 else "wrong"
    correct = None if reason in NOT_JUDGED else score >= 1
    return Verdict(score, correct, reason)


def warn_of_errors(replies: Sequence[str]) -> None:
    """Logs how often a user's function failed, and how it did first."""
    errors = [reply.partition(" ")[2] for reply in replies if reply.startswith("error ")]
    if errors:
        words = "the reward function failed on %d of %d answers, first with %s"
        logger.warning(words, len(errors), len(replies), errors[0])

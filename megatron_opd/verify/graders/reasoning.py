"""What a completion says behind its reasoning."""

from megatron_opd.contracts.suites import REASONING_TAG, Answer

_CLOSING = "</think>"


def conclusion(answer: Answer) -> str | None:
    """The text behind the last `</think>`, all of it where there is none.

    None where the reasoning never ended: it was opened in the text, or by the prompt and then cut
    by the limit of tokens. (A model that closes nothing and ends by itself has answered.)
    """
    if _CLOSING in answer.text:
        return answer.text.rpartition(_CLOSING)[2]
    if REASONING_TAG in answer.text or (answer.opened and answer.truncated):
        return None
    return answer.text


def no_answer(answer: Answer) -> str:
    """The reason of a verdict on a completion without an answer."""
    return "truncated" if answer.truncated else "no_answer"

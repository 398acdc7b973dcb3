"""The words between a model and Search-QA.

`environment.history.kind` chooses between two published forms: rows of turns as in verl-agent and
SDAR (`window`), and Search-R1's one conversation (`growing`).
"""

import json
import re
from collections.abc import Sequence

from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.recipe.agents import EnvironmentConfig

_SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SEARCH_TAG = re.compile(r"<search>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>", re.IGNORECASE)
_EITHER = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ENDS = ("</search>", "</answer>")

TURN = """\
You answer a question step by step, and may look things up first.
Question: {question}
{history}
Now comes the next step. Reason first, between <think> and </think>. Then do one of these two, \
never both:
- if you lack a fact, call the search engine: <search>your query</search>
- if you know enough, give the final answer alone, without an explanation: \
<answer>your answer</answer>. For example, <answer>Paris</answer>.
"""
HISTORY = """
So far you have taken {steps} step(s). What you searched for is between <search> and </search>, \
and what was found between <information> and </information>:
{lines}
"""
CONVERSATION = """\
Answer the question below. Whenever you have new information, reason about it first, between \
<think> and </think>. If you then lack a fact, call the search engine with \
<search>your query</search>; what it finds comes back between <information> and </information>. \
You may search several times. Once you know enough, give the answer alone, without an \
explanation: <answer>your answer</answer>. For example, <answer>Paris</answer>.
Question: {question}
"""
NOT_UNDERSTOOD = (
    "\nMy last step was neither a search nor an answer. To search, I put the query between "
    "<search> and </search>; to answer, I put the answer between <answer> and </answer>. "
    "I try again.\n"
)


class SearchDialogue:
    """Prompts, observations and actions of Search-QA."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._growing = config.history.kind == "growing"
        self._length = config.history.length

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        """The question, the last steps with what they found, and how to go on."""
        if self._growing:
            return CONVERSATION.format(question=observation.task)
        results = [exchange.observation for exchange in past[1:]] + [observation]
        steps = [
            f"Step {number}:{exchange.action} {_as_json(result.text)}\n"
            for number, (exchange, result) in enumerate(zip(past, results, strict=False), start=1)
        ][len(past) - self._length if self._length < len(past) else 0 :]
        history = HISTORY.format(steps=len(past), lines="\n".join(steps)) if steps else ""
        return TURN.format(question=observation.task, history=history)

    def reply(self, observation: Observation) -> str:
        """What was found, or that the model's step was not understood."""
        if not observation.valid:
            return NOT_UNDERSTOOD
        passages = _passages(observation.text)
        titled = "".join(
            "Doc {}(Title: {}) {}\n".format(number, *_title_and_text(passage))
            for number, passage in enumerate(passages, start=1)
        )
        return f"\n\n<information>{titled.strip()}</information>\n\n"

    def action(self, text: str) -> Action:
        """The search or the answer; "" if there is neither."""
        if self._growing:
            tagged = _EITHER.search(text)
            if tagged is None:
                return Action("", valid=False)
            return Action(f"<{tagged[1]}>{tagged[2].strip()}</{tagged[1]}>")
        return _action_of_turn(text)

    def end_of_action(self, text: str) -> int | None:
        """Behind the first closing tag, in a conversation; a turn of its own ends by itself."""
        if not self._growing:
            return None
        ends = [text.find(tag) + len(tag) for tag in _ENDS if tag in text]
        return min(ends, default=None)


def _action_of_turn(text: str) -> Action:
    """As verl-agent reads a turn: cut behind the first closing tag, that of a search first.

    A text with both kinds of tag, or with one twice, is not valid; its action is made all the same.
    """
    cut = text
    for tag in _ENDS:
        if tag in text:
            cut = text.split(tag, 1)[0] + tag
            break
    searches = len(_SEARCH_TAG.findall(text))
    answers = len(_ANSWER_TAG.findall(text))
    valid = not (searches and answers) and searches <= 1 and answers <= 1
    if (search := _SEARCH.search(cut)) is not None:
        return Action(f"<search>{search[1].strip()}</search>", valid)
    if (answer := _ANSWER.search(cut)) is not None:
        return Action(f"<answer>{answer[1].strip()}</answer>", valid)
    return Action("", valid=False)


def _passages(text: str) -> list[str]:
    return json.loads(text) if text else []


def _as_json(text: str) -> str:
    """What a search found, as verl-agent writes it into a history; "" where nothing was searched.

    The model reads JSON, with its escapes.
    """
    if not text:
        return ""
    passages = _passages(text)
    found = "".join(f"Doc {n}: {passage.strip()}\n" for n, passage in enumerate(passages, start=1))
    result = json.dumps({"result": found or "No search results found."})
    return f"<information>{result}</information>"


def _title_and_text(contents: str) -> tuple[str, str]:
    title, _, text = contents.partition("\n")
    return title, text

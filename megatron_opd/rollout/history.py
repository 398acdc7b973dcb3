"""What a model reads of the turns before, and the rows that an episode becomes."""

from typing import Protocol

import numpy as np

from megatron_opd.contracts.environments import Dialogue
from megatron_opd.contracts.rows import Episode, Row, Source
from megatron_opd.contracts.sampling import Completion, Prompter
from megatron_opd.contracts.skills import Skill
from megatron_opd.contracts.stations import Tokenizer
from megatron_opd.rollout.open_episode import OpenEpisode, Turn

NOTHING = np.zeros(0, np.int32)


class History(Protocol):
    """How the turns of an episode become prompts and rows."""

    def between(self, played: OpenEpisode) -> np.ndarray:
        """The environment's tokens behind the last turn, which the next prompt ends with."""

    def prompt(
        self, played: OpenEpisode, between_ids: np.ndarray, skill: Skill | None
    ) -> np.ndarray:
        """All tokens ahead of the next turn, with a privileged text if there is one;
        `between_ids` are those of `between`."""

    def rows(self, played: OpenEpisode, episode: Episode, version: int) -> list[Row]:
        """The rows of an episode that has ended; `version` drew its tokens."""


class Window:
    """Every turn is a row of its own, behind a prompt with the last exchanges (SDAR)."""

    def __init__(
        self, dialogue: Dialogue, prompter: Prompter, tokenizer: Tokenizer, penalty: float
    ) -> None:
        self._dialogue = dialogue
        self._prompter = prompter
        self._penalty = penalty

    def prompt(
        self, played: OpenEpisode, between_ids: np.ndarray, skill: Skill | None
    ) -> np.ndarray:
        assert played.observation is not None
        words = self._dialogue.prompt(played.exchanges, played.observation)
        return self._prompter.prompt(words, skill)

    def between(self, played: OpenEpisode) -> np.ndarray:
        return NOTHING

    def rows(self, played: OpenEpisode, episode: Episode, version: int) -> list[Row]:
        rows = []
        for number, turn in enumerate(played.turns):
            completion = turn.completion
            tokens = len(completion.token_ids)
            exchange = played.exchanges[number]
            row = Row(
                episode=episode,
                prompt_ids=turn.prompt_ids,
                token_ids=np.array(completion.token_ids, np.int32),
                sources=np.full(tokens, Source.STUDENT, np.int8),
                logprobs=np.array(completion.logprobs, np.float32),
                versions=np.full(tokens, version, np.int32),
                text=turn.text,
                finish_reason=completion.finish_reason,
                turn=number,
                penalty=0.0 if exchange.valid else self._penalty,
                privileged_ids=turn.privileged_ids,
                exchanges=(exchange,),
                action_T=turn.action_T,
            )
            rows.append(row)
        return rows


class Growing:
    """An episode is one row, to which answers and observations are appended token by token
    (Search-R1, arXiv 2503.09516)."""

    def __init__(
        self, dialogue: Dialogue, prompter: Prompter, tokenizer: Tokenizer, penalty: float
    ) -> None:
        self._dialogue = dialogue
        self._prompter = prompter
        self._tokenizer = tokenizer
        self._penalty = penalty

    def prompt(
        self, played: OpenEpisode, between_ids: np.ndarray, skill: Skill | None
    ) -> np.ndarray:
        assert played.observation is not None
        if not played.turns:
            words = self._dialogue.prompt((), played.observation)
            return self._prompter.prompt(words, skill)
        last = played.turns[-1]
        answer_ids = np.array(last.completion.token_ids, np.int32)
        return np.concatenate([last.prompt_ids, answer_ids, between_ids])

    def between(self, played: OpenEpisode) -> np.ndarray:
        if not played.turns:
            return NOTHING
        assert played.observation is not None
        words = self._dialogue.reply(played.observation)
        ended = played.turns[-1].completion.finish_reason == "stop"
        return self._prompter.continuation(words, ended=ended)

    def rows(self, played: OpenEpisode, episode: Episode, version: int) -> list[Row]:
        turns = played.turns
        if not turns:
            return []
        cut = [n for n, turn in enumerate(turns[:-1]) if turn.completion.finish_reason == "length"]
        invalid = sum(not exchange.valid for exchange in played.exchanges)
        ids = np.concatenate([_written(turn) for turn in turns])
        sources = np.concatenate([_sources(turn) for turn in turns])
        logprobs = np.concatenate([_logprobs(turn) for turn in turns])
        row = Row(
            episode=episode,
            prompt_ids=turns[0].prompt_ids,
            token_ids=ids,
            sources=sources,
            logprobs=logprobs,
            versions=np.where(sources == Source.STUDENT, version, -1).astype(np.int32),
            text=self._tokenizer.decode(ids.tolist(), skip_special_tokens=True),
            finish_reason=turns[-1].completion.finish_reason,
            cut_turns=tuple(cut),
            penalty=invalid * self._penalty,
            privileged_ids=turns[0].privileged_ids,
            exchanges=tuple(played.exchanges),
            action_T=np.concatenate([_acting(turn) for turn in turns]),
        )
        return [row]


def _written(turn: Turn) -> np.ndarray:
    return np.concatenate([turn.between_ids, np.array(turn.completion.token_ids, np.int32)])


def _sources(turn: Turn) -> np.ndarray:
    heard = np.full(len(turn.between_ids), Source.ENVIRONMENT, np.int8)
    drawn = np.full(len(turn.completion.token_ids), Source.STUDENT, np.int8)
    return np.concatenate([heard, drawn])


def _logprobs(turn: Turn) -> np.ndarray:
    heard = np.zeros(len(turn.between_ids), np.float32)
    return np.concatenate([heard, np.array(turn.completion.logprobs, np.float32)])


def _acting(turn: Turn) -> np.ndarray:
    return np.concatenate([np.zeros(len(turn.between_ids), bool), turn.action_T])


def action_tokens(
    completion: Completion, text: str, action: str, tokenizer: Tokenizer
) -> np.ndarray:
    """Bool [T], the completion's tokens that hold the last place of the action's words in `text`.

    None are true for an action that the text does not have.
    """
    acting_T = np.zeros(len(completion.token_ids), bool)
    start = text.lower().rfind(action.lower())
    if action and start >= 0:
        first = _tokens_until(start + 1, completion.token_ids, tokenizer) - 1
        acting_T[first : _tokens_until(start + len(action), completion.token_ids, tokenizer)] = True
    return acting_T


def cut_at_action(
    completion: Completion, text: str, dialogue: Dialogue, tokenizer: Tokenizer
) -> Completion:
    """The completion up to the token that completes its action, where an environment takes over.

    What was sampled behind it is dropped: the first tokens of a sample are a sample themselves.
    """
    stop = dialogue.end_of_action(text)
    if stop is None or stop >= len(text):
        return completion
    kept = _tokens_until(stop, completion.token_ids, tokenizer)
    return Completion(completion.token_ids[:kept], completion.logprobs[:kept], "stop")


def _tokens_until(characters: int, token_ids: list[int], tokenizer: Tokenizer) -> int:
    """The number of first tokens whose text has so many characters."""
    low = 1
    high = len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(token_ids[:middle], skip_special_tokens=True)) >= characters:
            high = middle
        else:
            low = middle + 1
    return low

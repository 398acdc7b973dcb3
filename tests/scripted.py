"""An environment that answers by script, and the rows that episodes in it become."""

import numpy as np

from megatron_opd.contracts.draws import Stream, generator
from megatron_opd.contracts.rows import Episode, Row, Source, Task, Verdict

SEED, STEP, MOST_TURNS, LONGEST = 5, 3, 4, 5
Completion = tuple[np.ndarray, np.ndarray, str]  # ids, logprobs, finish reason


class Echo:
    """Repeats how an answer ends until the answers add up to its goal, which the seed sets."""

    def __init__(self, vocab_size: int, draws: np.random.Generator) -> None:
        self.vocab_size = vocab_size
        self.goal = int(draws.integers(vocab_size, 7 * vocab_size))
        self.first = draws.integers(0, vocab_size, draws.integers(2, 6)).astype(np.int32)

    def step(self, answer_ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """What it says, and whether the episode is over."""
        self.goal -= int(answer_ids.sum())
        return (answer_ids[-3:][::-1] + 1) % self.vocab_size, self.goal <= 0


def answer(vocab_size: int, task: int, sample: int, turn: int) -> Completion:
    """What a policy that draws every token evenly says at a turn; every third is cut."""
    draws = generator(SEED, STEP, task, sample, turn=turn)
    ids = draws.integers(0, vocab_size, draws.integers(1, LONGEST + 1)).astype(np.int32)
    logprobs = draws.normal(-3, 0.5, len(ids)).astype(np.float32)
    return ids, logprobs, "length" if (task + sample + turn) % 3 == 0 else "stop"


def episode_rows(kind: str, vocab_size: int, group: int, sample: int) -> list[Row]:
    """An episode as `growing` (one row), or `window`: a row per turn, behind all that was said."""
    environment = Echo(vocab_size, generator(SEED, STEP, group, 0, Stream.ENVIRONMENT))
    said: list[np.ndarray] = [environment.first]
    completions: list[Completion] = []
    ended = False
    while not ended and len(completions) < MOST_TURNS:
        completions.append(answer(vocab_size, group, sample, len(completions)))
        observation, ended = environment.step(completions[-1][0])
        said += [completions[-1][0], observation]
    task = Task(group, "", "", "", environment.first)
    verdict = Verdict(float(ended), ended, "won" if ended else "lost")
    episode = Episode(task, sample, group, verdict, verdict.score, len(completions))
    if kind == "window":
        return [
            _row(episode, np.concatenate(said[: 2 * turn + 1]), [completion], [], turn)
            for turn, completion in enumerate(completions)
        ]
    return [_row(episode, said[0], completions, said[2:-1:2], 0)]


def _row(
    episode: Episode, prompt_ids: np.ndarray, completions: list[Completion],
    observations: list[np.ndarray], turn: int,
) -> Row:  # fmt: skip
    """Completions with what the environment said between them; the first one is of `turn`."""
    parts = []
    for place, (ids, logprobs, _) in enumerate(completions):
        parts.append((ids, logprobs, Source.STUDENT, STEP))
        for heard in observations[place : place + 1]:
            parts.append((heard, np.zeros(len(heard), np.float32), Source.ENVIRONMENT, -1))
    lengths = [len(ids) for ids, *_ in parts]
    reasons = [reason for _, _, reason in completions]
    return Row(
        episode=episode,
        prompt_ids=prompt_ids,
        token_ids=np.concatenate([ids for ids, *_ in parts]),
        sources=np.repeat([source for _, _, source, _ in parts], lengths).astype(np.int8),
        logprobs=np.concatenate([logprobs for _, logprobs, *_ in parts]),
        versions=np.repeat([version for *_, version in parts], lengths).astype(np.int32),
        text="",
        finish_reason=reasons[-1],
        turn=turn,
        cut_turns=tuple(i for i, reason in enumerate(reasons[:-1]) if reason == "length"),
        penalty=0.25 * (turn == 1),
    )


def rows_of_episodes(kind: str, vocab_size: int, groups: int = 4, samples: int = 3) -> list[Row]:
    """In order of group, sample and turn."""
    return [
        row
        for group in range(groups)
        for sample in range(samples)
        for row in episode_rows(kind, vocab_size, group, sample)
    ]

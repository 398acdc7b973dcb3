"""Benchmark suites during a run: its weights are asked now and then, by the run's own engines."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from megatron_opd.contracts.rows import Row, Verdict
from megatron_opd.contracts.sampling import Draw
from megatron_opd.contracts.stations import Sampler
from megatron_opd.contracts.suites import Answer, Grader
from megatron_opd.metrics.summary import UNANSWERED
from megatron_opd.recipe.keys import RunConfig, SuiteConfig
from megatron_opd.statistics.intervals import interval_95
from megatron_opd.statistics.scores import seed_error
from megatron_opd.suites.asking import SUITE_STREAM, SuitePrompt, prompts_of, suites_in
from megatron_opd.suites.open import OpenSuite
from megatron_opd.tasks.prompter import WordsReader
from megatron_opd.tasks.tokenizer import Tokenizer
from megatron_opd.verify.graders.open import open_graders
from megatron_opd.world.processes import gather_shares, share


@dataclass(frozen=True)
class SuiteInRun:
    """A suite, its samples, and what judges them."""

    suite: OpenSuite
    settings: SuiteConfig
    prompts: Sequence[SuitePrompt]
    grader: Grader

    def due(self, step: int, num_steps: int) -> bool:
        """True where the recipe asks it before `step`, or after the last one."""
        every = self.settings.every
        return step in (0, num_steps) or (every > 0 and step % every == 0)

    def measured(self, sampler: Sampler, seed: int, version: int) -> dict[str, float]:
        """The metrics of the weights of `version`, the same on every rank. Collective."""
        protocol = self.suite.protocol
        draw = Draw(
            seed=seed,
            step=SUITE_STREAM,
            version=version,
            samples=1,  # a task is one sample of a question here
            max_tokens=protocol.max_tokens,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
        )
        own = share([*self.prompts])
        rows = sampler.sample([prompt.request.task for prompt in own], draw)
        verdicts = self.grader.grade([_answer(*pair) for pair in zip(own, rows, strict=True)])
        results = [(v, r.num_written, r.truncated) for v, r in zip(verdicts, rows, strict=True)]
        return self._metrics(gather_shares(results))

    def _metrics(self, results: Sequence[tuple[Verdict, int, bool]]) -> dict[str, float]:
        scores = np.array([verdict.score for verdict, _, _ in results])
        scores_NK = scores.reshape(len(self.suite.questions), self.suite.protocol.samples)
        low, high = interval_95(scores_NK)
        metrics = {
            "score": float(scores_NK.mean()),
            "score/low": low,
            "score/high": high,
            "questions": len(scores_NK),
            "truncated/mean": float(np.mean([cut for _, _, cut in results])),
            "completion_tokens/mean": float(np.mean([tokens for _, tokens, _ in results])),
            "unanswered/mean": float(np.mean([v.reason in UNANSWERED for v, _, _ in results])),
        }
        error = seed_error(scores_NK)
        metrics |= {} if error is None else {"score/seed_error": error}
        return {f"suite/{self.suite.name}/{name}": value for name, value in metrics.items()}


def open_in_run(config: RunConfig, tokenizer: Tokenizer, closing: ExitStack) -> list[SuiteInRun]:
    """The suites of a run; `closing` ends what judges them. Raises ConfigError, DataError."""

    def warned_before(text: str) -> None:
        """Drops a warning: the checks before the run passed it on."""

    opened = []
    suites = suites_in(config, warned_before)
    protocols = {suite.name: suite.protocol for suite, _ in suites}
    graders = open_graders(protocols, config.reward, closing)
    reader = WordsReader(config.data.template, tokenizer)
    for suite, settings in suites:
        context = config.max_sequence_length
        prompts = prompts_of(suite, reader, context=context, seed=config.seed)
        opened.append(SuiteInRun(suite, settings, prompts, graders[suite.name]))
    return opened


def _answer(prompt: SuitePrompt, row: Row) -> Answer:
    return Answer.to(prompt.text, prompt.asked, row.text, truncated=row.truncated)

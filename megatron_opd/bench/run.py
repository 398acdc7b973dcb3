"""Suites asked of a model: every sample is written once, graded beside, and kept.

With several processes each has an engine, and takes the next sample when there is room for it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_opd import __version__
from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.bench.grading import Grading
from megatron_opd.bench.identity import engine_of, identity_of
from megatron_opd.bench.results import (
    RESULTS,
    GraderUsed,
    Overlap,
    Result,
    SuiteResult,
    read_result,
    write_result,
)
from megatron_opd.bench.store import Store, alone_in, check_request
from megatron_opd.bench.summary import summarise
from megatron_opd.contracts.rows import Verdict
from megatron_opd.contracts.suites import GradedSample
from megatron_opd.errors import ConfigError
from megatron_opd.evaluation.server import ServerWriter
from megatron_opd.evaluation.writers import EngineWriter, Writer, Written
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout.open import start_vllm_engine
from megatron_opd.suites.asking import SuitePrompt, prompts_of
from megatron_opd.suites.contamination import contamination
from megatron_opd.suites.open import OpenSuite
from megatron_opd.tasks.prompter import WordsReader
from megatron_opd.tasks.tokenizer import Tokenizer, load_tokenizer
from megatron_opd.verify.graders.open import open_graders
from megatron_opd.world.processes import from_rank_0
from megatron_opd.world.queue import shared_items

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Bench:
    """What is asked of which model, and where it is written."""

    config: RunConfig  # whose student is the model; its template, engine and seed
    suites: Sequence[OpenSuite]
    out: Path
    server: str | None = None  # the address of one that holds the model
    # reads the training problems in which questions are looked for; None where there are none
    problems: Callable[[], Sequence[str] | None] = lambda: None


def run(bench: Bench) -> Result | None:
    """The results of all suites, also in `bench.out`; None but on the first process. Collective.

    Goes on where an evaluation was stopped. Raises ConfigError, RunError.
    """
    with ExitStack() as alone:
        from_rank_0(lambda: alone.enter_context(alone_in(bench.out)))
        return _run(bench)


def _run(bench: Bench) -> Result | None:
    config = bench.config
    tokenizer = load_tokenizer(config.student.path)
    prompts = all_prompts(bench, tokenizer)
    from_rank_0(lambda: check_request(bench.out, request_of(bench)))
    store = Store(bench.out, dist.get_rank())
    completions = store.completions()
    verdicts = store.verdicts()
    if (bench.out / RESULTS).exists() and not completions:  # done, and its lines removed
        return read_result(bench.out) if dist.get_rank() == 0 else None
    dist.barrier()  # all have read before one writes
    with ExitStack() as closing:
        closing.enter_context(store)
        protocols = {suite.name: suite.protocol for suite in bench.suites}
        graders = open_graders(protocols, config.reward, closing)
        todo = [prompt for prompt in prompts if prompt.key not in completions]
        with Grading(graders, store.keep_verdict) as grading:
            for prompt in prompts[dist.get_rank() :: dist.get_world_size()]:
                if prompt.key in completions and prompt.key not in verdicts:
                    grading.give(prompt, completions[prompt.key])
            if todo:
                if dist.get_rank() == 0:
                    print(
                        f"{len(prompts)} samples of {', '.join(graders)}; "
                        f"{len(prompts) - len(todo)} are there already",
                        flush=True,
                    )
                writer = open_writer(bench, prompts, tokenizer, closing)
                write(writer, todo, store, grading, len(prompts))
        versions = {name: dict(grader.versions) for name, grader in graders.items()}
    dist.barrier()  # all lines are written
    if dist.get_rank() != 0:
        return None
    return finish(bench, prompts, store, versions)


def all_prompts(bench: Bench, tokenizer: Tokenizer) -> list[SuitePrompt]:
    """The prompts of all suites, the longest completions first, so that none begins at the end."""
    context = architecture_of(bench.config.student).max_position_embeddings
    read = WordsReader(bench.config.data.template, tokenizer)
    prompts: list[SuitePrompt] = []
    for suite in sorted(bench.suites, key=lambda suite: -suite.protocol.max_tokens):
        prompts += prompts_of(suite, read, context=context, seed=bench.config.seed)
    keys = {prompt.key for prompt in prompts}
    if len(keys) < len(prompts):
        raise ConfigError("suites: a suite, or a question's key, is there twice; give each once")
    return prompts


def request_of(bench: Bench) -> dict[str, object]:
    """All that must be the same for an evaluation to go on."""
    suites = {}
    for suite in bench.suites:
        suites[suite.name] = {"protocol": asdict(suite.protocol), "data": dict(suite.provenance)}
    return {
        "model": identity_of(bench.config.student.path)["digest"],
        "template": asdict(bench.config.data.template),
        "precision": bench.config.precision,
        "seed": bench.config.seed,
        "server": bench.server is not None,
        "suites": suites,
        "megatron_opd": __version__,  # whose graders judge
    }


def open_writer(
    bench: Bench, prompts: Sequence[SuitePrompt], tokenizer: Tokenizer, closing: ExitStack
) -> Writer:
    """The server, or an engine with room for the longest sample."""
    if bench.server:
        return ServerWriter(bench.server)
    longest = max(len(one.request.prompt_ids) + one.request.max_tokens for one in prompts)
    config = replace(bench.config, max_sequence_length=longest)
    engine = start_vllm_engine(config, config.student, sleeps=False)
    closing.callback(engine.close)
    return EngineWriter(engine, tokenizer)


def write(
    writer: Writer, todo: Sequence[SuitePrompt], store: Store, grading: Grading, total: int
) -> None:
    """Writes what this process takes of `todo`, with a line of progress now and then."""
    progress = _Progress(len(todo), total)
    dist.barrier()  # every engine is ready before one takes a sample
    for prompt, written in writer.write(shared_items("bench", todo)):
        store.keep_completion(prompt, written)
        grading.give(prompt, written)
        progress.count(written.tokens, grading.waiting)


class _Progress:
    """Lines of the first process, every few seconds; what others do is taken to be as much."""

    def __init__(self, todo: int, total: int) -> None:
        self._before = total - todo
        self._total = total
        self._started = time.monotonic()
        self._last_line = self._started
        self._samples = 0
        self._tokens = 0

    def count(self, tokens: int, to_grade: int) -> None:
        """One more sample, of so many tokens."""
        self._samples += 1
        self._tokens += tokens
        now = time.monotonic()
        if dist.get_rank() == 0 and now - self._last_line > PROGRESS_SECONDS:
            self._last_line = now
            done = min(self._before + self._samples * dist.get_world_size(), self._total)
            rate = self._tokens * dist.get_world_size() / (now - self._started)
            print(
                f"{done} of {self._total} samples, {rate:.0f} tokens/s, {to_grade} to grade",
                flush=True,
            )


def finish(
    bench: Bench,
    prompts: Sequence[SuitePrompt],
    store: Store,
    versions: Mapping[str, Mapping[str, str]],
) -> Result:
    """Writes the results from the lines of all processes, and then removes the lines."""
    completions = store.completions()
    verdicts = store.verdicts()
    samples: dict[str, list[GradedSample]] = {suite.name: [] for suite in bench.suites}
    for prompt in prompts:
        written = completions[prompt.key]
        samples[prompt.suite].append(graded(prompt, written, verdicts[prompt.key]))
    problems = bench.problems()
    suites = {}
    for suite in bench.suites:
        suites[suite.name] = SuiteResult(
            suite.title,
            suite.protocol,
            dict(suite.provenance),
            GraderUsed(suite.protocol.grader, dict(versions[suite.name])),
            summarise(samples[suite.name]),
            overlap_of(suite, problems),
        )
    result = Result(
        __version__,
        identity_of(bench.config.student.path),
        engine_of(bench.config, bench.server, dist.get_world_size()),
        suites,
    )
    write_result(bench.out, result, [one for rows in samples.values() for one in rows])
    store.remove()
    return result


def overlap_of(suite: OpenSuite, problems: Sequence[str] | None) -> Overlap | None:
    """The suite's questions that training problems have; None without training problems."""
    if problems is None:
        return None
    both = contamination(suite.questions, problems)
    return Overlap(both.problems, len(both.exact), len(both.overlapping))


def graded(prompt: SuitePrompt, written: Written, verdict: Verdict) -> GradedSample:
    """The record of a sample."""
    asked = prompt.asked
    return GradedSample(
        suite=prompt.suite,
        key=asked.question.key,
        group=asked.question.group,
        sample=asked.sample,
        gold=asked.gold,
        order=asked.order,
        gold_place=asked.gold_place,
        prompt=prompt.text,
        text=written.text,
        tokens=written.tokens,
        truncated=written.truncated,
        verdict=verdict,
    )

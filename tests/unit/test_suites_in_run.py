"""Suites that a run's weights are asked: when, which samples, and what the metrics say."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_opd.contracts.rows import Episode, Row, Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.errors import ConfigError
from megatron_opd.evaluation.suites import SuiteInRun, open_in_run
from megatron_opd.recipe.data import TemplateConfig
from megatron_opd.recipe.keys import EvalConfig, RunConfig, SuiteConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.suites.asking import SUITE_STREAM
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.unit.byte_tokenizer import write_byte_tokenizer

GOLDS = ("1", "2", "3")


class Scripted:
    """Writes each question's own number for even samples, and nothing of use for odd ones."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        assert (draw.step, draw.samples, draw.max_tokens) == (SUITE_STREAM, 1, 20)
        self.tasks += tasks
        rows = []
        for group, task in enumerate(tasks):
            right = task.first_sample % 2 == 0
            ids = np.zeros(3 if right else 5, np.int32)
            row = Row.of_student(
                Episode(task, task.first_sample, group), ids, np.zeros(len(ids), np.float32),
                version=draw.version,
                text=f"\\boxed{{{task.answer}}}" if right else "I do not know",
                finish_reason="stop" if right else "length",
            )  # fmt: skip
            rows.append(row)
        return rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("suites")
    write_byte_tokenizer(folder)
    lines = [json.dumps({"problem": f"Say {gold}.", "answer": gold}) for gold in GOLDS]
    (folder / "math.jsonl").write_text("\n".join(lines) + "\n")
    settings = SuiteConfig(every=4, samples=4, max_tokens=20, data=str(folder / "math.jsonl"))
    config = load_config("demo")
    return replace(
        config,
        student=replace(config.student, path=str(folder)),
        max_sequence_length=200,
        data=replace(config.data, template=TemplateConfig(kind="raw")),
        eval=EvalConfig(suites={"math_500": settings}),
    )


@pytest.fixture(scope="module")
def suite(config: RunConfig) -> Iterator[SuiteInRun]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as closing:
        closing.callback(dist.destroy_process_group)
        [suite] = open_in_run(config, load_tokenizer(config.student.path), closing)
        yield suite


def test_a_suite_is_due_before_the_first_step_every_few_and_after_the_last(
    suite: SuiteInRun,
) -> None:
    assert [step for step in range(11) if suite.due(step, 10)] == [0, 4, 8, 10]
    once = replace(suite, settings=replace(suite.settings, every=0))
    assert [step for step in range(11) if once.due(step, 10)] == [0, 10]


def test_its_metrics_are_of_all_samples(suite: SuiteInRun) -> None:
    sampler = Scripted()
    metrics = suite.measured(sampler, seed=3, version=7)
    assert len(sampler.tasks) == len(GOLDS) * 4
    assert metrics["suite/math_500/score"] == 0.5
    assert metrics["suite/math_500/questions"] == 3
    assert metrics["suite/math_500/truncated/mean"] == 0.5
    assert metrics["suite/math_500/completion_tokens/mean"] == 4
    low = metrics["suite/math_500/score/low"]
    assert 0 < low < 0.5 < metrics["suite/math_500/score/high"] < 1
    # the two right and two wrong samples of a question: sqrt(1/3 / 4 / 3)
    assert metrics["suite/math_500/score/seed_error"] == pytest.approx((1 / 36) ** 0.5)


def test_a_sample_is_drawn_alike_at_every_step_and_apart_from_others(suite: SuiteInRun) -> None:
    first = Scripted()
    suite.measured(first, seed=3, version=0)
    again = Scripted()
    suite.measured(again, seed=3, version=5)
    keys = [(task.index, task.first_sample) for task in first.tasks]
    assert keys == [(task.index, task.first_sample) for task in again.tasks]
    assert len(set(keys)) == len(keys)
    assert len({prompt.request.seed for prompt in suite.prompts}) == len(keys)


def test_a_prompt_without_room_is_named_before_the_run(config: RunConfig) -> None:
    short = replace(config, max_sequence_length=12)
    with (
        pytest.raises(ConfigError, match=r"suite math_500: .* leaves no room of 12"),
        contextlib.ExitStack() as closing,
    ):
        open_in_run(short, load_tokenizer(config.student.path), closing)

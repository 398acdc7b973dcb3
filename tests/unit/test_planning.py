"""`megatron-opd plan`: what it prints, its exit codes, and what it refuses in which words."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.architectures.known import architectures
from megatron_opd.cli import main as cli
from megatron_opd.planning.case import Case
from megatron_opd.planning.hardware import hardware
from megatron_opd.planning.layouts import candidate, candidates
from megatron_opd.planning.memory import in_flight, rank_kinds
from megatron_opd.recipe.load import load_config, recipe_files
from tests.unit.tiny_model_files import write_model, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path))


def case(recipe: str, gpus: int, *overrides: str, gpu: str = "a100") -> Case:
    config = load_config(recipe, overrides)
    return Case(config, architectures(config.models)[0], hardware(gpu, 8), gpus, min(gpus, 8))


# -------------------------------------------------------------------------------------- the command
def test_a_plan_that_fits(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", recipe, "--gpus", "2", "--gpu", "h100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fits: yes" in printed
    for phase in ("generate", "teacher", "train", "refit"):
        assert f"| {phase} |" in printed
    plan = json.loads(out.read_text())
    assert plan["own"]["fits"] and plan["gpus"] == 2
    assert plan["own"]["peak_bytes"] == max(
        sum(items.values()) for items in plan["own"]["ranks"][0]["phases"].values()
    )
    # TP 1 and 2 (with and without sequence parallelism), PP 1 and 2, of each model
    assert len(plan["layouts"]) == 4 * 4


def test_a_plan_that_does_not_fit_says_where(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    share = "rollout.gpu_memory_utilization=0.99"
    assert cli.main(["plan", recipe, "--gpus", "1", "--gpu", "a100", share]) == 1
    assert "fits: no; rank 0, generate: 78.3 of 76.1 GiB" in capsys.readouterr().out


THREE, TWO = ["--gpus", "3", "--gpu", "a100"], ["--gpus", "2", "--gpu", "a100"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpus", "2", "--gpu", "tpu"], "--gpu: unknown device; known: a100, h100, h800, cpu"),
        (["--gpus", "12", "--gpu", "a100"], "--gpus: 12 is no multiple of the 8 of a node"),
        (THREE, "rollout.num_prompts: the 8 sequences of an update do not divide"),
        ([*THREE, "student.layout.tensor_model_parallel_size=2"], "student.layout: TP 2 x PP 1"),
        ([*THREE, "student.layout.tensor_model_parallel_size=3"], "student.layout.tensor_model"),
        ([*TWO, "rollout.processes=1", "teacher.processes=1"],
         "rollout.processes + teacher.processes: 2 of 2 leave"),
        ([*TWO, "rollout.processes=1", "method=sft", "teacher=null"],
         "rollout.processes: no effect, method sft"),
        ([*TWO, "precision=float32"], "precision: float32 on a GPU is not planned"),
        ([*TWO, "student.path=models/Nothing-7B"], "student.path: models/Nothing-7B is no dir"),
        ([*TWO, "--json", "/nowhere/plan.json"], "--json: /nowhere is no directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    recipe: str, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", recipe, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        printed.err.startswith(f"megatron-opd: error: {problem}") and printed.err.count("\n") == 1
    )


def test_every_recipe_of_a_paper_has_its_sizes() -> None:
    for name in recipe_files():
        config = load_config(name)
        if not name.startswith("demo"):
            found, notes = architectures(config.models)
            assert list(found) == [role for role in ("student", "teacher") if getattr(config, role)]
            assert len(notes) == len(found)


# -------------------------------------------------------------------------------- ranks and layouts
def test_ranks_are_grouped_by_what_they_hold(recipe: str) -> None:
    layouts = [
        "student.layout.pipeline_model_parallel_size=4",
        "teacher.layout.pipeline_model_parallel_size=2",
    ]
    kinds = rank_kinds(case(recipe, 8, *layouts))
    assert [(*each.stages.values(), each.first_rank, each.ranks) for each in kinds] == [
        (0, 0, 0, 0, 2), (1, 0, 0, 2, 2), (2, 0, 1, 4, 2), (3, 0, 1, 6, 2)
    ]  # fmt: skip
    assert {tuple(each.stages) for each in kinds} == {("student", "rollout", "teacher")}
    assert not any(each.idle for each in kinds)
    saved = [each.phases["train"]["activations"] for each in kinds]
    # 8 sequences in 1 micro-batch of 8 per replica at most: nothing to keep in flight twice
    assert len(set(saved[1:3])) == 1


def test_an_offloaded_teacher_is_there_to_score_alone(recipe: str) -> None:
    (stays,), (leaves,) = (
        rank_kinds(case(recipe, 1, f"teacher.offload={each}")) for each in ("false", "true")
    )
    assert stays.phases["teacher"] == leaves.phases["teacher"]
    for phase in ("generate", "train", "refit"):
        assert stays.phases[phase] == leaves.phases[phase] | {
            "teacher": stays.phases["teacher"]["teacher"]
        }


def test_stages_keep_as_many_micro_batches_as_are_in_flight(recipe: str) -> None:
    planned = case(
        recipe, 4, "student.layout.pipeline_model_parallel_size=4", "train.micro_batch_tokens=32"
    )
    assert [in_flight(planned, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = ["student.layout.pipeline_model_parallel_size=2",
                   "student.layout.virtual_pipeline_model_parallel_size=2"]  # fmt: skip
    planned = case(recipe, 2, *interleaved, "train.micro_batch_tokens=32")
    assert [in_flight(planned, stage) for stage in range(2)] == [5, 3]  # of half the layers each
    two = case(
        recipe, 4, "student.layout.pipeline_model_parallel_size=4", "train.micro_batch_tokens=128"
    )
    assert [in_flight(two, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_candidates_are_what_the_checks_accept(recipe: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    teacher = write_model(tmp_path / "experts", model_type="qwen3_moe", **experts)
    planned = case(recipe, 4, f"teacher.path={teacher}")
    found = candidates(planned)
    assert all(first.time.total <= second.time.total for first, second in itertools.pairwise(found))
    pairs = {(each.student, each.teacher) for each in found}
    assert len(pairs) == len(found)
    assert (LayoutConfig(), LayoutConfig(2, 1, True, 4)) in pairs
    # 2 key-value heads
    assert not any(student.tensor_model_parallel_size == 4 for student, _ in pairs)
    for student, teacher_layout in pairs:
        planned.with_layouts(student, teacher_layout).check()


def experts_recipe(tmp_path: Path, recipe: str, **changes: int) -> list[str]:
    """Overrides: a student with experts."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    student = write_model(tmp_path / "experts", model_type="qwen3_moe", **(sizes | changes))
    return [recipe, f"student.path={student}"]


def test_a_student_with_experts_is_planned_in_every_layout(
    recipe: str, tmp_path: Path, capsys: Any
) -> None:
    name, path = experts_recipe(tmp_path, recipe)
    assert cli.main(["plan", name, path, "--gpus", "4", "--gpu", "h800"]) == 0
    assert "fits: yes" in capsys.readouterr().out
    planned = case(recipe, 4, path)
    students = {each.student for each in candidates(planned)}
    # TP 2 trains experts with sequence parallelism alone
    assert all(
        layout.sequence_parallel == (layout.tensor_model_parallel_size > 1) for layout in students
    )
    assert {layout.expert_model_parallel_size for layout in students} == {1, 2, 4}
    spread = case(recipe, 4, path, "student.layout.expert_model_parallel_size=4")
    (whole,), (part,) = rank_kinds(planned), rank_kinds(spread)
    for item in ("parameters", "gradients"):
        assert part.phases["train"][item] < whole.phases["train"][item]
    with_padding = pytest.approx(whole.phases["train"]["optimizer"], rel=0.05)
    # a quarter of the experts, whole, or a quarter of all
    assert part.phases["train"]["optimizer"] == with_padding


def test_times_of_experts_count_kernels_rows_and_what_is_read(recipe: str, tmp_path: Path) -> None:
    _, path = experts_recipe(tmp_path, recipe, num_experts=64)
    alone, spread = (
        candidate(case(recipe, 8, path, f"student.layout.expert_model_parallel_size={size}")).time
        for size in (1, 8)
    )
    assert spread.train < alone.train  # an eighth of the kernels; these experts are small
    # over the network
    slow = candidate(case(recipe, 16, path, "student.layout.expert_model_parallel_size=16")).time
    assert slow.train > spread.train / 2
    few, many = (
        candidate(case(recipe, 8, path, f"rollout.num_prompts={count}")).time.generate
        for count in (8, 256)
    )
    assert few < many < 32 * few


def test_context_parallelism_shares_out_the_tokens_of_a_sequence(recipe: str) -> None:
    long = [
        "max_sequence_length=64",
        "rollout.max_completion_tokens=32",
        "train.micro_batch_tokens=64",
    ]
    one = case(recipe, 4, *long)
    two = case(
        recipe,
        4,
        *long,
        "train.micro_batch_tokens=32",
        "student.layout.context_parallel_size=2",
        "teacher.layout.context_parallel_size=2",
    )
    assert (one.replicas("student"), two.replicas("student")) == (4, 2)
    assert two.micro_batch("student").tokens == one.micro_batch("student").tokens // 2
    (whole,), (half,) = rank_kinds(one), rank_kinds(two)
    for item in ("parameters", "gradients", "optimizer"):
        # sharded over all four ranks in both
        assert half.phases["train"][item] == whole.phases["train"][item]
    assert half.phases["train"]["activations"] < 0.7 * whole.phases["train"]["activations"]
    assert {each.student.context_parallel_size for each in candidates(two)} == {2}


def test_more_of_anything_takes_longer(recipe: str) -> None:
    base = candidate(case(recipe, 2)).time
    longer = candidate(case(recipe, 2, "rollout.max_completion_tokens=16")).time
    assert longer.generate > base.generate and longer.train >= base.train
    assert candidate(case(recipe, 2, "rollout.num_prompts=16")).time.train > base.train
    assert candidate(case(recipe, 2, gpu="h100")).time.total < base.total
    assert math.isinf(
        candidate(case(recipe, 2, "rollout.gpu_memory_utilization=0.0")).time.generate
    )


def test_a_method_holds_what_it_reads(recipe: str) -> None:
    def held(*overrides: str) -> set[str]:
        (kind,) = rank_kinds(case(recipe, 1, *overrides))
        return set().union(*kind.phases.values())

    assert {"teacher", "engine", "KV cache"} <= held()
    assert not {"teacher", "engine", "reference"} & held(
        "method=sft",
        "teacher=null",
        "rollout.num_prompts=4",
        "rollout.samples_per_prompt=8",
        "rollout.max_completion_tokens=1024",
    )
    assert {"reference", "process model"} <= held("method=prime", "teacher=null")
    assert "teacher engine" in held("method=minillm")


# ------------------------------------------------------------------------------------------- agents
SELF = ["teacher=null", "self_teacher={}", "skills={bank: skills, max_tokens: 16}"]
AGENT = ["data.train=[]", "environment={kind: workshop, train: 8, max_turns: 5}"]


def self_taught(recipe: str, *overrides: str) -> dict[str, dict[str, int]]:
    """The items of every phase, where the student is its own teacher."""
    (kind,) = rank_kinds(case(recipe, 1, *SELF, *overrides))
    return kind.phases


def test_a_self_teacher_holds_what_its_weights_need(recipe: str) -> None:
    present = self_taught(recipe)
    assert "teacher" in present and "teacher" not in present["train"]  # it scores, and is no copy
    every = self_taught(recipe, "self_teacher.weights=every")
    copy = every["train"]["teacher"]
    assert 0.9 < copy / every["train"]["parameters"] < 1  # whose shards are padded
    assert self_taught(recipe, "self_teacher.weights=first")["train"]["teacher"] == copy
    # bfloat16 beside float32
    assert self_taught(recipe, "self_teacher.weights=average")["train"]["teacher"] == 3 * copy
    for phase, items in present.items():
        assert items == {name: n for name, n in every[phase].items() if name != "teacher"}


def test_the_first_weights_are_the_reference(recipe: str) -> None:
    items = self_taught(recipe, "method=exopd", "self_teacher.weights=first")["train"]
    assert "reference" in items and "teacher" not in items


def test_privileged_texts_make_the_teachers_rows_longer(recipe: str) -> None:
    planned = case(recipe, 1, *SELF)
    assert planned.longest("teacher") == planned.longest("student") + 16
    assert case(recipe, 1, *SELF, "skills.reader=student", "self_teacher.weights=every").longest(
        "teacher"
    ) == planned.longest("student")
    few = case(recipe, 1, "train.micro_batch_tokens=100")
    assert few.longest("teacher") == few.longest("student")


def test_candidates_of_a_self_teacher_are_the_students(recipe: str) -> None:
    found = candidates(case(recipe, 4, *SELF))
    assert len({each.student for each in found}) == len(found)
    assert all(each.teacher is None and each.time.teacher > 0 for each in found)


def test_a_turn_is_a_row(recipe: str) -> None:
    one = case(recipe, 1)
    turns = case(recipe, 1, *AGENT)
    assert turns.samples == 5 * one.samples and turns.predicted == one.predicted
    growing = case(recipe, 1, *AGENT, "environment.history.kind=growing")
    assert (
        growing.samples == one.samples and growing.predicted == growing.config.max_sequence_length
    )
    times = [candidate(planned).time for planned in (one, turns, growing)]
    assert times[1].generate == pytest.approx(5 * times[0].generate)
    assert times[1].train > 4 * times[0].train and times[1].refit == times[0].refit
    assert times[2].generate > 2 * times[0].generate

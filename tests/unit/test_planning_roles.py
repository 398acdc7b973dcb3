"""The plan of roles with processes of their own: who is where, who waits, what fits, how long it
takes."""

import math
from pathlib import Path

import pytest

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.cli import main as cli
from megatron_opd.cluster.profile import ClusterConfig
from megatron_opd.cluster.submit import fits
from megatron_opd.errors import ConfigError
from megatron_opd.planning import step_time
from megatron_opd.planning.engine_memory import engine
from megatron_opd.planning.hardware import CHANNEL, LINK
from megatron_opd.planning.layouts import candidate, candidates
from megatron_opd.planning.memory import rank_kinds
from megatron_opd.recipe.load import load_config
from tests.unit.test_planning import case
from tests.unit.tiny_model_files import write_recipe

APART = ["rollout.processes=3", "teacher.processes=4"]
PP2 = "layout.pipeline_model_parallel_size=2"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path))


# ------------------------------------------------------------------------------------- who is where
def test_ranks_replicas_and_stages_are_counted_by_role(recipe: str) -> None:
    planned = case(
        recipe,
        15,
        *APART,
        f"student.{PP2}",
        f"teacher.{PP2}",
        "teacher.layout.tensor_model_parallel_size=2",
    )
    planned.check()
    ranks = {role: planned.ranks_of(role) for role in planned.roles}
    assert ranks == {"student": range(8), "rollout": range(8, 11), "teacher": range(11, 15)}
    assert (planned.replicas("student"), planned.replicas("teacher")) == (4, 1)
    kinds = rank_kinds(planned)
    assert [(each.stages, each.first_rank, each.ranks) for each in kinds] == [
        ({"student": 0}, 0, 4),
        ({"student": 1}, 4, 4),
        ({"rollout": 0}, 8, 3),
        ({"teacher": 0}, 11, 2),
        ({"teacher": 1}, 13, 2),
    ]
    # 8 sequences: a student's replica of 4 has 2 of them, the teacher's only one all
    assert planned.micro_batch("student").tokens * 4 == planned.micro_batch("teacher").tokens
    assert [each.idle for each in kinds[1:4]] == [
        ("generate", "teacher"), ("teacher", "train"), ("generate", "train", "refit")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("apart", "together"), [("rollout", "student, teacher"), ("teacher", "student, rollout")]
)
def test_what_is_not_set_aside_lies_with_the_student(
    recipe: str, apart: str, together: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"{apart}.processes=1"
    assert cli.main(["plan", recipe, key, "--gpus", "3", "--gpu", "a100"]) == 0
    rows = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [row.split(" |")[0] for row in rows if row.startswith(("0-1", "2 "))] == [
        *[f"0-1 {together}"] * 4, *[f"2 {apart}"] * 4
    ]  # fmt: skip
    waits = {row.split(" | ")[1] for row in rows if row.startswith("2 ") and ", idle |" in row}
    idle = {"teacher": ["generate", "train", "refit"], "rollout": ["teacher", "train"]}[apart]
    assert waits == {f"{phase}, idle" for phase in idle}


def test_a_role_of_its_own_takes_with_it_what_it_holds(recipe: str) -> None:
    """Beside as many of the student's processes as before, everything is where it was."""
    (beside,) = rank_kinds(case(recipe, 2))
    student, engines, teacher = rank_kinds(
        case(recipe, 4, "rollout.processes=1", "teacher.processes=1")
    )
    states = {
        what: beside.phases["refit"][what] for what in ("parameters", "gradients", "optimizer")
    }
    in_training = {what: beside.phases["train"][what] for what in ("activations", "working memory")}
    assert student.phases == dict.fromkeys(("generate", "teacher", "refit"), states) | {
        "train": states | in_training
    }
    assert teacher.phases["teacher"].keys() == {"teacher", "activations", "signals"}
    assert teacher.phases["train"] == {"teacher": beside.phases["train"]["teacher"]}
    awake = {what: beside.phases["generate"][what] for what in ("engine", "KV cache")}
    for phase in ("generate", "teacher", "train"):
        assert engines.phases[phase] == awake  # it does not sleep
    module = 2 * 32 * 16 * 2  # gate and up, bfloat16
    assert engines.phases["refit"] == awake | {"received weights": 2 * module}


def test_a_student_who_reads_its_reference_does_not_wait_for_the_teacher(recipe: str) -> None:
    planned = case(recipe, 2, "teacher.processes=1", "method=trrd")
    student, teacher = rank_kinds(planned)
    assert student.idle == () and "reference" in student.phases["train"]
    assert "reference" not in teacher.phases["train"] and teacher.idle == (
        "generate",
        "train",
        "refit",
    )


# ------------------------------------------------------------------------------------------ layouts
def test_candidates_are_layouts_over_each_roles_processes(recipe: str) -> None:
    found = candidates(case(recipe, 15, *APART))
    assert {each.student for each in found} == {
        each.student for each in candidates(case(recipe, 8))
    }
    assert {each.teacher for each in found} == {
        each.teacher for each in candidates(case(recipe, 4))
    }
    assert (LayoutConfig(1, 4), LayoutConfig(2, 2)) in {
        (each.student, each.teacher) for each in found
    }
    for each in found:
        assert [kind.ranks for kind in each.kinds if "rollout" in kind.stages] == [3]


# ---------------------------------------------------------------------------------------- what fits
TGPO = "tgpo_qwen25_math_7b"
# A teacher whose experts lie on two ranks: 30 GiB of each.
WIDE = ["teacher.layout.tensor_model_parallel_size=1", "teacher.layout.sequence_parallel=false",
        "teacher.layout.expert_model_parallel_size=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "lacks"),
    [
        ([], None),
        (WIDE, "rank 0, train: 91.9 of 76.1 GiB"),
        ([*WIDE, "teacher.processes=8"], None),
        (["rollout.gpu_memory_utilization=0.9"], "rank 0, refit: 107.4 of 76.1 GiB"),
        (["rollout.processes=8", "rollout.gpu_memory_utilization=0.9"], None),
        (["rollout.processes=8", "rollout.gpu_memory_utilization=0.98"], "rank 8, refit: 79"),
        (
            ["rollout.processes=8", "rollout.gpu_memory_utilization=0.1"],
            "engine: no room for the keys and values",
        ),
        (
            ["teacher.processes=8", "student.layout.tensor_model_parallel_size=1"],
            "rank 0, train: 116",
        ),
    ],
)
def test_plan_and_launch_say_the_same_of_what_fits(overrides: list[str], lacks: str | None) -> None:
    cluster = ClusterConfig(gpu="a100", processes_per_node=8, gpus_per_node=8, nodes=2)
    planned = candidate(case(TGPO, 16, *overrides))
    if lacks is None:
        assert planned.lacks is None
        fits(load_config(TGPO, overrides), cluster)
        return
    assert planned.lacks and planned.lacks.startswith(lacks)
    with pytest.raises(ConfigError) as error:
        fits(load_config(TGPO, overrides), cluster)
    problem = f"cluster.nodes: the recipe does not fit 16 x a100 ({planned.lacks}); "
    remedy = f"see: megatron-opd plan {TGPO} --gpus 16"
    assert str(error.value).startswith(problem + remedy) and "\n" not in str(error.value)


def test_launch_refuses_processes_that_do_not_divide() -> None:
    cluster = ClusterConfig(gpu="a100", processes_per_node=8, gpus_per_node=8, nodes=1)
    with pytest.raises(ConfigError, match="there would be 7 beside the teacher's 1"):
        fits(
            load_config(
                TGPO,
                ["teacher.processes=1", *WIDE[:2], "teacher.layout.expert_model_parallel_size=1"],
            ),
            cluster,
        )


# ------------------------------------------------------------------------------------------ seconds
def test_a_step_takes_what_its_roles_take_one_after_the_other(recipe: str) -> None:
    """Each as long as on as many shared processes, and what crosses a channel: along a binomial
    tree of gloo's."""
    planned, link = case(recipe, 15, *APART), CHANNEL  # slower than the network
    apart, alone = (
        candidate(planned).time,
        {size: candidate(case(recipe, size)).time for size in (3, 4, 8)},
    )
    assert apart.train == alone[8].train
    # 8 completions of 8 tokens: ids and logprobs; an id, a logprob and an entropy
    rollouts, signals = 8 * 8 * 2 * 4, 8 * 8 * 3 * 4
    to_three, to_four, to_eight = (math.ceil(math.log2(1 + size)) for size in (3, 4, 8))
    assert apart.generate == pytest.approx(alone[3].generate + to_eight * rollouts / link)
    assert apart.teacher == pytest.approx(
        alone[4].teacher + (to_four * rollouts + to_eight * signals) / link
    )
    assert apart.refit == pytest.approx(
        alone[8].refit + to_three * engine(planned, "student").weights / link
    )
    assert apart.total == apart.generate + apart.teacher + apart.train + apart.refit


@pytest.mark.parametrize(
    ("teachers", "ranks", "link"),
    [
        (10, 2, 300e9),
        (10, 4, 25e9),
        (8, 4, 300e9),
        (8, 8, 300e9),
        (10, 10, 25e9),
        (2, 2, 300e9),
        (4, 3, 300e9),
    ],
)
def test_a_role_that_begins_within_a_node_may_have_groups_on_two(
    recipe: str, teachers: int, ranks: int, link: float
) -> None:
    planned = case(recipe, 16, f"teacher.processes={teachers}")
    assert step_time._link(planned, "teacher", ranks) == LINK * link

"""What the planner says of roles with processes of their own, against those of a run: two ranks of
a student, one of an
engine, two of a teacher."""

import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.recipe.keys import RunConfig, TeacherConfig
from tests.distributed import test_layout_invariance as replayed
from tests.distributed.test_planned_states import held_by, storages
from tests.e2e import tiny_hf
from tests.unit import test_planning_memory as measured
from tests.unit.live_bytes import LiveBytes

PREDICTED, STUDENT, ENGINE, TEACHER = 100, range(2), 2, range(3, 5)
# The vocabulary is a multiple of 64, to which vLLM pads.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
MODELS = {
    "student": ("qwen3", {"tie_word_embeddings": False}),
    "dense": ("qwen3", {}),
    "experts": ("qwen3_moe", EXPERTS),
}
# name -> the teacher and both layouts
CASES = {
    "replicas | TP2": ("dense", LayoutConfig(), LayoutConfig(2)),
    "PP2 | EP2": ("experts", LayoutConfig(1, 2), LayoutConfig(expert_model_parallel_size=2)),
    "TP2 | PP2": ("dense", LayoutConfig(2), LayoutConfig(1, 2)),
}
Found = dict[str, dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("roles")
    for name, (kind, more) in MODELS.items():
        config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
        tiny_hf.write(transformers.AutoModelForCausalLM.from_config(config), folder / name)
    return folder


@pytest.fixture(scope="module")
def found(directory: Path, run_distributed: Callable) -> Found:
    """Case -> rank -> what it holds. The engine is the same in all."""
    run_distributed(__file__, 5, directory)
    ranks: Found = {case: {} for case in CASES}
    for path in directory.glob("*.json"):
        case, rank = path.stem.split(" of ")
        ranks[case][int(rank)] = json.loads(path.read_text())
    return ranks


def recipe(directory: Path, case: str) -> RunConfig:
    teacher, student_layout, teacher_layout = CASES[case]
    base = measured.recipe(fused=True, predicted=PREDICTED, precision="bfloat16", sequences=2)
    return replace(
        base,
        method=replayed.method_of("tgpo"),
        student=ModelConfig(str(directory / "student"), layout=student_layout),
        teacher=TeacherConfig(
            str(directory / teacher), layout=teacher_layout, processes=len(TEACHER)
        ),
        rollout=replace(base.rollout, processes=1, kv_cache_gib=0.0625),
    )


@pytest.fixture(scope="module")
def planned(directory: Path) -> dict[str, dict[int, Any]]:
    """Case -> rank -> its kind."""
    from megatron_opd.planning.case import Case
    from megatron_opd.planning.hardware import hardware
    from megatron_opd.planning.memory import rank_kinds

    kinds: dict[str, dict[int, Any]] = {}
    for name in CASES:
        config = recipe(directory, name)
        sizes = {
            role: read_architecture(getattr(config, role).path) for role in ("student", "teacher")
        }
        case = Case(config, sizes, hardware("cpu", 5), 5, 5)
        case.check()
        of_ranks = [kind for kind in rank_kinds(case) for _ in range(kind.ranks)]
        kinds[name] = dict(enumerate(of_ranks, of_ranks[0].first_rank))
    return kinds


@pytest.mark.parametrize("case", CASES)
def test_each_role_holds_what_is_planned_and_nothing_else(
    found: Found, planned: Any, case: str
) -> None:
    assert found[case].keys() == planned[case].keys()
    for rank in STUDENT:
        kind = planned[case][rank]
        held = [found[case][other] for other in STUDENT if planned[case][other] is kind]
        # Shards of replicas differ by padding: the fullest is planned.
        states = {
            item: max(each[item] for each in held)
            for item in ("parameters", "gradients", "optimizer")
        }
        assert states == kind.phases["generate"]
        for each in held:
            # no engine, no teacher
            assert each["all"] == pytest.approx(kind.total("generate"), rel=0.01)
    engine, kind = found[case][ENGINE], planned[case][ENGINE]
    assert {"engine": engine["engine"], "KV cache": engine["KV cache"]} == kind.phases["train"]
    for rank in TEACHER:
        kind = planned[case][rank]
        assert found[case][rank]["teacher"] == kind.phases["train"]["teacher"]
        assert set(kind.phases["train"]) <= {"teacher", "routing"}


@pytest.mark.parametrize("case", CASES)
def test_so_are_the_peaks_of_scoring_and_of_taking_weights(
    found: Found, planned: Any, case: str
) -> None:
    received = planned[case][ENGINE].phases["refit"]["received weights"]
    assert found[case][ENGINE]["received weights"] == pytest.approx(received, rel=0.01)
    for rank in TEACHER:
        kind, peak = planned[case][rank], found[case][rank]["working"]
        working = kind.total("teacher") - kind.phases["teacher"]["teacher"]
        if rank == TEACHER[-1] or kind.ranks == len(TEACHER):  # the output layer is there
            assert peak == pytest.approx(working, rel=0.1)
        assert peak < 1.1 * working


# -------------------------------------------------------------------------------------- the program
def everything() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    return storages(
        each
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and each.device.type == "cpu"
    )


def write(directory: Path, case: str, rank: int, values: dict[str, Any]) -> None:
    (directory / f"{case} of {rank}.json").write_text(json.dumps(values))


def student(directory: Path) -> None:
    from megatron_opd.refit.push import push
    from megatron_opd.rollout.remote import RemoteEngine
    from megatron_opd.runs.assemble import assemble
    from megatron_opd.world import processes

    engine = None
    rows = measured.full_rows(SIZES["vocab_size"], PREDICTED)
    for case in CASES:
        config = recipe(directory, case)
        before = everything()
        learner = assemble(config)
        learner.judges.teacher.score(rows)
        held = held_by(learner.student) | {"all": everything() - before}
        engine = engine or RemoteEngine(processes.channel("rollout"), config)
        push(learner.tensors(), engine, 1)
        write(directory, case, torch.distributed.get_rank(), held)
        del learner


def observe(directory: Path) -> None:
    """In the processes set aside for a role: writes what each question of the student's has found
    there."""
    from megatron_opd.rollout.vllm.engine import VllmEngine
    from megatron_opd.teacher.score import MegatronTeacher

    score, reload, cases = MegatronTeacher.score, VllmEngine.reload, iter([*CASES])

    def scoring(self: MegatronTeacher, *arguments: Any) -> Any:
        parameters = [each for chunk in self.chunks for each in chunk.parameters()]
        with LiveBytes() as live:
            live.ignore(*parameters)
            score(self, *arguments)
            signals = score(self, *arguments)  # the layers hold something of the pass before
        held = {"teacher": storages(parameters), "working": live.peak}
        write(directory, next(cases), TEACHER[torch.distributed.get_rank()], held)
        return signals

    def reloading(self: VllmEngine, tensors: Any) -> None:
        model = self._llm.apply_model(lambda model: model)[0]
        with LiveBytes() as live:
            live.ignore(*model.parameters())
            reload(self, tensors)
        held = {
            "engine": sum(math.prod(shape) for shape in self._weights.shapes.values())
            * self.dtype.itemsize,
            "KV cache": storages(
                module.kv_cache for module in model.modules() if "kv_cache" in vars(module)
            ),
            "received weights": live.peak,
        }
        write(directory, next(cases), ENGINE, held)

    MegatronTeacher.score, VllmEngine.reload = scoring, reloading  # type: ignore[method-assign]


def main(directory: Path) -> int:
    from megatron_opd.runs.roles import run_in_role

    observe(directory)
    run_in_role(recipe(directory, next(iter(CASES))), partial(student, directory))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

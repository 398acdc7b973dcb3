"""What the doctor makes of its numbers, and the small models it makes them with."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.architectures.architecture import architecture_of, read_architecture
from megatron_opd.checks.recipe import preflight
from megatron_opd.contracts.rows import Source
from megatron_opd.doctor.judge import judge
from megatron_opd.doctor.rows import recorded
from megatron_opd.doctor.shrink import alone, shrink
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.needs import distances_of, needs_of
from megatron_opd.methods.terms import DivergenceTerm, PolicyGradientTerm, TopKTerm
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.weights.load import check_hf
from tests.unit.tiny_model_files import write_model, write_recipe

UPDATE = {"train/loss": -0.03, "train/grad_norm": 2.0, "objective/distil/loss": -0.03}
ON_LAYOUT = {
    "updates": [UPDATE, UPDATE | {"train/loss": -0.05}],
    "other_teacher": [UPDATE | {"train/grad_norm": 2.5}],
    "own_teacher": [UPDATE | {"train/loss": 1e-8, "train/grad_norm": 3e-6}],
    "distance": [UPDATE | {"train/grad_norm": 6.0}],
    "refit": {"mean": 5e-7, "max": 2e-6, "stale": 2.0, "tokens": 100},
}


def statuses(recipe: Path, change: Callable[[dict], object], *overrides: str) -> dict[str, str]:
    found: dict[str, Any] = copy.deepcopy(ON_LAYOUT)
    change(found)
    config = load_config(str(recipe), ["method=opd", *overrides])
    return {each.subject: each.status for each in judge(config, 2, found, ON_LAYOUT["updates"])}


# ------------------------------------------------------------------------------------ the judgement
@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda found: None, ""),
        # a replica counted twice
        (lambda found: found["updates"][0].update({"train/grad_norm": 4.0}), "gradients"),
        (lambda found: found["updates"][1].update({"train/loss": -0.06}), "gradients"),
        (
            lambda found: found["updates"][0].update({"train/loss": math.nan}),
            "gradients, other teacher",
        ),
        (lambda found: found["updates"][1].update({"train/grad_norm": math.nan}), "gradients"),
        (lambda found: found["updates"].pop(), "gradients"),
        (
            lambda found: found["own_teacher"][0].update({"train/grad_norm": 0.1}),
            "teacher = student",
        ),
        (lambda found: found["own_teacher"][0].update({"train/loss": 0.01}), "teacher = student"),
        (
            lambda found: found["own_teacher"][0].update({"train/loss": math.nan}),
            "teacher = student",
        ),
        (lambda found: found["other_teacher"][0].update(UPDATE), "other teacher"),
        (
            lambda found: found["other_teacher"][0].update({"train/grad_norm": math.nan}),
            "other teacher",
        ),
        (lambda found: found["refit"].update({"mean": 1e-2}), "refit"),
        (lambda found: found["refit"].update({"mean": math.nan}), "refit"),
        # the weights were equal all along
        (lambda found: found["refit"].update({"stale": 1e-6}), "refit"),
    ],
)
def test_every_check_can_fail(change: Callable, failing: str, tmp_path: Path) -> None:
    found = statuses(write_recipe(tmp_path), change)
    assert list(found) == ["gradients", "teacher = student", "other teacher", "refit"]
    assert ", ".join(subject for subject, status in found.items() if status != "ok") == failing


def test_what_does_not_apply_is_said(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    config = load_config(str(recipe), ["method=grpo"])
    texts = {
        each.subject: each.text
        for each in judge(config, 2, {"updates": [UPDATE], "refit": ON_LAYOUT["refit"]}, [UPDATE])
    }
    assert (
        texts["teacher = student"]
        == "does not apply: no term of grpo is a distance from the teacher"
    )
    assert texts["other teacher"] == "does not apply: grpo reads no teacher at its first step"
    supervised = load_config(str(recipe), ["method=sft", "rollout={num_prompts: 4}"])
    last = list(judge(supervised, 2, {"updates": [UPDATE]}, [UPDATE]))[-1]
    assert (last.status, last.text) == ("ok", "does not apply: sft samples nothing")


# ------------------------------------------------------------------------------------ the distances
def test_distances_are_the_divergences_and_log_ratios() -> None:
    found = {name: distances_of(entry.method, 16) for name, entry in CATALOGUE.items()}
    without = {name for name, method in found.items() if method is None}
    needs_none = {
        name
        for name, entry in CATALOGUE.items()
        if not needs_of(entry.method).teacher_head and not needs_of(entry.method).teacher
    }
    assert without == needs_none | {
        "tgpo", "tgpo_annealing", "tgpo_r", "tgpo_r_indicator", "tgpo_r_teacher", "trrd", "top_d",
        "sdar", "sdar_entropy", "sdar_soft_or", "opsd", "grpo_opsd", "rlsd",
    }  # fmt: skip
    for method in filter(None, found.values()):
        for term in method.terms.values():
            assert (
                isinstance(term, DivergenceTerm | TopKTerm | PolicyGradientTerm) and not term.gates
            )
            assert not isinstance(term, TopKTerm) or term.k == 16


# --------------------------------------------------------------------------------- the small models
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
REAL = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "head_dim": 8,
}
SWITCHES = (
    "model_type",
    "tie_word_embeddings",
    "qkv_bias",
    "qk_norm",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "nproc"),
    [
        (
            {"model_type": "qwen3"},
            {"model_type": "qwen2", "head_dim": None},
            ["student.rope_theta=77.0"],
            1,
        ),
        (
            {"model_type": "llama", "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
            {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4,
             "moe_intermediate_size": 8},
            ["student.layout.tensor_model_parallel_size=4",
             "student.layout.sequence_parallel=true",
             "teacher.layout.expert_model_parallel_size=8",
             "rollout.num_prompts=8"],
            8,
        ),
        (
            {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": None,
             "vocab_size": 37},
            {"model_type": "qwen3", "vocab_size": 41, "head_dim": 16},
            ["student.layout.pipeline_model_parallel_size=4",
             "teacher.layout.tensor_model_parallel_size=2"],
            4,
        ),
        (
            {"model_type": "qwen3"},
            {"model_type": "qwen3"},
            ["rollout.num_prompts=6", "teacher.layout.tensor_model_parallel_size=2",
             "teacher.processes=2", "rollout.processes=1"],
            6,  # three replicas of the student
        ),
    ],
)  # fmt: skip
def test_small_models_keep_every_switch_and_fit_the_layouts(
    student: dict, teacher: dict, overrides: list[str], nproc: int, tmp_path: Path
) -> None:
    for name, keys in (("student", student), ("teacher", teacher)):
        write_model(tmp_path / name, **(REAL | keys))
        path = tmp_path / name / "config.json"
        kept = {
            key: value for key, value in json.loads(path.read_text()).items() if value is not None
        }
        path.write_text(json.dumps(kept))
    config = load_config(str(write_recipe(tmp_path)), ["method=full_fkl", *overrides])
    small = shrink(config, tmp_path / "small", nproc)
    preflight(small, world_size=nproc)
    preflight(alone(small), world_size=1)
    path = tmp_path / "small.yaml"
    path.write_text(dump_config(small))
    assert load_config(str(path)) == small
    for model, original in ((small.student, config.student), (small.teacher, config.teacher)):
        assert model and original
        arch, real = architecture_of(model), architecture_of(original)
        assert all(getattr(arch, key) == getattr(real, key) for key in SWITCHES)
        assert (arch.experts is None) == (real.experts is None)
        assert arch.experts is None or (arch.experts.count, arch.experts.per_token) == (8, 2)
        assert (arch.hidden_size == arch.num_attention_heads * arch.head_dim) == (
            real.hidden_size == real.num_attention_heads * real.head_dim
        )
        for directory in (model.path, f"{model.path}_other"):
            check_hf(directory, read_architecture(directory))
    # The student can be its own teacher, on the teacher's layout.
    assert small.teacher
    layout = replace(small.teacher.layout, expert_model_parallel_size=1)
    itself = replace(small.teacher, **(vars(small.student) | {"layout": layout}))
    preflight(replace(small, teacher=itself), world_size=nproc)


def test_recorded_rollouts_are_what_a_method_reads(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    for name, entry in CATALOGUE.items():
        overrides = (
            ["rollout={num_prompts: 4}"] if name == "sft" else ["rollout.samples_per_prompt=4"]
        )
        config = load_config(recipe, [f"method={name}", *overrides])
        rows = recorded(config, 16)
        assert max(r.token_ids.max() for r in rows) < 16
        method = entry.method
        whole_traces = (
            needs_of(method).traces and not method.prefix and method.on_policy_fraction == 1
        )
        assert any(r.num_given == r.num_tokens for r in rows) == whole_traces, name
        assert any((r.sources == Source.TEACHER).any() for r in rows) == (method.teacher_share > 0)

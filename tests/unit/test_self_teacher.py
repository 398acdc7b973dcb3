"""The keys of a self-teacher, and the copy of the student's weights that it may have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opd.checks.training import check_recipe
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.agents import SelfTeacherConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.trainer.weight_copy import WeightCopy
from tests.unit.skill_banks import write_words
from tests.unit.tiny_model_files import write_recipe

SKILLS = {"max_tokens": 16, "place": "user"}


def check(folder: Path, *overrides: str, **changes: Any) -> list[str]:
    keys = {"teacher": None, "self_teacher": {}, "skills": SKILLS, "method": "opd"} | changes
    if keys["skills"] and "method=minillm" not in overrides:
        keys |= {"environment": {"kind": "workshop"}, "data": {"template": {"kind": "raw"}}}
    if keys["skills"]:
        keys["skills"] |= {"bank": str(write_words(folder / "bank", heat="1+1", cool="2+2"))}
    recipe = write_recipe(folder, **keys)
    return check_recipe(load_config(str(recipe), overrides), world_size=None)


def test_a_self_teacher_takes_the_place_of_the_teacher(tmp_path: Path) -> None:
    assert check(tmp_path) == []
    for weights in ("first", "every", "average"):
        assert check(tmp_path, f"self_teacher.weights={weights}", skills=None) == []


@pytest.mark.parametrize(
    ("problem", "overrides", "changes"),
    [
        ("self_teacher: does not go with teacher; ", ["teacher.path=TEACHER"], {}),
        ("teacher: missing; .* or set self_teacher={}", ["self_teacher=null"], {}),
        ("self_teacher: no effect, method grpo reads no teacher", ["method=grpo"], {}),
        ("self_teacher: does not go with method.teacher_share", ["method=minillm"], {}),
        (r"self_teacher\.weights: present, and no skills", [], {"skills": None}),
        (r"self_teacher\.weights: present, and no", [], {"skills": SKILLS | {"reader": "student"}}),
        (r"self_teacher\.every: no effect with weights=present", ["self_teacher.every=3"], {}),
        (r"self_teacher\.decay: no effect with weights=every",
         ["self_teacher.weights=every", "self_teacher.decay=0.5"], {}),
        (r"train\.micro_batch_tokens: 40 cannot hold .*=32 and skills\.max_tokens=16; raise",
         ["train.micro_batch_tokens=40"], {}),
        (r"skills\.max_tokens: with max_sequence_length=32 a row has 65 tokens, more than the "
         "student's max_position_embeddings=64", ["skills.max_tokens=33"], {}),
        (r"student\.layout\.context_parallel_size: gkd compares whole distributions",
         ["method=gkd", "method.on_policy_fraction=1", "student.layout.context_parallel_size=2"],
         {}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, problem: str, overrides: list[str], changes: dict[str, Any]
) -> None:
    overrides = [text.replace("TEACHER", str(tmp_path / "teacher")) for text in overrides]
    with pytest.raises(ConfigError, match=f"^{problem}"):
        check(tmp_path, *overrides, **changes)


# ------------------------------------------------------------------------------ the copy of weights
def followed(settings: SelfTeacherConfig, steps: int) -> tuple[WeightCopy, list[torch.Tensor]]:
    """A copy in bfloat16 behind a student whose weights grow by little, and those weights."""
    student = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    own = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        student.weight.fill_(1.0)
    own.load_state_dict(student.state_dict())
    model: Any = SimpleNamespace(bare_chunks=[student], parallel=None)
    copy = WeightCopy([own], model, settings)
    seen = []
    for step in range(steps):
        with torch.no_grad():
            student.weight.add_(0.01)
        seen.append(student.weight.detach().float().clone())
        copy.follow(step)
    return copy, seen


def test_an_average_of_bfloat16_weights_loses_no_small_change() -> None:
    copy, seen = followed(SelfTeacherConfig("average", decay=0.99), steps=20)
    expected = torch.ones(4, 4)
    for weights in seen:
        expected = 0.99 * expected + 0.01 * weights
    (own,) = copy.chunks[0].parameters()
    assert own.dtype is torch.bfloat16
    torch.testing.assert_close(own.float(), expected.bfloat16().float())
    with copy.stored():
        assert own.dtype is torch.float32
        torch.testing.assert_close(own.detach(), expected)
        state = copy.chunks[0].state_dict()
        kept = {name: value.clone() for name, value in state.items()}
    # What a checkpoint brings back is the average, not its rounding.
    again, _ = followed(SelfTeacherConfig("average", decay=0.99), steps=0)
    with again.stored():
        again.chunks[0].load_state_dict(kept)
    with again.stored():
        torch.testing.assert_close(next(again.chunks[0].parameters()).detach(), expected)


def test_a_copy_every_so_many_steps() -> None:
    for steps, taken in ((1, None), (2, None), (3, 2), (5, 2), (6, 5)):
        copy, seen = followed(SelfTeacherConfig("every", every=3), steps)
        expected = torch.ones(4, 4) if taken is None else seen[taken]
        torch.testing.assert_close(next(copy.chunks[0].parameters()).detach().float(), expected)

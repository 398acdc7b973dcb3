"""Updates in float16: the loss scale is applied once, found by itself, not counted as failures, and
saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import Signals
from megatron_opd.errors import DataError, RunError
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore import passes
from megatron_opd.mcore.batch import Columns, micro_batches
from megatron_opd.mcore.model import build_model
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import LossScaleConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.trainer import checkpoint
from megatron_opd.trainer.step import Trainer
from megatron_opd.trainer.student import Student, prepare
from megatron_opd.weights.load import load_hf
from megatron_opd.weights.table import hf_shapes, weight_table
from megatron_opd.world import processes
from tests.rows import row, task
from tests.unit.tiny_model_files import write_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
METHOD = CATALOGUE["grpo"].method
LENGTH, TEMPERATURE = 12, 0.9
ROUNDING = 2**-11  # of a float16 number, relative


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    processes.start()
    yield
    processes.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model whose weights float16 holds exactly, so that all precisions start from the same."""
    directory = write_model(tmp_path_factory.mktemp("float16") / "model", **SIZES)
    shapes = hf_shapes(weight_table(architecture_of(ModelConfig(str(directory)))))
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape) / (10 if len(shape) > 1 else 2) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    return ModelConfig(str(directory))


def new_chunks(model: ModelConfig, precision: str) -> list[Any]:
    arch, parallel = architecture_of(model), groups.create(LayoutConfig())
    chunks = build_model(arch, parallel, precision=precision)
    load_hf(chunks, model.path, arch, parallel)
    return chunks


def new_student(
    model: ModelConfig, precision: Any = "float16", clip_grad: float = 0.0, **scale: Any
) -> Student:
    config = RunConfig(
        name="c",
        num_steps=9,
        max_sequence_length=64,
        method=METHOD,
        student=model,
        data=DataConfig(""),
        precision=precision,
        train=TrainConfig(
            OptimizerConfig(lr=1e-3, clip_grad=clip_grad), loss_scale=LossScaleConfig(**scale)
        ),
    )
    return prepare(
        new_chunks(model, precision), architecture_of(model), groups.create(LayoutConfig()), config
    )


def new_rows() -> list[Row]:
    rng = np.random.default_rng(1)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, SIZES["vocab_size"], count).astype(np.int32)

    return [
        row(
            of=task(i // 2, prompt_ids=ids(5)),
            token_ids=ids(LENGTH - i),
            sample=i % 2,
            group=i // 2,
            reward=float(i % 2),
            logprobs=-4,
        )
        for i in range(6)
    ]


ROWS = new_rows()
OBJECTIVE = Objective(METHOD, SIZES["vocab_size"], TEMPERATURE)


def build(mine: slice, tokens: slice) -> Columns:
    return build_columns(
        METHOD, Batch(ROWS[mine], Signals(None), seed=0, step=0, max_completion_tokens=LENGTH)
    )


def new_trainer(student: Student, max_skipped: int = 0) -> Trainer:
    settings: dict[str, Any] = {
        "updates_per_step": 1,
        "micro_batch_tokens": 64,
        "temperature": TEMPERATURE,
    }
    return Trainer(student, OBJECTIVE, max_skipped=max_skipped, **settings)


def one_update(student: Student) -> dict[str, float]:
    (metrics,) = new_trainer(student).step(ROWS, build, step=0)
    return metrics


def main_gradients(student: Student) -> dict[str, torch.Tensor]:
    """Without the loss scale and, since nothing is clipped, as the update used them."""
    return {
        name: each.main_grad.clone() for name, each in student.bare_chunks[0].named_parameters()
    }


def reference_gradients(model: ModelConfig) -> dict[str, torch.Tensor]:
    """In float64, without optimizer, data-parallel wrapper or loss scale."""
    chunks = [chunk.double() for chunk in new_chunks(model, "float32")]
    parallel, columns = groups.create(LayoutConfig()), build(slice(0, 6), slice(None))

    def loss(batch: Any, head: Any) -> Any:
        return OBJECTIVE(head, columns.take(batch.index_T, parallel), 0)

    passes.forward_backward(
        chunks, parallel, micro_batches(ROWS, parallel, 64), loss, forward_only=False
    )
    return {name: each.grad for name, each in chunks[0].named_parameters()}


def deviations(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[float]:
    """Relative to the norm of each tensor."""
    assert got.keys() == wanted.keys()
    return [float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in got]


# ---------------------------------------------------------------------------------------- gradients
def test_the_loss_scale_is_applied_once_and_taken_out_once(model: ModelConfig) -> None:
    reference, found, norms = reference_gradients(model), {}, {}
    for initial in (2.0**16, 2.0**10):
        student = new_student(model, initial=initial)
        metrics = one_update(student)
        assert metrics["train/loss_scale"] == initial and not metrics["train/skipped_updates"]
        found[initial], norms[initial] = main_gradients(student), metrics["train/grad_norm"]
        # Twenty or so operations of a layer and its gradient, each rounded to 2**-11.
        assert max(deviations(found[initial], reference)) < 20 * ROUNDING
    # A factor of 2**6 rounds nothing but the smallest numbers.
    assert max(deviations(found[2.0**16], found[2.0**10])) < ROUNDING
    whole = float(torch.cat([each.flatten() for each in reference.values()]).norm())
    assert norms == pytest.approx({scale: whole for scale in norms}, rel=4 * ROUNDING)


def test_gradients_are_clipped_without_the_scale(model: ModelConfig) -> None:
    norm, students = one_update(new_student(model))["train/grad_norm"], []
    for scale in (2.0**16, 2.0**12):
        students.append(new_student(model, clip_grad=norm / 3, initial=scale))
        assert one_update(students[-1])["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        clipped = torch.cat(
            [each.flatten() for each in main_gradients(students[-1]).values()]
        ).norm()
        assert float(clipped) == pytest.approx(norm / 3, rel=1e-3)


# ---------------------------------------------------------------------------------------- the scale
def test_a_scale_that_is_being_found_ends_no_run(model: ModelConfig) -> None:
    """With no skipped update allowed."""
    student = new_student(model, initial=2.0**40, hysteresis=1, window=2)
    trainer, before = (
        new_trainer(student),
        [each.clone() for each in student.bare_chunks[0].parameters()],
    )
    scales, skipped = [], []
    for _ in range(40):
        (metrics,) = trainer.step(ROWS, build, step=0)
        scales.append(metrics["train/loss_scale"])
        skipped.append(metrics["train/skipped_updates"])
        if not skipped[-1]:
            break
        assert metrics["train/grad_norm"] == float("inf")
        assert all(map(torch.equal, before, student.bare_chunks[0].parameters()))
    assert scales == [2.0 ** (40 - i) for i in range(len(scales))] and 1 < len(scales) < 40
    assert trainer.skipped_in_a_row == 0
    assert not all(map(torch.equal, before, student.bare_chunks[0].parameters()))
    one_update(student)
    assert one_update(student)["train/loss_scale"] == 2 * scales[-1]  # two good updates: doubled


def test_what_no_scale_heals_ends_the_run(model: ModelConfig) -> None:
    student = new_student(model, initial=4.0, hysteresis=1)
    student.bare_chunks[0].decoder.final_layernorm.weight.data.fill_(torch.nan)  # type: ignore[union-attr, operator]
    trainer = new_trainer(student, max_skipped=1)
    skipped = [trainer.step(ROWS, build, step=0) and trainer.skipped_in_a_row for _ in range(2)]
    assert skipped == [0, 1]  # the scale fell to 2, then to its minimum
    with pytest.raises(RunError, match="2 updates in a row had non-finite gradients"):
        trainer.step(ROWS, build, step=0)


def test_a_resumed_run_goes_on_bit_for_bit(model: ModelConfig, tmp_path: Path) -> None:
    """With an overflow just before the save, so that the scale is about to halve."""

    def make() -> Student:
        return new_student(model, initial=2.0**40, hysteresis=4, window=2)

    student = make()
    assert student.loss_scale is not None
    student.loss_scale.load_state_dict({"scale": 2.0**12, "growth": 1, "hysteresis": 4})
    one_update(student)  # the window is full
    student.loss_scale.load_state_dict(
        student.loss_scale.state_dict() | {"scale": 2.0**40, "hysteresis": 2}
    )
    assert one_update(student)["train/skipped_updates"]
    saved = student.loss_scale.state_dict()
    assert saved == {"scale": 2.0**40, "growth": 0, "hysteresis": 1}
    path = checkpoint.save(tmp_path, 2, {"model": student}, {}, keep=1)
    resumed = make()
    checkpoint.load(path, {"model": resumed})
    assert resumed.loss_scale is not None and resumed.loss_scale.state_dict() == saved
    for _ in range(30):
        expected, found = one_update(student), one_update(resumed)
        assert expected == found
    assert not expected["train/skipped_updates"]
    assert all(
        map(torch.equal, student.bare_chunks[0].parameters(), resumed.bare_chunks[0].parameters())
    )


# ------------------------------------------------------------------------------------- other models
def test_a_teacher_scores_in_float16(model: ModelConfig) -> None:
    arch, parallel = architecture_of(model), groups.create(LayoutConfig())
    settings: dict[str, Any] = {
        "student_vocab_size": arch.vocab_size,
        "micro_batch_tokens": 64,
        "offload": False,
    }
    wide, half = (
        MegatronTeacher(
            new_chunks(model, each), arch, parallel, temperature=TEMPERATURE, **settings
        ).score(ROWS, 4)
        for each in ("float32", "float16")
    )
    assert np.abs(wide.logprobs_T - half.logprobs_T).max() < 20 * ROUNDING
    assert np.abs(wide.entropy_T - half.entropy_T).max() < 20 * ROUNDING
    assert (wide.argmax_ids_T == half.argmax_ids_T).mean() > 0.9


def test_weights_that_float16_cannot_hold_are_refused_by_tensor(
    model: ModelConfig, tmp_path: Path
) -> None:
    arch, parallel = architecture_of(model), groups.create(LayoutConfig())
    directory = write_model(tmp_path / "large", **SIZES)
    tensors = {
        name: torch.full(shape, 7e4) for name, shape in hf_shapes(weight_table(arch)).items()
    }
    save_file(
        {name: each.bfloat16() for name, each in tensors.items()}, directory / "model.safetensors"
    )
    load_hf(build_model(arch, parallel, precision="bfloat16"), directory, arch, parallel)
    with pytest.raises(
        DataError,
        match=r"tensor model.embed_tokens.weight holds numbers beyond float16's range; set",
    ):
        load_hf(build_model(arch, parallel, precision="float16"), directory, arch, parallel)


def test_other_precisions_have_no_scale(model: ModelConfig) -> None:
    student = new_student(model, "bfloat16")
    assert student.loss_scale is None and "train/loss_scale" not in one_update(student)

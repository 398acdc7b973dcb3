"""All that an update holds on to is there before an engine looks at the free memory, and changes no
number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.trainer import student as made
from megatron_opd.trainer.student import Student, prepare
from megatron_opd.world import processes
from tests.tiny_config import tiny_config
from tests.unit.tiny_model_files import write_model

PRECISIONS = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    processes.start()
    yield write_model(tmp_path_factory.mktemp("model") / "student", num_hidden_layers=2)
    processes.stop()


def new_chunks(model: Path, precision: Any) -> list[Any]:
    chunks = build_model(
        read_architecture(model), groups.create(LayoutConfig()), precision=precision
    )
    torch.manual_seed(0)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter)
    return chunks


def new_student(model: Path, precision: Any) -> Student:
    config = tiny_config(precision=precision, weight_decay=0.1)
    return prepare(
        new_chunks(model, precision),
        read_architecture(model),
        groups.create(LayoutConfig()),
        config,
    )


def inner_optimizers(student: Student) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in student.optimizer.chained_optimizers]  # type: ignore[attr-defined]


def numbers(student: Student) -> list[torch.Tensor]:
    """The parameters, their float32 copies and the optimizer's state."""
    held: list[torch.Tensor] = [*student.bare_chunks[0].parameters()]
    for inner in inner_optimizers(student):
        for parameter in (each for group in inner.param_groups for each in group["params"]):
            held += [
                parameter,
                *(inner.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")),
            ]
    return [each.detach().clone() for each in held]


def two_updates(student: Student) -> list[torch.Tensor]:
    for _ in range(2):
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        for parameter in student.bare_chunks[0].parameters():
            parameter.main_grad.copy_(parameter.detach().sin())
        student.scheduler.step(1)
        with student.parallel.active():
            student.optimizer.step()
    return numbers(student)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_moments_of_every_parameter_are_there_before_an_update(
    model: Path, precision: str
) -> None:
    student = new_student(model, precision)
    for inner in inner_optimizers(student):
        parameters = [each for group in inner.param_groups for each in group["params"]]
        assert parameters
        for parameter in parameters:
            state = inner.state[parameter]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
            assert (
                not state["exp_avg"].any() and not state["exp_avg_sq"].any() and not state["step"]
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_making_them_moves_no_parameter_in_spite_of_weight_decay(
    model: Path, precision: str
) -> None:
    before = [each.detach().clone() for each in new_chunks(model, precision)[0].parameters()]
    student = new_student(model, precision)
    assert all(map(torch.equal, before, student.bare_chunks[0].parameters()))
    # before the first step of the schedule
    assert {group["lr"] for group in student.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_updates_are_those_of_an_optimizer_that_makes_them_itself(
    model: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = two_updates(new_student(model, precision))
    monkeypatch.setattr(made, "create_moments", lambda optimizer: None)
    late = new_student(model, precision)
    assert not any(inner.state for inner in inner_optimizers(late))
    assert all(map(torch.equal, got, two_updates(late)))

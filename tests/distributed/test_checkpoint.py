"""Checkpoints: whole or absent, damage is found before it is loaded, and everything comes back."""

import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.conversion import convert
from megatron_opd.errors import DataError, RunError
from megatron_opd.files.manifest import write_manifest
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.trainer import checkpoint
from megatron_opd.trainer.student import Student, prepare
from megatron_opd.weights.metadata import read_metadata
from megatron_opd.world import processes
from tests.tiny_config import tiny_config
from tests.unit.hostile_pickles import PICKLES, Payload, store_payload
from tests.unit.test_convert import write_source
from tests.unit.tiny_model_files import write_model


@pytest.fixture(scope="module")
def new_student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Student]]:
    """Makes students with weights of their own, and nothing learned."""
    directory = write_model(tmp_path_factory.mktemp("model") / "student", num_hidden_layers=2)
    processes.start()
    arch, layout = read_architecture(directory), groups.create(LayoutConfig())

    def make(**changes: Any) -> Student:
        chunks = build_model(arch, layout, precision="float32")
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter)
        return prepare(chunks, arch, layout, tiny_config(**changes))

    yield make
    processes.stop()


@pytest.fixture
def student(new_student: Callable[..., Student]) -> Student:
    return new_student()


def one_update(student: Student) -> None:
    """Any gradient will do; it differs from call to call by the weights."""
    for chunk in student.chunks:
        chunk.zero_grad_buffer()
    for parameter in student.bare_chunks[0].parameters():
        parameter.main_grad.copy_(parameter.detach().sin())
    student.scheduler.step(1)
    with student.parallel.active():
        student.optimizer.step()


def state_of(student: Student) -> dict[str, Any]:
    weights = {
        name: value.detach().clone() for name, value in student.bare_chunks[0].named_parameters()
    }
    return {
        **weights,
        "scheduler": student.scheduler.state_dict(),
        "lr": student.optimizer.param_groups[0]["lr"],
    }


def assert_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        assert (
            torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        ), name


@pytest.fixture
def saved(student: Student, tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 6, of which the newest two are kept."""
    for step in (2, 4, 6):
        one_update(student)
        checkpoint.save(tmp_path, step, {"model": student}, {"source": {"position": step}}, keep=2)
    return tmp_path


def test_weights_optimizer_and_schedule_come_back(
    new_student: Callable[..., Student], student: Student, saved: Path
) -> None:
    at_save = state_of(student)
    one_update(student)
    after = state_of(student)
    newest, warnings = checkpoint.newest(saved)
    assert (newest, warnings) == (saved / "step-000006", [])
    resumed = new_student()
    state = checkpoint.load(newest, {"model": resumed})
    assert (state["step"], state["source"]) == (6, {"position": 6})
    assert_equal(state_of(resumed), at_save)
    one_update(resumed)  # the moments count: the next update is the same too
    assert_equal(state_of(resumed), after)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_prolonged_run_has_the_rates_of_one_that_was_that_long(
    new_student: Callable[..., Student], tmp_path: Path, schedule: str
) -> None:
    def rates(student: Student, updates: int) -> list[float]:
        trained = []
        for _ in range(updates):
            one_update(student)
            trained.append(student.optimizer.param_groups[0]["lr"])
        return trained

    settings = {"schedule": schedule, "warmup_steps": 2}
    short, expected = (
        new_student(num_steps=6, **settings),
        rates(new_student(num_steps=12, **settings), 12),
    )
    rates(short, 6)
    path = checkpoint.save(tmp_path, 6, {"model": short}, {}, keep=1)
    prolonged = new_student(num_steps=12, **settings)
    checkpoint.load(path, {"model": prolonged})
    assert rates(prolonged, 6) == expected[6:]
    assert all(rate > 0 for rate in expected[6:-1])


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["step-000004", "step-000006"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "bytes instead of"), (flip_a_bit, "checksum"), (Path.unlink, "is missing")],
)
def test_a_damaged_checkpoint_is_passed_over(saved: Path, damage: Any, said: str) -> None:
    damage(max((saved / "step-000006" / "model").iterdir(), key=lambda path: path.stat().st_size))
    newest, warnings = checkpoint.newest(saved)
    assert newest == saved / "step-000004"
    assert len(warnings) == 1
    assert said in warnings[0]
    assert "step-000006" in warnings[0]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("manifest.json", "{", "manifest.json is missing or unreadable"),
        ("manifest.json", "[1]", "manifest.json is missing or unreadable"),
        ("manifest.json", '{"state.json": 3}', "manifest.json is missing or unreadable"),
        (
            "manifest.json",
            '{"state.json": {"bytes": "3", "sha256": ""}}',
            "manifest.json is missing or unreadable",
        ),
        ("state.json", "{", "state.json is not what a save writes"),
        ("state.json", "[]", "state.json is not what a save writes"),
        ("state.json", '{"step": 6}', "state.json is not what a save writes"),
        ("state.json", '{"step": 5, "schedulers": {}}', "state.json is not what a save writes"),
        (
            "state.json",
            '{"step": 6, "schedulers": {"model": {}}}',
            "state.json is not what a save writes",
        ),
    ],
)
def test_a_damaged_description_is_passed_over(
    saved: Path, name: str, content: str, problem: str
) -> None:
    newest = saved / "step-000006"
    (newest / name).write_text(content)
    if name == "state.json":
        (newest / "manifest.json").unlink()
        write_manifest(newest)  # it was written so
    assert checkpoint.newest(saved) == (
        saved / "step-000004",
        [f"{newest}: {problem}; using the one before"],
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(saved: Path) -> None:
    for step in (4, 6):
        (saved / f"step-{step:06d}" / "state.json").unlink()
    with pytest.raises(DataError) as caught:
        checkpoint.newest(saved)
    (line,) = str(caught.value).splitlines()
    assert (
        "step-000006: state.json is missing; " in line
        and "step-000004: state.json is missing; no whole" in line
    )


def test_other_names_beside_checkpoints_are_let_be(student: Student, saved: Path) -> None:
    for name in ("step-abc", "step-7", "step-000010.partial", "step-000012 (copy)", "other"):
        shutil.copytree(saved / "step-000004", saved / name)
    for name in (".DS_Store", "step-000020", "notes.txt"):
        (saved / name).touch()
    (saved / "step-000030").mkdir()
    (saved / ".step-000005.partial").mkdir()  # of a save that was killed
    before = {path.name for path in saved.iterdir()}
    assert checkpoint.newest(saved) == (saved / "step-000006", [])
    checkpoint.save(saved, 8, {"model": student}, {}, keep=2)
    after = before - {"step-000004", ".step-000005.partial"} | {"step-000008"}
    assert {path.name for path in saved.iterdir()} == after
    with pytest.raises(RunError, match=r"step-000020: cannot be written, .*Not a directory"):
        checkpoint.save(saved, 20, {"model": student}, {}, keep=2)
    assert {path.name for path in saved.iterdir()} == after


def test_what_a_killed_save_leaves_is_not_a_checkpoint(student: Student, saved: Path) -> None:
    (saved / "step-000006").rename(saved / ".step-000006.partial")
    shutil.copytree(saved / "step-000004", saved / "step-000008")
    (saved / "step-000008" / "manifest.json").unlink()
    assert checkpoint.newest(saved) == (saved / "step-000004", [])
    checkpoint.save(saved, 6, {"model": student}, {}, keep=2)  # over the rest of the killed one
    assert checkpoint.newest(saved) == (saved / "step-000006", [])


def test_a_full_disk_loses_nothing(student: Student, saved: Path) -> None:
    """Stood in for by a limit on the size of files: the same calls fail in the same places."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, 8000):  # in the tensors; in what is written about them
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                RunError,
                match=r"step-000008: cannot be written, with .* GiB free there; earlier check",
            ):
                checkpoint.save(saved, 8, {"model": student}, {"note": "x" * 10_000}, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in saved.iterdir()) == ["step-000004", "step-000006"]
        assert checkpoint.newest(saved) == (saved / "step-000006", [])
    signal.signal(signal.SIGXFSZ, before)
    checkpoint.save(saved, 8, {"model": student}, {}, keep=1)
    assert checkpoint.newest(saved) == (saved / "step-000008", [])


def test_layouts_of_the_same_sizes_share_their_groups(new_student: Callable[..., Student]) -> None:
    parallel = new_student().parallel
    assert groups.create(LayoutConfig(sequence_parallel=True)).groups is parallel.groups
    assert groups.create(LayoutConfig(sequence_parallel=True)).layout != parallel.layout


# ---------------------------------------------------------------------------- directories of others
@pytest.fixture
def converted(tmp_path: Path) -> Path:
    return convert.convert(
        str(write_source(tmp_path / "hf", torch.float32)), str(tmp_path / "megatron")
    )


def load_as_teacher(directory: Path, student: Student) -> None:
    arch = read_architecture(directory)
    chunks = build_model(arch, student.parallel, precision="float32")
    checkpoint.load_converted(directory, chunks, arch, student.parallel)


def test_a_directory_of_others_runs_no_code(
    student: Student, converted: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    # of older formats; it is not read
    torch.save([Payload(mark)], converted / "model" / "common.pt")
    store_payload(converted / "model", "rng_state/shard_0_1", mark)  # nor is what nobody asks for
    load_as_teacher(converted, student)
    store_payload(converted / "model", "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", mark)
    with pytest.raises(
        DataError,
        match=r"fc1._extra_state/shard_0_4 is no plain value \(.*get the model from another",
    ):
        load_as_teacher(converted, student)
    for content in (PICKLES["reduce"](mark), PICKLES["dotted"](mark)):
        (converted / "model" / ".metadata").write_bytes(content)
        with pytest.raises(
            DataError,
            match=r"\.metadata: names .*nothing was run, get the model from another source",
        ):
            load_as_teacher(converted, student)
    assert not mark.exists()


def test_a_run_of_others_runs_no_code(student: Student, saved: Path, tmp_path: Path) -> None:
    """Its checksums are right."""
    mark, newest = tmp_path / "ran", saved / "step-000006"
    store_payload(newest / "model", "common_state/shard_0_1", mark)
    with pytest.raises(DataError, match="common_state/shard_0_1 is no plain value"):
        checkpoint.load(newest, {"model": student})
    (newest / "model" / ".metadata").write_bytes(PICKLES["inside"](mark))
    with pytest.raises(DataError, match=r"\.metadata: names posix.mkdir"):
        checkpoint.load(newest, {"model": student})
    assert not mark.exists()


def test_states_that_transformer_engine_would_unpickle_are_refused(
    student: Student, converted: Path
) -> None:
    directory = converted / "model"
    metadata = read_metadata(directory)
    torch.save(
        [torch.tensor(list(pickle.dumps({})), dtype=torch.uint8)], directory / "state.distcp"
    )
    key = MetadataIndex("decoder.layers.mlp.linear_fc1._extra_state/shard_0_4")
    metadata.storage_data[key] = _StorageInfo(
        "state.distcp", 0, (directory / "state.distcp").stat().st_size
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        DataError,
        match=r"fc1._extra_state/shard_0_4 is not empty; states of FP8 layers are not supp",
    ):
        load_as_teacher(converted, student)


def test_records_that_end_early_are_one_line(student: Student, converted: Path) -> None:
    for path in (converted / "model").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:-400] + bytes(400))
    with pytest.raises(
        DataError, match=r"truncated or damaged .*; copy the checkpoint again|is no plain value"
    ):
        load_as_teacher(converted, student)

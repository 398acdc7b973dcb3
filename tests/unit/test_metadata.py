"""`.metadata` of a distributed checkpoint: read as torch reads it, and code that it names is never
run."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_opd.cli import main as cli
from megatron_opd.conversion import convert
from megatron_opd.errors import DataError
from megatron_opd.files.manifest import write_manifest
from megatron_opd.weights.metadata import read_metadata
from tests.unit.hostile_pickles import PICKLES
from tests.unit.test_convert import write_source


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return convert.convert(str(write_source(folder / "hf")), str(folder / "megatron"))


def write(folder: Path, content: bytes) -> Path:
    (folder / ".metadata").write_bytes(content)
    return folder


def test_it_is_read_as_torch_reads_it(converted: Path) -> None:
    metadata = read_metadata(converted / "model")
    with (converted / "model" / ".metadata").open("rb") as file:
        expected = pickle.load(file)
    assert metadata == expected
    assert len(metadata.state_dict_metadata) > 10


@pytest.mark.parametrize("name", PICKLES)
def test_a_payload_is_not_run_and_named(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    before = dict(vars(Metadata))
    with pytest.raises(
        DataError, match=r"\.metadata: names \S+, which the metadata of weights has no use for"
    ):
        read_metadata(write(tmp_path, PICKLES[name](mark)))
    assert not mark.exists()
    assert dict(vars(Metadata)) == before


@pytest.mark.parametrize("name", ["reduce", "inside"])
def test_the_payloads_would_run(name: str, tmp_path: Path) -> None:
    """Else the test above shows nothing."""
    pickle.loads(PICKLES[name](tmp_path / "ran"))
    assert (tmp_path / "ran").is_dir()


def one_tensor(**changes: Any) -> Metadata:
    size = torch.Size((2,))
    tensor = TensorStorageMetadata(
        TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size((0,)), size)]
    )
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 8} | changes
    index = MetadataIndex("a", torch.Size((0,)))
    return Metadata(
        {"a": tensor, "b": BytesStorageMetadata()}, storage_data={index: _StorageInfo(**place)}
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (one_tensor(relative_path="../other"), "not the name of a file beside it"),
        (one_tensor(relative_path="/etc/passwd"), "not the name of a file beside it"),
        (one_tensor(offset=-1), "a record of 8 bytes at -1"),
        (one_tensor(length="8"), "str where int is due"),
        (one_tensor(transform_descriptors=["zstd"]), "transformed records"),
        (Metadata({"a": 1}, storage_data={}), "int where TensorStorageMetadata is due"),  # type: ignore[dict-item]
        (Metadata({}, storage_data={"a": 1}), "str where MetadataIndex is due"),
        ({"a": 1}, "dict where Metadata is due"),
        (Metadata, "where Metadata is due"),
    ],
)
def test_values_of_other_types_are_damage(content: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"truncated or damaged .*{problem}.*; copy the checkpoint again"
    ):
        read_metadata(write(tmp_path, pickle.dumps(content)))


def test_a_truncated_file_is_damage(converted: Path, tmp_path: Path) -> None:
    content = (converted / "model" / ".metadata").read_bytes()
    for size in (0, 1, 10, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match="truncated or damaged"):
            read_metadata(write(tmp_path, content[:size]))


def test_convert_ends_with_one_line(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mark, source = tmp_path / "ran", tmp_path / "source"
    shutil.copytree(converted, source)
    write(source / "model", PICKLES["reduce"](mark))
    (source / "manifest.json").unlink()
    write_manifest(source)
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model/.metadata: names posix.mkdir" in line
    assert not mark.exists() and not (tmp_path / "out").exists()

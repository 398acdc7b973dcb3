"""Conversions on one process: exact in both directions, verified, continued after a crash, and bad
input refused."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.checks.recipe import preflight
from megatron_opd.cli import main as cli
from megatron_opd.conversion import convert, directions
from megatron_opd.errors import DataError, Interrupted, RunError
from megatron_opd.files.manifest import CheckedFile, NewFile, describe, find_damage
from megatron_opd.recipe.load import load_config
from megatron_opd.weights.blocks import BLOCK, Extent, equal_bits, write_blocks
from megatron_opd.weights.check import check_weights
from megatron_opd.weights.distributed import DistributedCheckpoint, write_pieces
from megatron_opd.weights.hf import HfCheckpoint, plan_shards
from megatron_opd.weights.pieces import pieces_of
from megatron_opd.weights.table import hf_shapes, weight_table
from megatron_opd.world import torchrun
from tests.unit.tiny_model_files import write_model, write_recipe

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "dense": {"model_type": "qwen3", "vocab_size": 131},
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "moe": {"model_type": "qwen3_moe", **EXPERTS},
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(directions, "FILE_BYTES", 3000)


def write_source(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """A Hugging Face directory of several shards, with a NaN, an infinity and a negative zero."""
    write_model(directory, **changes)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    shapes = hf_shapes(weight_table(read_architecture(directory)))
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors["model.embed_tokens.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    shards = plan_shards(shapes, 2, 5000)
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "hf")


def same_tensors(one: Path, other: Path, dtype: torch.dtype) -> bool:
    a, b = HfCheckpoint(one), HfCheckpoint(other)
    assert a.shapes == b.shapes
    return all(equal_bits(a.blocks(name), b.blocks(name), dtype, name) for name in a.shapes)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-len(content) // 8] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# ----------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf", **MODELS[name])
    there = convert.convert(str(source), str(tmp_path / "megatron"))
    assert len(list((there / "model").glob("*.distcp"))) > 3
    back = convert.convert(str(there), str(tmp_path / "back"))
    assert len(list(back.glob("*.safetensors"))) > 3
    assert same_tensors(source, back, torch.bfloat16)
    assert set(HfCheckpoint(back).dtypes.values()) == {torch.bfloat16}
    for directory in (there, back):
        assert find_damage(directory) is None
        check_weights(directory, read_architecture(directory))
        assert (directory / "tokenizer.json").read_bytes() == (
            source / "tokenizer.json"
        ).read_bytes()
        assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob(".*"))


def test_the_dtype_can_be_chosen_in_both_directions(source: Path, tmp_path: Path) -> None:
    wide = convert.convert(str(source), str(tmp_path / "wide"), dtype="float32")
    checkpoint = DistributedCheckpoint(wide / "model")
    assert checkpoint.check(read_architecture(source)) is torch.float32
    back = convert.convert(str(wide), str(tmp_path / "back"), dtype="bfloat16")
    assert same_tensors(source, back, torch.bfloat16)


def test_file_systems_that_cannot_copy_between_them_get_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = convert.convert(str(source), str(tmp_path / "megatron"))

    def refused(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "copy_file_range", refused)
    assert same_tensors(source, convert.convert(str(there), str(tmp_path / "back")), torch.bfloat16)


def test_a_file_read_in_order_gives_its_checksum_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * 2**17))
    with CheckedFile(path) as file:
        file.seek(2**17 + 5)  # what is passed over counts
        assert file.read(0) == b"" and file.readinto(part := bytearray(1000)) == 1000
        assert bytes(part) == path.read_bytes()[2**17 + 5 :][:1000]
        with pytest.raises(OSError, match="read in order"):
            file.seek(0)
        assert file.record() == describe(path)


def test_a_source_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    with NewFile(tmp_path / "new") as file, pytest.raises(DataError, match="short: ends too early"):
        write_blocks(file, Extent(tmp_path / "short", 1, 4, torch.float16), torch.float16, "name")


def test_tensors_of_more_than_one_block_are_the_same(tmp_path: Path) -> None:
    rows = BLOCK // 16 * 2 + 3
    source = write_source(tmp_path / "hf", vocab_size=rows)
    convert.convert(str(source), str(tmp_path / "megatron"))
    convert.convert(str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert HfCheckpoint(source).shapes["model.embed_tokens.weight"][0] == rows
    assert same_tensors(source, tmp_path / "back", torch.bfloat16)


def test_numbers_that_float16_cannot_hold_are_refused_by_tensor(
    source: Path, tmp_path: Path
) -> None:
    # an infinity stays one
    assert convert.convert(str(source), str(tmp_path / "half"), dtype="float16").is_dir()
    big = write_source(tmp_path / "big", torch.float32)
    tensors = {name: HfCheckpoint(big).read(name) for name in HfCheckpoint(big).shapes}
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, big / "model.safetensors")
    with pytest.raises(
        DataError, match=r"model.norm.weight|final_layernorm.weight: holds numbers beyond float16"
    ):
        convert.convert(str(big), str(tmp_path / "out"), dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "half", "hf"]


def test_several_processes_share_the_files_out(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each process by itself; tests/distributed starts them."""

    def in_turn(nproc: int, argv: list[str]) -> tuple[int, str]:
        monkeypatch.setenv("WORLD_SIZE", str(nproc))
        written = []
        for rank in range(nproc):
            monkeypatch.setenv("RANK", str(rank))
            convert.work(*argv[3:5], dtype=argv[6])
            written.append(capsys.readouterr().out.count("written"))
        assert sum(written) == len(convert.open_job(source, "float32").conversion.files)
        assert max(written) - min(written) <= 1
        return 0, ""

    one = convert.convert(str(source), str(tmp_path / "one"), dtype="float32")
    capsys.readouterr()
    monkeypatch.setattr(torchrun, "run_workers", in_turn)
    three = convert.convert(str(source), str(tmp_path / "three"), dtype="float32", nproc=3)
    files = [str(path.relative_to(one)) for path in one.rglob("*.distcp")]
    assert all((three / name).read_bytes() == (one / name).read_bytes() for name in files)
    assert find_damage(three) is None


@pytest.mark.parametrize(("code", "kind"), [(2, DataError), (1, RunError), (130, Interrupted)])
def test_how_the_processes_end_is_how_the_conversion_ends(
    code: int, kind: type[Exception], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "run_workers", lambda nproc, argv: (code, "so it was"))
    with pytest.raises(kind):
        convert.convert(str(source), str(tmp_path / "out"), nproc=2)
    assert (tmp_path / ".out.partial").exists() == (kind is not DataError)


# ------------------------------------------------------------------------------------ interruptions
KILLED = """
import os, signal, sys
from megatron_opd.conversion import convert, directions, sealed
directions.FILE_BYTES = 3000
seal, count = sealed._seal, []
def killing(*arguments):
    seal(*arguments)
    count.append(1)
    if len(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
sealed._seal = killing
convert.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True])
def test_a_killed_conversion_goes_on_with_its_whole_files(
    backwards: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if backwards:
        source = convert.convert(str(source), str(tmp_path / "megatron"))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out], stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    whole = sorted(
        path.with_suffix("") for path in partial.rglob("*.done") if path.read_text().endswith("}")
    )
    assert 3 <= len(whole) < len(convert.open_job(source, None).conversion.files)
    flip_a_bit(whole[0])
    written_at = {path.name: path.stat().st_mtime_ns for path in whole}
    capsys.readouterr()
    convert.convert(str(source), str(out))
    kept = [
        line.split()[1].rstrip(":")
        for line in capsys.readouterr().out.splitlines()
        if "was there" in line
    ]
    assert [Path(name).name for name in kept] == [path.name for path in whole[1:]]
    now = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in written_at}
    assert [name for name in now if now[name] == written_at[name]] and now[
        whole[0].name
    ] != written_at[whole[0].name]
    assert find_damage(out) is None
    assert not partial.exists()


def test_what_another_conversion_left_is_not_used(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    for change in ({"dtype": "float32"}, {}):
        job = convert.open_job(source, change.get("dtype"))
        partial.mkdir(exist_ok=True)
        convert._keep_only_what_belongs_to(job, partial)
        assert not (partial / "left").exists()
        (partial / "left").write_text("")
        convert._keep_only_what_belongs_to(job, partial)
        assert (partial / "left").exists()


def test_two_conversions_do_not_write_one_directory(source: Path, tmp_path: Path) -> None:
    with (
        convert._locked(tmp_path / ".out.partial"),
        pytest.raises(DataError, match=r"\.out\.partial: another process is writing it"),
    ):
        convert.convert(str(source), str(tmp_path / "out"))


def test_a_file_that_does_not_read_back_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hands back another bit than was written."""

    def faulty(file: Any, *arguments: Any) -> object:
        records = write_pieces(file, *arguments)
        flip_a_bit(Path(file.name))
        return records

    monkeypatch.setattr(directions, "write_pieces", faulty)
    with pytest.raises(RunError, match=r"does not read back as it was written"):
        convert.convert(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- bad input
def refused(capsys: pytest.CaptureFixture[str], source: Path, *options: str) -> str:
    """The one line that a refusal prints; nothing is left of it."""
    out = source.parent / "refused"
    before = sorted(source.parent.iterdir())
    capsys.readouterr()
    assert cli.main(["convert", str(source), str(out), *options]) == 2
    assert sorted(source.parent.iterdir()) == before
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def change_index(source: Path, change: Callable[[dict], object]) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def store(source: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({name: tensor}, source / "more.safetensors")
    change_index(source, lambda index: index.update({name: "more.safetensors"}))


FIRST = "model-00001-of-"
NORM = "model.norm.weight"
# fmt: off
BAD_HF = {
    "a shard is missing": (lambda s: next(s.glob(FIRST + "*")).unlink(), FIRST),
    "a shard is truncated": (lambda s: truncate(next(s.glob(FIRST + "*"))), "truncated or damaged"),
    "the index lists an absent file": (
        lambda s: change_index(s, lambda index: index.update({NORM: "no.safetensors"})),
        "no.safetensors: missing",
    ),
    "a tensor is missing":
        (lambda s: change_config(s, num_hidden_layers=5), "model.layers.4.input_layernorm.weight"),
    "a tensor is unknown":
        (lambda s: store(s, "model.extra", torch.zeros(1)), "model.extra is unexpected"),
    "a tensor has another shape":
        (lambda s: change_config(s, vocab_size=17), "embed_tokens.weight has shape"),
    "a tensor has a dtype of its own": (
        lambda s: store(s, NORM, torch.zeros(16)),
        "holds tensors of bfloat16, float32; choose what to write with --dtype",
    ),
    "a dtype is not supported":
        (lambda s: store(s, NORM, torch.zeros(16, dtype=torch.int8)), f"{NORM} is I8"),
    "the architecture is not supported":
        (lambda s: change_config(s, model_type="gpt9"), "'gpt9' is not supported"),
    "there is no config": (lambda s: (s / "config.json").unlink(), "config.json: missing"),
    "there are no weights":
        (lambda s: [path.unlink() for path in s.glob("model*")], "holds neither safetensors"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_HF)
def test_a_bad_hugging_face_directory_is_refused(
    case: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = BAD_HF[case]
    damage(source)
    line = refused(capsys, source)
    assert said in line
    assert str(source) in line


def largest(source: Path) -> Path:
    return max((source / "model").glob("*.distcp"), key=lambda path: path.stat().st_size)


BAD_MEGATRON = {
    "a bit of a file": (lambda s: flip_a_bit(largest(s)), "does not match its checksum"),
    "a bit of the metadata": (
        lambda s: flip_a_bit(s / "model" / ".metadata"),
        "model/.metadata does not match",
    ),
    "the end of a file": (lambda s: truncate(largest(s)), "bytes instead of"),
    "a file": (lambda s: largest(s).unlink(), "is missing"),
    "the metadata": (lambda s: (s / "model" / ".metadata").unlink(), "model/.metadata is missing"),
    "the manifest": (
        lambda s: (s / "manifest.json").unlink(),
        "manifest.json is missing or unreadable",
    ),
}


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_a_megatron_directory_without_is_refused(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = BAD_MEGATRON[case]
    megatron = convert.convert(str(source), str(tmp_path / "megatron"))
    damage(megatron)
    line = refused(capsys, megatron)
    assert said in line
    assert str(megatron) in line


def test_a_bit_of_a_converted_shard_is_noticed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert.convert(str(source), str(tmp_path / "megatron"))
    back = convert.convert(str(tmp_path / "megatron"), str(tmp_path / "back"))
    flip_a_bit(max(back.glob("*.safetensors"), key=lambda path: path.stat().st_size))
    assert "does not match its checksum" in refused(capsys, back)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_hidden_layers": 3},
            "linear_qkv.layer_norm_weight has shape (4, 16); config.json says (3, 16)",
        ),
        (
            {"vocab_size": 15},
            "embedding.word_embeddings.weight has shape (16, 16); config.json says (15, 16)",
        ),
        ({"tie_word_embeddings": True}, "output_layer.weight is unexpected"),
        ({"model_type": "qwen2"}, "linear_qkv.bias is missing"),
    ],
)
def test_a_megatron_checkpoint_of_another_model_is_refused(
    changes: dict[str, object], said: str, source: Path, tmp_path: Path
) -> None:
    megatron = convert.convert(str(source), str(tmp_path / "megatron"))
    change_config(megatron, **changes)
    with pytest.raises(DataError) as error:
        DistributedCheckpoint(megatron / "model").check(read_architecture(megatron))
    assert said in str(error.value)


def test_blocks_that_metadata_does_not_have_are_missed(source: Path, tmp_path: Path) -> None:
    megatron = convert.convert(str(source), str(tmp_path / "megatron"))
    checkpoint = DistributedCheckpoint(megatron / "model")
    arch = read_architecture(megatron)
    key = pieces_of(arch)[-2].key
    checkpoint.metadata.state_dict_metadata[key].chunks.pop()
    with pytest.raises(DataError, match=f"{key} is there in part only"):
        checkpoint.check(arch)


def test_no_source_an_existing_out_and_torchrun_are_refused(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "no such directory" in refused(capsys, tmp_path / "nothing")
    assert cli.main(["convert", str(source), str(source)]) == 2
    assert "already exists and is not overwritten" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave out torchrun" in refused(capsys, source)


# ------------------------------------------------------------------------------------------ recipes
def test_a_recipe_may_name_converted_models_but_none_that_vllm_itself_has_to_load(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    megatron = convert.convert(str(source), str(tmp_path / "megatron"))
    for model in ("student", "teacher"):
        assert preflight(load_config(recipe, [f"{model}.path={megatron}"]), world_size=1) == []
    refusal = r"megatron: holds Megatron weights, and vLLM samples from this model"
    with pytest.raises(DataError, match=refusal):  # the teacher's engine reads them from disk
        preflight(load_config(recipe, ["method=minillm", f"teacher.path={megatron}"]), world_size=1)
    for command in (
        ["eval", "--model"],
        ["traces", "--out", str(tmp_path / "traces.parquet"), "--model"],
    ):
        capsys.readouterr()
        data = f"data.heldout={tmp_path / 'train.jsonl'}"
        assert cli.main([command[0], recipe, data, *command[1:], str(megatron)]) == 2
        assert re.search(refusal, capsys.readouterr().err)
    truncate(largest(megatron))
    with pytest.raises(DataError, match=r"bytes instead of \d+; convert the model again"):
        preflight(load_config(recipe, [f"teacher.path={megatron}"]), world_size=1)

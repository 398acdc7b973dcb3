"""The weight table, its transforms and the model directories, without any process group."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.errors import DataError
from megatron_opd.weights.blocks import PAGE
from megatron_opd.weights.hf import HfCheckpoint, plan_shards, write_hf
from megatron_opd.weights.load import check_hf
from megatron_opd.weights.table import Entry, GroupedQkv, Stacked, hf_shapes, weight_table

ARCH = Architecture(
    model_type="qwen2",
    vocab_size=11,
    hidden_size=8,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=12,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Architecture, int]:
    """A small architecture, and a tensor-parallel size that divides it."""
    tp_size = draw(st.sampled_from([1, 2, 4]))
    groups = tp_size * draw(st.integers(1, 2))
    arch = replace(
        ARCH,
        vocab_size=draw(st.integers(2, 20)),
        hidden_size=2 * draw(st.integers(1, 5)),
        num_layers=draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 4])),
        intermediate_size=tp_size * draw(st.integers(1, 6)),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    return arch, tp_size


def random_tensors(arch: Architecture) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in hf_shapes(weight_table(arch)).items()}


def shard_shape(entry: Entry, tp_size: int) -> tuple[int, ...]:
    shape, dim = list(entry.full_shape), entry.partition.dim
    if dim is not None:
        shape[dim] = -(-shape[dim] // tp_size)
    return tuple(shape)


def entry_named(megatron_name: str, arch: Architecture = ARCH) -> Entry:
    (entry,) = [entry for entry in weight_table(arch) if entry.megatron_name == megatron_name]
    return entry


# --------------------------------------------------------------------------------------- transforms
@settings(max_examples=60, deadline=None)
@given(layouts())
def test_every_tensor_returns_bit_for_bit_from_its_shards(layout: tuple[Architecture, int]) -> None:
    arch, tp_size = layout
    tensors = random_tensors(arch)
    returned: dict[str, torch.Tensor] = {}
    for entry in weight_table(arch):
        parts = [tensors[name] for name in entry.hf_names]
        shape = shard_shape(entry, tp_size)
        shards = [entry.shard(parts, rank, tp_size, shape) for rank in range(tp_size)]
        full = entry.gather(shards)
        assert full.shape == entry.full_shape
        assert torch.equal(full, entry.transform.merge(parts))
        returned |= entry.to_hf(full)
    assert list(returned) == list(tensors)
    assert all(
        torch.equal(returned[name], tensors[name]) and returned[name].is_contiguous()
        for name in tensors
    )


def test_query_key_value_interleave_per_group() -> None:
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    merged = GroupedQkv(num_groups=2, heads_per_group=2, head_dim=2).merge([q, k, v])
    assert merged.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_a_rank_holds_its_slice_of_gate_and_its_slice_of_up() -> None:
    entry = entry_named("decoder.layers.1.mlp.linear_fc1.weight")
    gate = torch.arange(12.0)[:, None].expand(12, 8)
    shard = entry.shard([gate, gate + 100], rank=1, size=3, shape=(8, 8))
    assert shard[:, 0].tolist() == [4, 5, 6, 7, 104, 105, 106, 107]
    assert entry.hf_names == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )


@pytest.mark.parametrize("num_rows", [6, 64])
def test_the_vocabulary_is_padded_with_zeros_to_the_rows_the_model_has(num_rows: int) -> None:
    entry = entry_named("embedding.word_embeddings.weight")
    table = torch.randn(11, 8)
    shards = [entry.shard([table], rank, 2, (num_rows, 8)) for rank in range(2)]
    whole = torch.cat(shards)
    assert torch.equal(whole[:11], table) and whole.shape == (2 * num_rows, 8)
    assert not whole[11:].any()
    assert torch.equal(entry.gather(shards), table)


def test_stacked_keeps_the_order() -> None:
    parts = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert [part.unique().item() for part in Stacked(2).split(Stacked(2).merge(parts))] == [0, 1]


def test_a_model_of_another_size_is_refused_with_both_shapes() -> None:
    entry = entry_named("decoder.layers.0.self_attention.linear_proj.weight")
    with pytest.raises(
        ValueError,
        match=re.escape("linear_proj.weight is (8, 2), its checkpoint tensors make (8, 4)"),
    ):
        entry.shard([torch.zeros(8, 8)], rank=0, size=2, shape=(8, 2))
    with pytest.raises(ValueError, match="does not divide into 3 slices along dimension 1"):
        entry.shard([torch.zeros(8, 8)], rank=0, size=3, shape=(8, 2))


def test_a_tied_head_is_loaded_from_the_embedding_and_not_exported() -> None:
    tied = replace(ARCH, tie_word_embeddings=True)
    head = entry_named("output_layer.weight", tied)
    assert head.is_copy and head.hf_names == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in hf_shapes(weight_table(tied))
    assert "lm_head.weight" in hf_shapes(weight_table(ARCH))


# -------------------------------------------------------------------------------- model directories
@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory to export from: config and tokenizer files."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "dtype": "float32"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors.index.json").write_text("of other weights")
    return directory


def export(out: Path, source: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    options: dict = {"dtype": torch.float32, "max_shard_bytes": 10**9} | changes
    write_hf(out, source, tensors.items(), shapes, **options)
    return out


def test_a_sharded_directory_is_read_back_bit_for_bit(tmp_path: Path, source: Path) -> None:
    tensors = random_tensors(ARCH)
    out = export(tmp_path / "out", source, tensors, max_shard_bytes=1500)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < PAGE + 1500 for path in out.glob("*.safetensors"))
    checkpoint = check_hf(out, ARCH)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)
    total = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert (
        json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        == total
    )
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").is_file()


def test_one_shard_needs_no_index_and_the_config_names_the_written_dtype(
    tmp_path: Path, source: Path
) -> None:
    tensors = random_tensors(ARCH)
    out = export(tmp_path / "out", source, tensors, dtype=torch.bfloat16)
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensors[name].bfloat16()) for name in tensors)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_shard_exceeds_the_limit_only_for_one_large_tensor() -> None:
    shapes = {"a": (2,), "b": (2,), "c": (100,), "d": (1,)}
    assert list(plan_shards(shapes, 4, 16).values()) == [["a", "b"], ["c"], ["d"]]


def test_an_existing_directory_is_refused_and_a_failure_leaves_nothing(
    tmp_path: Path, source: Path
) -> None:
    tensors = random_tensors(ARCH)
    with pytest.raises(DataError, match="already exists"):
        export(source, source, tensors)

    def stop_halfway():
        yield next(iter(tensors.items()))
        raise KeyboardInterrupt

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with pytest.raises(KeyboardInterrupt):
        write_hf(tmp_path / "out", source, stop_halfway(), shapes, torch.float32, 1500)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "change", [lambda items: items[::-1], lambda items: [*items, ("more", torch.zeros(1))]]
)
def test_a_stream_that_is_not_the_planned_one_is_refused(
    tmp_path: Path, source: Path, change: Callable
) -> None:
    tensors = random_tensors(ARCH)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"was due|after the last"):
        write_hf(
            tmp_path / "out", source, change(list(tensors.items())), shapes, torch.float32, 10**9
        )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- bad checkpoints
def saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            lambda t: t.update({"model.layers.2.x": torch.zeros(1)}),
            "model.layers.2.x is unexpected",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(9)}),
            "norm.weight has shape (9,); its config.json says",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor_name(
    tmp_path: Path, change: Callable, message: str
) -> None:
    tensors = random_tensors(ARCH)
    change(tensors)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        check_hf(saved(tmp_path / "model", tensors), ARCH)
    assert str(tmp_path / "model") in str(error.value)


def test_rotary_constants_are_ignored(tmp_path: Path) -> None:
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}
    check_hf(saved(tmp_path / "model", random_tensors(ARCH) | constants), ARCH)


def test_a_tied_model_may_hold_its_head_only_when_it_is_the_embedding(tmp_path: Path) -> None:
    tied = replace(ARCH, tie_word_embeddings=True)
    tensors = random_tensors(tied)
    head = tensors["model.embed_tokens.weight"].clone()
    check_hf(saved(tmp_path / "same", tensors | {"lm_head.weight": head}), tied)
    with pytest.raises(
        DataError, match=r"lm_head.weight differs from .*; set tie_word_embeddings to false"
    ):
        check_hf(saved(tmp_path / "other", tensors | {"lm_head.weight": head + 1}), tied)


def test_missing_truncated_and_incomplete_files_are_named(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="holds neither"):
        HfCheckpoint(tmp_path)
    with pytest.raises(DataError, match=r"index\.json: is not an index"):
        HfCheckpoint(source)

    out = export(tmp_path / "out", source, random_tensors(ARCH), max_shard_bytes=1500)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    first = min(index["weight_map"].values())
    content = (out / first).read_bytes()

    (out / first).write_bytes(content[:-4])
    with pytest.raises(DataError, match=f"{first}: truncated or damaged"):
        HfCheckpoint(out)
    (out / first).write_bytes(b"")
    with pytest.raises(DataError, match=f"{first}: truncated or damaged"):
        HfCheckpoint(out)
    save_file({"other": torch.zeros(1)}, out / first)
    with pytest.raises(DataError, match=f"{first}: tensor model.embed_tokens.weight is missing"):
        HfCheckpoint(out)
    (out / first).unlink()
    with pytest.raises(DataError, match=f"{first}: missing"):
        HfCheckpoint(out)
    index["weight_map"]["model.norm.weight"] = "../source/elsewhere.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is not an index"):
        HfCheckpoint(out)

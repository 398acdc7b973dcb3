"""Weight files that are not a whole model: each is refused from its headers, in one line with a
remedy."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.cli.main import main
from megatron_opd.errors import DataError
from megatron_opd.weights.check import check_weights
from megatron_opd.weights.headers import INDEX, SINGLE
from megatron_opd.weights.table import hf_shapes, weight_table
from tests.unit.tiny_model_files import write_model, write_recipe, write_zeros

Shapes = dict[str, tuple[int, ...]]


def shapes_of(directory: Path) -> Shapes:
    return hf_shapes(weight_table(read_architecture(directory)))


def rewrite(directory: Path, change: Callable[[Shapes], object], **dtype: object) -> None:
    shapes = shapes_of(directory)
    change(shapes)
    write_zeros(directory / SINGLE, shapes, **dtype)  # type: ignore[arg-type]


def split(directory: Path) -> dict[str, str]:
    """Two files and an index in the place of one file."""
    shapes = shapes_of(directory)
    names, (one, two) = (
        list(shapes),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    )
    (directory / SINGLE).unlink()
    index = {name: one if names.index(name) < 9 else two for name in names}
    for file in (one, two):
        write_zeros(directory / file, {name: shapes[name] for name in names if index[name] == file})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def add_index(directory: Path, index: object) -> None:
    (directory / INDEX).write_text(json.dumps(index))


def stray(directory: Path, name: str) -> None:
    (directory / SINGLE).rename(directory / name)


def lora(directory: Path) -> None:
    (directory / SINGLE).unlink()
    write_zeros(
        directory / "adapter_model.safetensors", {"base_model.model.q_proj.lora_A.weight": (2, 16)}
    )


def quantised(directory: Path) -> None:
    def add_scales(shapes: Shapes) -> None:
        shapes["model.layers.0.mlp.up_proj.weight_scale_inv"] = (1, 1)

    rewrite(directory, add_scales)


def awq(directory: Path) -> None:
    def pack(shapes: Shapes) -> None:
        shapes["model.layers.0.mlp.up_proj.qweight"] = shapes.pop(
            "model.layers.0.mlp.up_proj.weight"
        )

    rewrite(directory, pack)


def missing_shard(directory: Path) -> None:
    (directory / min(split(directory).values())).unlink()


def truncated_shard(directory: Path) -> None:
    path = directory / max(split(directory).values())
    path.write_bytes(path.read_bytes()[:-7])


def left_over_shard(directory: Path) -> None:
    """The index of an earlier save promises a tensor where the newer file has none."""
    index = split(directory)
    write_zeros(directory / max(index.values()), {"model.norm.weight": (16,)})


def twice(directory: Path) -> None:
    index = split(directory)
    files = sorted(set(index.values()))
    shapes = shapes_of(directory)
    for file in files:
        names = {name: shape for name, shape in shapes.items() if index[name] == file}
        write_zeros(directory / file, names | {"model.extra": (1,)})


def other_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


UP = "model.layers.0.mlp.up_proj.weight"
# fmt: off
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "Git LFS pointer": (
        lambda d: (d / SINGLE).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        ),
        "model.safetensors: a Git LFS pointer in the place of the weights; fetch them with git "
        "lfs pull",
    ),
    "empty": (
        lambda d: (d / SINGLE).write_bytes(b""),
        "model.safetensors: truncated or damaged (it is empty)",
    ),
    "seven bytes":
        (lambda d: (d / SINGLE).write_bytes(b"1234567"), "model.safetensors: truncated or damaged"),
    "no header":
        (lambda d: (d / SINGLE).write_bytes(b"\0" * 64), "model.safetensors: truncated or damaged"),
    "HTML": (
        lambda d: (d / SINGLE).write_text("<html>" * 99),
        "model.safetensors: truncated or damaged",
    ),
    "header of another kind": (
        lambda d: (d / SINGLE).write_bytes((7).to_bytes(8, "little") + b'{"a":1}'),
        "model.safetensors: truncated or damaged",
    ),
    "truncated": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes()[:-9]),
        "model.safetensors: truncated or damaged",
    ),
    "a directory": (
        lambda d: ((d / SINGLE).unlink(), (d / SINGLE).mkdir()),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "LoRA adapter": (lora, "holds a LoRA adapter without its base model; merge the two"),
    "LoRA as the model": (
        lambda d: write_zeros(d / SINGLE, {"base_model.model.q_proj.lora_A.weight": (2, 16)}),
        "q_proj.lora_A.weight is of a LoRA adapter; merge it with its base",
    ),
    "pickled": (lambda d: stray(d, "pytorch_model.bin"), "holds pickled weights only"),
    "GGUF": (lambda d: stray(d, "model-q4.gguf"), "holds GGUF weights only"),
    "nothing": (lambda d: (d / SINGLE).unlink(), "no *.safetensors file"),
    "shards without an index": (
        lambda d: stray(d, "model-00001-of-00001.safetensors"),
        "holds neither model.safetensors nor model.safetensors.index.json, which says what is "
        "where; copy it there",
    ),
    "FP8": (
        lambda d: rewrite(d, lambda shapes: None, dtype="F8_E4M3", itemsize=1),
        "tensor model.embed_tokens.weight is F8_E4M3; save the model as BF16 or F32",
    ),
    "8-bit": (
        lambda d: rewrite(d, lambda shapes: None, dtype="I8", itemsize=1),
        "is I8; save the model as BF16",
    ),
    "scales": (
        quantised,
        "weight_scale_inv is unexpected; the weights are quantised; give the model in BF16 or F32",
    ),
    "AWQ":
        (awq, f"tensor {UP} is missing; the weights are quantised; give the model in BF16 or F32"),
    "no output layer": (
        lambda d: rewrite(d, lambda shapes: shapes.pop("lm_head.weight")),
        "tensor lm_head.weight is missing; save the model with it, or set tie_word_embeddings to "
        "true in config.json",
    ),
    "a missing tensor": (
        lambda d: rewrite(d, lambda shapes: shapes.pop(UP)),
        f"tensor {UP} is missing; its config",
    ),
    "a tensor more": (
        lambda d: rewrite(d, lambda shapes: shapes.update({"vision_tower.weight": (1,)})),
        "tensor vision_tower.weight is unexpected; its config.json describes another model",
    ),
    "another shape": (
        lambda d: rewrite(d, lambda shapes: shapes.update({UP: (33, 16)})),
        f"tensor {UP} has shape (33, 16); its config.json says (32, 16)",
    ),
    "a config of another size":
        (other_config(hidden_size=8), "has shape (16, 16); its config.json says (16, 8)"),
    "a config of more layers":
        (other_config(num_hidden_layers=5), "layers.4.input_layernorm.weight is missing"),
    "a config of fewer layers":
        (other_config(num_hidden_layers=3), "tensor model.layers.3.input_layernorm.weight is"),
    "a config of a billion layers":
        (other_config(num_hidden_layers=10**9), "too few for the 1000000000 layers"),
    "missing shard": (
        missing_shard,
        "model-00001-of-00002.safetensors: missing, though model.safetensors.index.json",
    ),
    "truncated shard": (truncated_shard, "model-00002-of-00002.safetensors: truncated or damaged"),
    "left-over shard":
        (left_over_shard, "is missing, though model.safetensors.index.json lists it there"),
    "a tensor in two files":
        (twice, "tensor model.extra is in model-00001-of-00002.safetensors too; save them anew"),
    "index elsewhere": (
        lambda d: add_index(d, {"weight_map": {"a": "../b"}}),
        "is not an index of safetensors files",
    ),
    "index of nothing":
        (lambda d: add_index(d, {"weight_map": {}}), "is not an index of safetensors files"),
    "index of numbers":
        (lambda d: add_index(d, {"weight_map": {"a": 1}}), "is not an index of safetensors files"),
    "index that is a list": (lambda d: add_index(d, [1]), "is not an index of safetensors files"),
    "index that is no JSON":
        (lambda d: (d / INDEX).write_text("{"), "is not an index of safetensors files"),
}
# fmt: on


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with sound models."""
    return write_recipe(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("what", BROKEN)
def test_check_names_the_file_or_tensor_and_the_remedy(
    what: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, problem = BROKEN[what]
    teacher = shutil.copytree(sound.parent / "teacher", tmp_path / "teacher")
    damage(teacher)
    for command in ("check", "train"):  # train refuses before it starts anything
        assert (
            main([command, str(sound), f"teacher.path={teacher}", f"run_dir={tmp_path / 'run'}"])
            == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"megatron-opd: error: {teacher}")
        assert problem in line
    assert not (tmp_path / "run").exists()


def test_what_real_directories_hold_beside_the_weights_is_let_be(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    arch = read_architecture(directory)
    rewrite(
        directory,
        lambda shapes: shapes.update({"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}),
    )
    check_weights(directory, arch, sampled=True)
    split(directory)
    write_zeros(directory / "consolidated.safetensors", {"tok_embeddings.weight": (16, 16)})
    check_weights(directory, arch, sampled=True)


def test_a_directory_in_which_vllm_would_read_other_weights_is_not_sampled_from(
    tmp_path: Path,
) -> None:
    directory = write_model(tmp_path / "model")
    arch, content = read_architecture(directory), (directory / SINGLE).read_bytes()
    split(directory)
    (directory / SINGLE).write_bytes(content)
    check_weights(directory, arch)
    with pytest.raises(
        DataError,
        match=r"beside the files of model\.safetensors\.index\.json, which vLLM would read",
    ):
        check_weights(directory, arch, sampled=True)


def test_an_output_layer_that_is_not_the_tied_embedding_is_seen_from_its_beginning(
    tmp_path: Path,
) -> None:
    directory = write_model(tmp_path / "model", tie_word_embeddings=True)
    rewrite(directory, lambda shapes: shapes.update({"lm_head.weight": (16, 16)}))
    arch = read_architecture(directory)
    check_weights(directory, arch)
    content = bytearray((directory / SINGLE).read_bytes())
    content[-1] = 1  # lm_head is the last tensor
    (directory / SINGLE).write_bytes(content)
    with pytest.raises(
        DataError, match=r"lm_head.weight differs from .*; set tie_word_embeddings to false"
    ):
        check_weights(directory, arch)


def test_headers_of_a_large_model_are_checked_without_torch(tmp_path: Path) -> None:
    """A file of Qwen3-30B-A3B's size, 61 GB, as a hole."""
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    directory = write_model(tmp_path / "model", num_hidden_layers=48, hidden_size=2048, **experts)
    code = (
        "import sys; from pathlib import Path; from megatron_opd.weights.check import "
        "check_weights;from megatron_opd.architectures.architecture import read_architecture;d = "
        f"Path({str(directory)!r}); check_weights(d, read_architecture(d));sys.exit('torch' in "
        "sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every family, tied and untied, through all that a run does with weights: load, refit, export,
convert.

Real models tie their embeddings where they are small (Qwen2.5 up to 3B, Qwen3 up to 4B, Llama 3.2,
SmolLM2).
"""

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_opd.architectures.architecture import SUPPORTED
from megatron_opd.conversion import convert
from megatron_opd.weights.hf import HfCheckpoint
from tests import forked
from tests.e2e import tiny_hf
from tests.e2e.family_worker import other

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("family_worker.py")
KINDS = {"tied": True, "untied": False}


@pytest.fixture(scope="module", params=list(SUPPORTED))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(model_type, folder of the models, folder of what a trainer and an engine made of them)."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for kind, tied in KINDS.items():
        for seed, directory in enumerate((models / kind, other(models / kind))):
            sizes = {"moe_intermediate_size": 32} if request.param == "qwen3_moe" else {}
            tiny_hf.write(tiny_hf.build(request.param, seed, tied=tied, **sizes), directory)
    done = forked.run(WORKER, 1, out, *(models / kind for kind in KINDS))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return request.param, models, out


@pytest.mark.parametrize("kind", KINDS)
def test_refit(family: tuple[str, Path, Path], kind: str) -> None:
    """An engine samples from the weights that were pushed last, as trainer and transformers know
    them, and a copy in
    it that is older is noticed."""
    _, _, out = family
    measured = json.loads((out / f"{kind}.json").read_text())
    assert max(measured["from_trainer"]) < 1e-4
    assert max(measured["from_transformers"]) < 1e-4
    first, second = measured["tokens"]
    assert first != second
    # vLLM has two modules with one parameter, and its loaders leave the second as it was
    if KINDS[kind]:
        assert (
            "model.embed_tokens.weight in vLLM is not the tensor that was sent" in measured["stale"]
        )
    else:
        assert measured["stale"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_round_trip(family: tuple[str, Path, Path], kind: str) -> None:
    """Loaded into Megatron and exported: the same names and bits, and a directory that transformers
    reads."""
    _, models, out = family
    assert_same_tensors(other(models / kind), out / kind)
    tokens_BS = torch.randint(
        tiny_hf.VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1)
    )
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(directory)
        for directory in (other(models / kind), out / kind)
    )
    assert (before.lm_head.weight is before.model.embed_tokens.weight) == KINDS[kind]
    with torch.no_grad():
        assert torch.equal(before(tokens_BS).logits, after(tokens_BS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_both_ways(family: tuple[str, Path, Path], kind: str, tmp_path: Path) -> None:
    _, models, _ = family
    convert.convert(str(models / kind), str(tmp_path / "megatron"))
    convert.convert(str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert_same_tensors(models / kind, tmp_path / "back")


def assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = HfCheckpoint(first), HfCheckpoint(second)
    assert ours.shapes == theirs.shapes and ours.dtypes == theirs.dtypes
    for name in ours.shapes:
        assert torch.equal(ours.read(name), theirs.read(name)), name

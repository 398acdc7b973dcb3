"""A real language model's weights: what it says, the logits of every layout, and the way there and
back."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_opd.conversion import convert
from megatron_opd.weights.hf import HfCheckpoint
from tests.distributed.conftest import run_distributed  # noqa: F401
from tests.real.logits_worker import PRECISIONS

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("logits_worker.py")
# 9 heads, of which 3 are of keys and values
LAYOUTS = {"tp1": (1, 1), "tp3": (3, 1), "pp2": (1, 2)}
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of France is Paris.<|im_end|>"
PROSE = (
    "Photosynthesis is the process by which green plants turn sunlight, water and carbon dioxide "
    "into sugar."
)


@pytest.fixture(scope="module")
def tokens_BS(model_dir: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    rows = [tokenizer(text)["input_ids"][:19] for text in (QUESTION + ANSWER, PROSE)]
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def logits_of_transformers(model_dir: Path, tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = {}
    for precision in PRECISIONS:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, precision)
        )
        with torch.no_grad():
            logits[precision] = model(tokens_BS).logits.float()
    return logits


def test_the_model_is_one_and_its_end_is_the_end_of_a_turn(model_dir: Path) -> None:
    """Its GGUF names the beginning of a turn as the end of text: a sampler would never stop."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert (
        tokenizer.eos_token_id
        == model.config.eos_token_id
        == model.generation_config.eos_token_id
        == 2
    )
    assert tokenizer.decode(2) == "<|im_end|>"
    assert tokenizer.decode(tokenizer(PROSE)["input_ids"]) == PROSE
    prompt_1S = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    written_1S = model.generate(
        prompt_1S, attention_mask=torch.ones_like(prompt_1S), do_sample=False, max_new_tokens=12
    )
    assert tokenizer.decode(written_1S[0, prompt_1S.shape[1] :]) == ANSWER


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    layout: str,
    model_dir: Path,
    tokens_BS: torch.Tensor,
    logits_of_transformers: dict[str, torch.Tensor],
    tmp_path: Path,
    run_distributed: Callable[..., CompletedProcess],  # noqa: F811
) -> None:
    tp_size, pp_size = LAYOUTS[layout]
    save_file({"tokens_BS": tokens_BS}, tmp_path / "tokens.safetensors")
    run_distributed(WORKER, tp_size * pp_size, tp_size, pp_size, tmp_path, model_dir)
    ours = {
        precision: load_file(tmp_path / f"{tp_size}-{pp_size}-{precision}.safetensors")[
            "logits_BSV"
        ].float()
        for precision in PRECISIONS
    }
    exact_BSV = logits_of_transformers["float32"]
    torch.testing.assert_close(ours["float32"], exact_BSV, atol=5e-4, rtol=0)
    # Rounding to bfloat16 goes another way in each implementation; it must cost ours no more than
    # theirs.
    error, theirs = (
        float((logits_BSV - exact_BSV).square().mean().sqrt())
        for logits_BSV in (ours["bfloat16"], logits_of_transformers["bfloat16"])
    )
    assert 0 < error < 1.5 * theirs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_conversion_both_ways_bit_for_bit(precision: str, model_dir: Path, tmp_path: Path) -> None:
    convert.convert(str(model_dir), str(tmp_path / "megatron"), dtype=precision)
    convert.convert(str(tmp_path / "megatron"), str(tmp_path / "back"))
    before, after = HfCheckpoint(model_dir), HfCheckpoint(tmp_path / "back")
    assert before.shapes == after.shapes and len(before.shapes) == 272
    dtype = getattr(torch, precision)
    for name in before.shapes:
        assert after.dtypes[name] is dtype
        assert torch.equal(before.read(name).to(dtype), after.read(name)), name
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (model_dir / name).read_bytes() == (tmp_path / "back" / name).read_bytes()

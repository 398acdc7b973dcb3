"""A refit of a mixture of experts. In a file of its own: vLLM makes the groups it needs only for a
first engine."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.sampling import Draw
from megatron_opd.errors import RunError
from megatron_opd.refit.push import push
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.e2e import tiny_hf
from tests.e2e.test_rollout import CONFIG, Tampered, assert_logprobs_of, replaced

pytestmark = pytest.mark.slow


# 24: widened
@pytest.mark.parametrize(
    ("precision", "width"), [("float32", 24), ("bfloat16", 32), ("float16", 32)]
)
def test_experts_are_refitted_and_every_stale_one_is_found(
    precision: str, width: int, tmp_path: Path
) -> None:
    """vLLM packs the experts of a layer into one tensor, in the order its kernel wants."""
    model = tiny_hf.build("qwen3_moe", seed=0, tied=False, moe_intermediate_size=width)
    directory = tiny_hf.write(model, tmp_path / "model")
    on_disk = load_file(directory / "model.safetensors")
    previous = {name: tensor.to(getattr(torch, precision)) for name, tensor in on_disk.items()}
    # As small as an update with a learning rate of 1e-6; in 16 bits the next numbers of a tenth of
    # the elements.
    step = 1e-6 if precision == "float32" else 2**-8
    updated = {
        name: tensor + step * torch.sign(tensor) * tensor.abs().clamp(min=0.1)
        for name, tensor in previous.items()
    }
    settings = dict(precision=precision, max_sequence_length=64, seed=0, empty=True)
    engine = VllmEngine(ModelConfig(str(directory)), CONFIG, **settings)
    try:
        push(iter(updated.items()), engine, 1)
        experts = [name for name in previous if "experts" in name]
        assert len(experts) == 2 * 4 * 3
        for stale in experts:
            with pytest.raises(RunError, match=f"{stale} in vLLM is not"):
                push(iter(updated.items()), Tampered(engine, replaced({stale: previous[stale]})), 2)
        push(iter(updated.items()), engine, 3)
        if precision == "float32":
            save_file(updated, directory / "model.safetensors", {"format": "pt"})
            changed = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32
            )
            sampler = SingleTurn(engine, load_tokenizer(directory))
            draw = Draw(seed=5, step=0, version=3, samples=4, max_tokens=16, temperature=1.0)
            assert_logprobs_of(changed, sampler.sample(tiny_hf.tasks(3, 20), draw))
    finally:
        engine.close()

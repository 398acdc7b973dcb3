"""A mixture-of-experts teacher says the same on every layout: what transformers computes in
float64."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import test_layout_invariance as replayed
from tests.distributed.worlds import measure, measured

K = 5
# processes -> (name, TP, PP, sequence parallel, EP, ETP, tokens of a micro-batch)
LAYOUTS = {
    1: [("whole", 1, 1, False, 1, 1, 999), ("micro 60", 1, 1, False, 1, 1, 60)],
    2: [
        ("ep2", 1, 1, False, 2, 1, 60),  # the experts of two replicas are shared out among them
        ("tp2", 2, 1, False, 1, 1, 90),
        ("tp2 ep2", 2, 1, False, 2, 1, 90),
        ("tp2 sp ep2", 2, 1, True, 2, 1, 90),
        ("pp2", 1, 2, False, 1, 1, 90),
        ("tp2 etp2", 2, 1, False, 1, 2, 90),
        ("etp2", 1, 1, False, 1, 2, 60),
    ],
    4: [
        ("tp2 ep4", 2, 1, False, 4, 1, 60),
        ("pp2 ep2", 1, 2, False, 2, 1, 60),
        ("tp2 sp ep2 etp2", 2, 1, True, 2, 2, 60),
    ],
}
SIGNALS = ("argmax", "logprobs", "entropy", "topk_ids", "topk_logprobs")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=replayed.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).save_pretrained(directory / "teacher")
    return directory


@pytest.fixture(scope="module")
def reference(directory):
    """Plain torch in float64."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(
        directory / "teacher", dtype=torch.float64, experts_implementation="eager"
    )  # fmt: skip
    columns = {name: [] for name in SIGNALS}
    for r in replayed.recorded_rows():
        ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.token_ids])).long()
        start = len(r.prompt_ids) - 1
        with torch.no_grad():
            log_p = teacher(ids[None]).logits[0, start : start + r.num_tokens].log_softmax(-1)
        best = log_p.topk(K)
        columns["argmax"] += log_p.argmax(-1).tolist()
        columns["logprobs"] += log_p[
            torch.arange(r.num_tokens), torch.from_numpy(r.token_ids).long()
        ].tolist()
        columns["entropy"] += (-(log_p.exp() * log_p).sum(-1)).tolist()
        columns["topk_ids"] += best.indices.tolist()
        columns["topk_logprobs"] += best.values.tolist()
    return columns


@pytest.mark.parametrize("nproc", LAYOUTS)
def test_signals_are_those_of_plain_torch(nproc, directory, reference, run_distributed):
    results = measured(run_distributed, __file__, directory, {nproc: LAYOUTS[nproc]})
    assert list(results) == [name for name, *_ in LAYOUTS[nproc]]
    for layout, got in results.items():
        for name in SIGNALS:
            np.testing.assert_allclose(
                got[name], reference[name], rtol=0, atol=2e-5, err_msg=f"{layout}: {name}"
            )


# -------------------------------------------------------------------------------------- the program
def signals(
    directory: Path, name: str, tp: int, pp: int, sp: bool, ep: int, etp: int, micro: int
) -> dict:
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.teacher.score import MegatronTeacher

    chunks, arch, parallel = replayed.load_model(
        directory / "teacher", LayoutConfig(tp, pp, sp, ep, etp)
    )
    held = [
        tuple(weight.shape)
        for name, weight in chunks[0].named_parameters()
        if "experts.linear_fc1" in name
    ]
    one_layer = (
        arch.experts.count // ep,
        2 * arch.experts.intermediate_size // etp,
        arch.hidden_size,
    )
    assert held == [one_layer] * (arch.num_layers // pp)
    teacher = MegatronTeacher(
        chunks,
        arch,
        parallel,
        student_vocab_size=replayed.VOCAB,
        micro_batch_tokens=micro,
        temperature=1.0,
    )
    said = teacher.score(replayed.recorded_rows(), K)
    columns = (
        said.argmax_ids_T,
        said.logprobs_T,
        said.entropy_T,
        said.topk_ids_TK,
        said.topk_logprobs_TK,
    )
    return {name: column.tolist() for name, column in zip(SIGNALS, columns, strict=True)}


if __name__ == "__main__":
    sys.exit(measure(LAYOUTS, signals))

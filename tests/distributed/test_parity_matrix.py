"""Three TGPO steps on every layout, dense and with experts: losses, gradient norms and every
parameter are those of one
process. And a run saved on one layout goes on on another as if nothing had happened.

The table is printed at the end of the test run.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import test_layout_invariance as replayed
from tests.tiny_config import tiny_config

STEPS, SAVED_AFTER = 3, 2
# relative: of a number, and of the norm of a tensor's difference to the norm of the tensor
TOLERANCE = 2e-6
# processes -> (name, keys of LayoutConfig but for the sizes of 1, recompute_granularity); data
# parallelism is the rest
Row = tuple[str, dict[str, Any], str]
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP2 = TP2 | {"sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
CP2: dict[str, Any] = {"context_parallel_size": 2}
ETP2: dict[str, Any] = {"expert_tensor_parallel_size": 2}
LAYOUTS: dict[int, list[Row]] = {
    4: [
        ("TP2+SP x PP2", SP2 | PP2, "none"),
        ("TP2+SP x PP2 x EP2", SP2 | PP2 | EP2, "none"),
        ("TP2+SP x PP2 x VPP2, recompute full", SP2 | VPP2, "full"),
        ("PP2 x DP2 x EP2", PP2 | EP2, "none"),
        ("TP2+SP x CP2", SP2 | CP2, "none"),
        ("PP2 x CP2 x EP2", PP2 | CP2 | EP2, "none"),
        ("CP2 x DP2", CP2, "none"),
        ("TP2+SP x EP2 x ETP2", SP2 | EP2 | ETP2, "none"),
    ],
    2: [
        ("TP2", TP2, "none"),
        ("TP2+SP", SP2, "none"),
        ("TP2+SP x EP2", SP2 | EP2, "none"),
        ("TP2+SP x ETP2", SP2 | ETP2, "none"),
        ("PP2", PP2, "none"),
        ("PP2 x VPP2", VPP2, "none"),
        ("DP2", {}, "none"),
        ("EP2 (DP2)", EP2, "none"),
        ("ETP2 (DP2), recompute selective", ETP2, "selective"),
        ("DP2, recompute selective", {}, "selective"),
        ("CP2", CP2, "none"),
        ("CP2 x EP2, recompute full", CP2 | EP2, "full"),
    ],
    1: [("TP1", {}, "none"), ("TP1, recompute full", {}, "full")],
}
# (saved on 4 processes by, processes, goes on there as)
RESHARDED = [
    ("TP2+SP x PP2", 2, "DP2", {}),
    ("TP2+SP x PP2", 1, "TP1", {}),
    ("TP2+SP x PP2", 2, "PP2 x VPP2", VPP2),
    ("TP2+SP x PP2 x EP2", 2, "DP2", {}),
    ("TP2+SP x PP2 x EP2", 1, "TP1", {}),
    ("PP2 x DP2 x EP2", 2, "TP2+SP x EP2", SP2 | EP2),
    ("TP2+SP x PP2", 2, "CP2", CP2),
    ("CP2 x DP2", 2, "TP2+SP", SP2),
    ("PP2 x DP2 x EP2", 2, "TP2+SP x ETP2", SP2 | ETP2),
    ("TP2+SP x EP2 x ETP2", 2, "EP2 (DP2)", EP2),
]
KINDS = ("dense", "MoE")


def applies(kind: str, keys: dict[str, Any]) -> bool:
    """Experts can be spread only where there are some; with them, Megatron trains TP with sequence
    parallelism only."""
    if kind == "dense":
        return not any(key.startswith("expert") for key in keys)
    return "tensor_model_parallel_size" not in keys or "sequence_parallel" in keys


CASES = [
    (kind, name)
    for rows in LAYOUTS.values()
    for name, keys, _ in rows
    for kind in KINDS
    if applies(kind, keys)
]
CASES += [
    (kind, f"{saved} -> {name}")
    for saved, _, name, keys in RESHARDED
    for kind in KINDS
    if applies(kind, keys) and applies(kind, EP2 if "EP2" in saved else {})
]


def make_models(directory: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": replayed.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)).save_pretrained(
        directory / "dense"
    )
    moe = Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False)
    Qwen3MoeForCausalLM(moe).save_pretrained(directory / "MoE")
    Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=False)).save_pretrained(
        directory / "teacher"
    )


# ---------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def results(run_distributed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    make_models(directory)
    out = {}
    for nproc in LAYOUTS:
        run_distributed(__file__, nproc, directory, timeout=280)
        for path in directory.glob(f"{nproc}-*.pt"):
            case = torch.load(path)
            out[case["kind"], case["name"]] = case
    for kind in KINDS:
        out[kind, "start"] = load_file(directory / kind / "model.safetensors")
    return out


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_three_steps_are_those_of_one_process(results, record_property, kind, name):
    got, want = results[kind, name], results[kind, "TP1"]
    errors = {"loss": 0.0, "norm": 0.0, "parameters": 0.0}
    done = range(STEPS)[-len(got["loss"]) :]  # a resumed run has made the last steps only
    for key in ("loss", "norm"):
        for value, step in zip(got[key], done, strict=True):
            errors[key] = max(errors[key], abs(value - want[key][step]) / abs(want[key][step]))
    assert got["parameters"].keys() == want["parameters"].keys()
    for tensor, value in want["parameters"].items():
        difference = (got["parameters"][tensor] - value).norm() / value.norm()
        errors["parameters"] = max(errors["parameters"], difference.item())
    record_property("parity", (kind, name, errors))
    assert max(errors.values()) <= TOLERANCE, errors


def test_the_steps_have_moved_the_parameters(results):
    """Or else equality would say little: each tensor is further from its start than the tolerance
    by far."""
    for kind in KINDS:
        start = results[kind, "start"]
        for name, value in results[kind, "TP1"]["parameters"].items():
            assert (value - start[name]).norm() / start[name].norm() > 100 * TOLERANCE, name


# -------------------------------------------------------------------------------------- the program
class Case:
    """One student on one layout, and the teacher's signals."""

    def __init__(
        self, directory: Path, kind: str, keys: dict[str, Any], recompute: str = "none"
    ) -> None:
        from megatron_opd.architectures.config import LayoutConfig
        from megatron_opd.contracts.signals import Signals
        from megatron_opd.objective.loss import Objective
        from megatron_opd.teacher.score import MegatronTeacher
        from megatron_opd.trainer.step import Trainer
        from megatron_opd.trainer.student import prepare

        layout = LayoutConfig(**keys)
        self.rows = replayed.recorded_rows()
        dense = {key: value for key, value in keys.items() if not key.startswith("expert")}
        teacher = MegatronTeacher(
            *replayed.load_model(directory / "teacher", LayoutConfig(**dense)),
            student_vocab_size=replayed.VOCAB, micro_batch_tokens=60, temperature=1.0,
        )  # fmt: skip
        self.signals = Signals(teacher.score(self.rows))
        # A large epsilon: where a gradient is mere rounding, Adam would make a whole step of its
        # sign.
        config = tiny_config(
            1e-2,
            layout,
            adam_eps=1e-3,
            weight_decay=0.1,
            num_steps=STEPS,
            method=replayed.method_of("tgpo"),
        )
        chunks, arch, parallel = replayed.load_model(directory / kind, layout, recompute)
        self.student, self.method = prepare(chunks, arch, parallel, config), config.method
        objective = Objective(config.method, arch.vocab_size, 1.0)
        self.trainer = Trainer(
            self.student,
            objective,
            updates_per_step=1,
            micro_batch_tokens=60,
            temperature=1.0,
            max_skipped=0,
        )

    def step(self, step: int) -> dict[str, float]:
        from functools import partial

        from megatron_opd.objective.loss import finish

        columns = partial(replayed.columns_of, self.method, self.rows, self.signals, step)
        (update,) = self.trainer.step(self.rows, columns, step=step)
        return finish(update)

    def write(self, directory: Path, kind: str, name: str, updates: list[dict[str, float]]) -> None:
        """Collective. What the tests compare."""
        from megatron_opd.weights.export import iter_hf_tensors

        student = self.student
        stream = iter_hf_tensors(student.bare_chunks, student.arch, student.parallel)
        parameters = {tensor: value.clone() for tensor, value in stream}
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if rank == 0:
            out = {
                "kind": kind, "name": name, "parameters": parameters,
                "loss": [update["train/loss"] for update in updates],
                "norm": [update["train/grad_norm"] for update in updates],
            }  # fmt: skip
            torch.save(out, directory / f"{world}-{kind}-{name}.pt")


def main() -> int:
    from megatron_opd.trainer import checkpoint
    from megatron_opd.world import processes

    directory = Path(sys.argv[1])
    processes.start()
    world = torch.distributed.get_world_size()
    for kind in KINDS:
        for name, keys, recompute in LAYOUTS[world]:
            if not applies(kind, keys):
                continue
            case, updates = Case(directory, kind, keys, recompute), []
            for step in range(STEPS):
                updates.append(case.step(step))
                if step + 1 == SAVED_AFTER and any(saved == name for saved, *_ in RESHARDED):
                    checkpoint.save(
                        directory / f"saved-{kind}-{name}",
                        SAVED_AFTER,
                        {"model": case.student},
                        {},
                        keep=1,
                    )
            case.write(directory, kind, name, updates)
        for saved, nproc, name, keys in RESHARDED:
            found = list((directory / f"saved-{kind}-{saved}").glob("step-*"))
            if nproc != world or not found or not applies(kind, keys):
                continue
            case = Case(directory, kind, keys)
            checkpoint.load(found[0], {"model": case.student})
            case.write(
                directory,
                kind,
                f"{saved} -> {name}",
                [case.step(step) for step in range(SAVED_AFTER, STEPS)],
            )
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

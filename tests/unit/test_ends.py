"""Which tokens end a response, and what a teacher says whose ends are not the student's."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_opd.architectures.ends import Ends, merged_ends, read_ends
from megatron_opd.checks.recipe import preflight
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.signals import Signals
from megatron_opd.errors import DataError
from megatron_opd.evaluation.traces import with_students_end
from megatron_opd.mcore.head import Head
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.data import DataConfig, TemplateConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.tasks.data import load_tasks
from megatron_opd.tasks.tokenizer import ends_of, load_tokenizer
from megatron_opd.vocab_parallel import linear_topk, merge_logits, rows_of
from megatron_opd.weights.hf import write_ends
from tests.rows import row
from tests.unit.categorical import OnLogits
from tests.unit.tiny_model_files import TOKENS, write_model, write_recipe

MERGED = MergedIds((2, 9), 7)
V, D, T = 11, 6, 5


def configure(directory: Path, eos: object, name: str = "generation_config.json") -> Path:
    path = directory / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": eos}))
    return directory


# ---------------------------------------------------------------------------------- a model's files
def test_ends_are_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    assert read_ends(model) == Ends((0,), 0)
    assert read_ends(configure(model, 5, "config.json")) == Ends((0, 5), 0)
    # config.json is not asked any more
    assert read_ends(configure(model, [3, 0])) == Ends((0, 3), 0)
    assert read_ends(configure(model, [3, 99])) == Ends((0, 3), 0)  # the model has no row 99
    (model / "tokenizer_config.json").write_text('{"eos_token": {"content": "3"}}')
    assert read_ends(configure(model, 2)) == Ends((2, 5), 5)
    (model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')  # no token
    assert read_ends(model) == Ends((2,), 2)


@pytest.mark.parametrize("eos", ["2", True, -1, [2, "3"], {"a": 1}])
def test_an_end_that_is_no_id_is_named(tmp_path: Path, eos: object) -> None:
    model = configure(write_model(tmp_path / "m"), eos)
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id: must be"):
        read_ends(model)


def test_a_student_that_never_stops_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "student" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"student: names no token that ends a response; set eos_token"
    ):
        preflight(load_config(str(path)), world_size=1)


def test_a_teachers_own_ends_become_the_students(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "student"), write_model(tmp_path / "teacher")
    assert merged_ends(student, teacher) is None
    configure(teacher, [4, 0, 3])
    assert merged_ends(student, teacher) == MergedIds((3, 4), 0)
    configure(student, [3, 4, 5])
    assert merged_ends(student, teacher) is None  # the student stops at all of the teacher's


def test_a_base_student_of_a_chat_teacher(tmp_path: Path) -> None:
    """TGPO's own pair: one vocabulary, <|endoftext|> here and <|im_end|> there, and sets of ends
    that overlap."""
    path = write_recipe(tmp_path)
    for role, eos, configured in (("student", "2", 4), ("teacher", "3", [5, 4])):  # ids 4 and 5
        (tmp_path / role / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        configure(tmp_path / role, configured)
    assert merged_ends(tmp_path / "student", tmp_path / "teacher") == MergedIds((5,), 4)
    assert preflight(load_config(str(path)), world_size=1) == [
        "teacher.path: ends a response with '3' (5), the student with '2' (4); as the teacher's "
        "tokens the former count as '2' (4)"
    ]


def test_an_end_that_is_no_token_of_the_teachers_cannot_stand_for_its_ends(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", tokens=[*TOKENS, "<end>"])
    (student / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    teacher = write_model(tmp_path / "teacher")
    assert read_ends(student) == Ends((15,), 15)
    assert merged_ends(student, teacher) is None
    assert merged_ends(configure(student, 6), teacher) == MergedIds((0,), 6)
    path = write_recipe(tmp_path)
    (student / "generation_config.json").unlink()
    *_, warning = preflight(load_config(str(path)), world_size=1)
    assert warning.startswith(
        "teacher.path: ends a response with '<eos>' (0), the student with '<end>' (15), no token"
    )


# ------------------------------------------------------------------------------------ in the logits
def teacher_logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)


def dense(logits_TV: torch.Tensor, temperature: float, valid: int) -> torch.Tensor:
    """q' of the logits: probabilities moved, then restricted to the common ids."""
    q_TV = (logits_TV / temperature).softmax(1)
    q_TV[:, MERGED.into] += q_TV[:, list(MERGED.ids)].sum(1)
    q_TV[:, list(MERGED.ids)] = 0
    return q_TV[:, :valid] / q_TV[:, :valid].sum(1, keepdim=True)


# 8: one of the teacher's ends is no id of the student's at all
@pytest.mark.parametrize("valid", [V, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_the_teacher_says_is_of_the_moved_probabilities(
    temperature: float, valid: int
) -> None:
    hidden_TD, weight_VD = teacher_logits()
    q_TV = dense(hidden_TD @ weight_VD.T, temperature, valid)
    ids_TJ = torch.tensor([[7, 2, 0]] * T)
    best = linear_topk(
        hidden_TD,
        weight_VD,
        3,
        None,
        ids_TJ=ids_TJ,
        temperature=temperature,
        valid_vocab_size=valid,
        merged=MERGED,
        slab_tokens=2,
    )
    order = q_TV.sort(dim=1, descending=True)
    assert torch.equal(best.ids_TK, order.indices[:, :3])
    torch.testing.assert_close(
        best.logprobs_TK.double(), order.values[:, :3].log(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        best.logprobs_TJ.double(), q_TV.gather(1, ids_TJ).log(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        best.entropy_T.double(), torch.special.entr(q_TV).sum(1), rtol=1e-6, atol=1e-6
    )


ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def kl(a_TV: torch.Tensor, b_TV: torch.Tensor) -> torch.Tensor:
    return (a_TV * (a_TV.log() - b_TV.log())).sum(1)


DIVERGENCES = {
    "forward_kl": lambda p, q: kl(q, p),
    "reverse_kl": kl,
    "jsd": lambda p, q: 0.3 * kl(q, 0.3 * q + 0.7 * p) + 0.7 * kl(p, 0.3 * q + 0.7 * p),
}


@pytest.mark.parametrize("merged", [MERGED, None])
@pytest.mark.parametrize("rows", [9, 11, 13])  # of the student: the teacher has 11
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_whole_distributions_are_compared_on_the_tokens_of_both(
    kind: str, rows: int, merged: MergedIds | None
) -> None:
    """Value and exact gradient in float64: padding, tokens of one model, ends of the teacher's are
    on neither side."""
    hidden_TD, weight_VD = teacher_logits()
    valid, beta = 8, 0.3 if kind == "jsd" else None
    mine_TD, mine_VD = (
        torch.randn(T, D, dtype=torch.float64),
        torch.randn(rows, D, dtype=torch.float64),
    )
    leaf_TD = mine_TD.clone().requires_grad_()
    student = Head(leaf_TD, mine_VD, ONE_RANK, sums_hidden_grad=True, fused=False)
    teacher = Head(
        hidden_TD, weight_VD, ONE_RANK, sums_hidden_grad=False, fused=False, merged=merged
    )
    settings = {"alpha": None, "beta": beta, "temperature": 0.8, "valid_vocab_size": valid}
    loss_T = student.divergence(teacher, kind=kind, **settings)
    (got,) = torch.autograd.grad(loss_T.sum(), leaf_TD)
    kept = [index for index in range(valid) if not merged or index not in merged.ids]
    reference_TD = mine_TD.clone().requires_grad_()
    p_TV = (reference_TD @ mine_VD[kept].T / 0.8).softmax(1)
    moved_TV = (hidden_TD @ weight_VD.T / 0.8).softmax(1)
    q_TV = dense(hidden_TD @ weight_VD.T, 0.8, valid)[:, kept] if merged else moved_TV[:, kept]
    q_TV = q_TV / q_TV.sum(1, keepdim=True)
    want_T = DIVERGENCES[kind](p_TV, q_TV)
    (want,) = torch.autograd.grad(want_T.sum(), reference_TD)
    torch.testing.assert_close(loss_T.double(), want_T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_tokens_that_one_model_has_are_not_in_the_gradient() -> None:
    """An objective on whole distributions, of a student with two rows more than are shared: they
    used to count."""
    method = CATALOGUE["gkd"].method
    batch = Batch([row([3, 4], finish_reason="length")], Signals(), 0, 0, 2)
    columns = build_columns(method, batch)
    student_TV, teacher_TV = torch.randn(2, 2, 9).unbind()
    with_unshared = student_TV.clone().requires_grad_()
    loss, _ = Objective(method, 9, 1.0, shared_vocab_size=7)(
        OnLogits(with_unshared), columns, 0, lambda: OnLogits(teacher_TV)
    )
    (got,) = torch.autograd.grad(loss, with_unshared)
    shared = student_TV[:, :7].clone().requires_grad_()
    loss, _ = Objective(method, 7, 1.0)(
        OnLogits(shared), columns, 0, lambda: OnLogits(teacher_TV[:, :7].clone())
    )
    (want,) = torch.autograd.grad(loss, shared)
    torch.testing.assert_close(got[:, :7], want)
    assert (got[:, 7:] == 0).all()


def test_nothing_else_changes() -> None:
    hidden_TD, weight_VD = teacher_logits()
    before_TV = hidden_TD @ weight_VD.T
    after_TV = before_TV.clone()
    merge_logits(
        after_TV, hidden_TD, rows_of(weight_VD, MERGED, None), MERGED, first_id=0, temperature=1.7
    )
    others = [index for index in range(V) if index not in (*MERGED.ids, MERGED.into)]
    assert torch.equal(after_TV[:, others], before_TV[:, others])
    torch.testing.assert_close((after_TV / 1.7).logsumexp(1), (before_TV / 1.7).logsumexp(1))


# ---------------------------------------------------------------------------------- traces, exports
def test_traces_end_as_the_student_does(tmp_path: Path) -> None:
    assert with_students_end(np.array([4, 9, 2]), MERGED).tolist() == [4, 9, 7]
    assert with_students_end(np.array([4, 2, 0]), MERGED).tolist() == [4, 2, 0]
    tokenizer = load_tokenizer(configure(write_model(tmp_path / "m"), 5))
    assert ends_of(tokenizer) == Ends((0, 5), 0)
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"problem": "1", "response": text}) + "\n" for text in ("12", "13", "1<eos>")
        )
    )
    data = DataConfig(str(tmp_path / "a.jsonl"), template=TemplateConfig(kind="raw"))
    limits = {
        "max_prompt_tokens": 9,
        "max_sequence_length": 9,
        "need_answer": False,
        "need_trace": True,
    }
    tasks = load_tasks(data.train, data, tokenizer, **limits)
    # "3" is id 5, at which this model's engine stops; others get the tokenizer's EOS.
    assert [p.trace_ids.tolist() for p in tasks if p.trace_ids is not None] == [
        [3, 4, 0],
        [3, 5],
        [3, 0],
    ]


def exported(
    directory: Path, ends: list[int], **files: dict[str, object]
) -> dict[str, object] | None:
    directory.mkdir()
    for name, content in ({"config": {"eos_token_id": 1, "bos_token_id": None}} | files).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    write_ends(directory, ends)
    path = directory / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def test_an_export_stops_at_all_ends(tmp_path: Path) -> None:
    assert exported(tmp_path / "a", [1]) is None  # config.json says it
    assert exported(tmp_path / "b", [0]) == {"eos_token_id": 0}
    assert exported(tmp_path / "c", [0, 1]) == {"eos_token_id": [0, 1]}
    settings: dict[str, object] = {"eos_token_id": 1, "top_p": 0.8}
    assert exported(tmp_path / "d", [0, 1], generation_config=settings) == {
        "eos_token_id": [0, 1],
        "top_p": 0.8,
    }
    both: dict[str, object] = {"eos_token_id": [1, 0]}
    assert exported(tmp_path / "e", [0, 1], generation_config=both) == both

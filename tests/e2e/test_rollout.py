"""A real vLLM engine against transformers: sampling, logprobs, refit and its verification.

Both models share the process one after the other, so `close` is tried as well.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import Parameter

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import Row, Source, Task
from megatron_opd.contracts.sampling import Draw, Request, Sampling
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.recipe.keys import RolloutConfig
from megatron_opd.refit.push import push
from megatron_opd.rollout.mixture import Mixture
from megatron_opd.rollout.prefix import prefix_of
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.weights.probes import make_probes
from tests.e2e import tiny_hf

pytestmark = pytest.mark.slow
NamedTensors = Iterable[tuple[str, torch.Tensor]]
CONFIG = RolloutConfig(kv_cache_gib=0.0625)
DRAW = Draw(seed=5, step=0, version=0, samples=4, max_tokens=32, temperature=1.0)


@dataclass
class Student:
    """An engine and the transformers model with the weights it was last given."""

    engine: VllmEngine
    model: Any
    version: int = 0

    def generate(
        self, tasks: list[Task], prefix: PrefixConfig | None = None, **changes: Any
    ) -> list[Row]:
        tokenizer = self.engine._llm.get_tokenizer()
        draw = replace(DRAW, version=self.version, **changes)
        return SingleTurn(self.engine, tokenizer, prefix).sample(tasks, draw)

    def refit(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
        """Changes the transformers model in place, then pushes it."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(change(name, parameter))
        self.version += 1
        return push(tiny_hf.tensors(self.model), self.engine, self.version)


@pytest.fixture(scope="module", params=["qwen3", "qwen2-tied"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Student]:
    model_type, _, tied = request.param.partition("-")
    model = tiny_hf.build(model_type, seed=0, tied=bool(tied))
    directory = tiny_hf.write(model, tmp_path_factory.mktemp("model"))
    engine = VllmEngine(
        ModelConfig(str(directory)), CONFIG, precision="float32", max_sequence_length=300, seed=0
    )
    yield Student(engine, model)
    engine.close()
    assert not torch.distributed.is_initialized()


def assert_same(ours: list[Row], theirs: list[Row], logprob_atol: float) -> None:
    assert [(r.task.index, r.sample) for r in ours] == [(r.task.index, r.sample) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=logprob_atol)


def assert_logprobs_of(
    model: Any, rows: list[Row], temperature: float = 1.0, top_p: float = 1.0
) -> None:
    for row in rows:
        expected = tiny_hf.logprobs(model, row, temperature, top_p)
        np.testing.assert_allclose(row.logprobs, expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    student: Student, temperature: float, top_p: float
) -> None:
    rows = student.generate(tiny_hf.tasks(3, 40, 200), temperature=temperature, top_p=top_p)
    assert len(rows) == 12 and sum(r.num_tokens for r in rows) > 60
    assert_logprobs_of(student.model, rows, temperature, top_p)


def test_temperature_zero_is_greedy(student: Student) -> None:
    tasks = tiny_hf.tasks(5, 30)
    for row in student.generate(tasks, samples=1, temperature=0.0):
        token_ids = np.concatenate([row.prompt_ids, row.token_ids]).astype(np.int64)
        with torch.no_grad():
            logits_TV = student.model(torch.from_numpy(token_ids)[None]).logits[0]
        greedy = logits_TV.argmax(-1)[len(row.prompt_ids) - 1 : -1]
        assert row.token_ids.tolist() == greedy.tolist()
        assert_logprobs_of(student.model, [row])


def test_a_completion_ends_with_eos_or_at_the_limit(student: Student) -> None:
    rows = student.generate(tiny_hf.tasks(4, 9), samples=32, max_tokens=24)
    assert {r.finish_reason for r in rows} == {"stop", "length"}
    for row in rows:
        ends = row.token_ids == tiny_hf.EOS_ID
        assert not ends[:-1].any()
        assert ends[-1] == (row.finish_reason == "stop")
        assert row.finish_reason == "stop" or row.num_tokens == 24
        words = [f"w{i}" for i in row.token_ids if i not in tiny_hf.SPECIAL_IDS]
        assert row.text.replace(" ", "") == "".join(words)
        assert len(row.logprobs) == row.num_tokens and row.version == student.version


def test_a_stop_word_ends_a_completion_and_is_a_part_of_it(student: Student) -> None:
    """Tokens and logprobs are those without stop words, up to the one that completes a word."""
    tasks = tiny_hf.tasks(4, 9)
    whole = student.generate(tasks, samples=32)
    stop = ("w5", "w7")  # w50 begins with a stop word: the text decides, not the token
    rows = student.generate(tasks, samples=32, stop=stop)
    stopped = 0
    for row, other in zip(rows, whole, strict=True):
        here = [any(word in f"w{i}" for word in stop) for i in other.token_ids]
        if any(here):
            stopped += 1
            last = here.index(True)
            assert row.token_ids.tolist() == other.token_ids[: last + 1].tolist()
            assert row.finish_reason == "stop" and row.text.endswith(f"w{row.token_ids[-1]}")
            assert row.end_T[-1] and not row.truncated
        else:
            assert row.token_ids.tolist() == other.token_ids.tolist()
            assert (row.finish_reason, row.text) == (other.finish_reason, other.text)
    assert stopped > 10
    assert_logprobs_of(student.model, rows)


def test_sampling_stops_at_every_end_of_the_model(tmp_path: Path) -> None:
    """The tokenizer's, which vLLM knows by itself, those of the generation config, and further
    ones."""
    directory = tiny_hf.write(tiny_hf.build("qwen3", seed=0), tmp_path / "model")
    tiny_hf.set_ends(directory, [5, 7])
    engine = VllmEngine(
        ModelConfig(str(directory)),
        CONFIG,
        precision="float32",
        max_sequence_length=300,
        seed=0,
        further_ends=(11,),
    )
    try:
        rows = Student(engine, None).generate(tiny_hf.tasks(4, 9), samples=64)
    finally:
        engine.close()
    stopped = [r for r in rows if r.finish_reason == "stop"]
    assert {r.token_ids[-1] for r in stopped} == {tiny_hf.EOS_ID, 5, 7, 11}
    for row in rows:
        ends = np.isin(row.token_ids, [tiny_hf.EOS_ID, 5, 7, 11])
        assert not ends[:-1].any() and ends[-1] == (row.finish_reason == "stop")
        assert not {"w5", "w7", "w11"} & set(row.text.split())  # an end is not written


def test_a_completion_may_begin_with_given_tokens(student: Student) -> None:
    traces = [np.arange(5, 25, dtype=np.int32), np.array([5], np.int32)]
    tasks = [
        replace(task, trace_ids=trace)
        for task, trace in zip(tiny_hf.tasks(4, 9), traces, strict=True)
    ]
    law = PrefixConfig(steps=10, law="uniform")
    rows = student.generate(tasks, law)
    assert len({row.num_given for row in rows[:4]}) > 1
    assert not any(row.num_given for row in rows[4:])  # one token is the student's
    for row in rows:
        prefix = prefix_of(law, row.task, row.sample, replace(DRAW, version=student.version))
        assert (
            row.num_given == len(prefix)
            and row.token_ids[: len(prefix)].tolist() == prefix.tolist()
        )
        assert (row.logprobs[: len(prefix)] == 0).all() and len(row.logprobs) == row.num_tokens
        assert len(prefix) < row.num_tokens <= 32
        expected = tiny_hf.logprobs(student.model, row, 1.0, 1.0)[len(prefix) :]
        np.testing.assert_allclose(row.logprobs[len(prefix) :], expected, rtol=0, atol=1e-4)


def test_prompt_and_completion_fit_the_sequence_length(student: Student) -> None:
    rows = student.generate(tiny_hf.tasks(295), samples=16)
    assert max(r.num_tokens for r in rows) == 5
    with pytest.raises(RunError, match="prompt 0 has 300 tokens"):
        student.generate(tiny_hf.tasks(300))


def test_the_same_call_gives_the_same_bits(student: Student) -> None:
    tasks = tiny_hf.tasks(6, 150, 151)
    torch.manual_seed(3)
    first = student.generate(tasks)
    state = torch.get_rng_state()
    assert_same(student.generate(tasks), first, logprob_atol=0)
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's generator is left alone
    for change in ({"seed": 6}, {"step": 1}):
        assert [r.text for r in student.generate(tasks, **change)] != [r.text for r in first]


def test_samples_do_not_depend_on_how_prompts_are_split(student: Student) -> None:
    tasks = tiny_hf.tasks(6, 150, 151, 20)
    together = student.generate(tasks)
    assert len({r.text for r in together}) == len(together)
    apart = student.generate(tasks[:1]) + student.generate(tasks[1:])
    assert_same(apart, together, logprob_atol=1e-5)


def requests_of(student: Student, tasks: list[Task]) -> list[tuple[Request, Sampling]]:
    sampling = Sampling(student.version, 1.0)
    drawn = []
    for task in tasks:
        for sample in range(DRAW.samples):
            seed = request_seed(DRAW.seed, DRAW.step, task.index, sample)
            drawn.append((Request(task, task.prompt_ids, DRAW.max_tokens, seed), sampling))
    return drawn


def test_a_stream_gives_every_completion_as_it_ends_and_takes_requests_for_free_places(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tiny_hf.tasks(6, 150, 151, 20)
    expected = student.generate(tasks)
    drawn = requests_of(student, tasks)
    # the first may be long, and others end before it
    drawn[1:] = [(replace(request, max_tokens=5), sampling) for request, sampling in drawn[1:]]
    number_of = {id(request): number for number, (request, _) in enumerate(drawn)}
    scheduler = student.engine._llm.llm_engine.vllm_config.scheduler_config
    monkeypatch.setattr(scheduler, "max_num_seqs", 3)
    taken = []

    def queue() -> Iterator[tuple[Request, Sampling]]:
        for pair in drawn:
            taken.append(pair)
            yield pair

    ended = []
    for request, completion in student.engine.stream(queue()):
        assert len(taken) - len(ended) <= 3
        ended.append(number_of[id(request)])
        whole = expected[ended[-1]].token_ids.tolist()
        assert completion.token_ids == whole[: request.max_tokens]
    assert sorted(ended) == list(range(len(drawn)))
    assert ended[0] != 0 or len(expected[0].token_ids) <= 5


def test_a_stream_that_nobody_reads_on_leaves_nothing_behind(student: Student) -> None:
    tasks = tiny_hf.tasks(6, 7)
    before = student.generate(tasks)
    stream = student.engine.stream(iter(requests_of(student, tasks)))
    next(stream)
    stream.close()
    assert_same(student.generate(tasks), before, logprob_atol=0)


def test_prompts_of_more_tokens_than_a_step_takes(student: Student) -> None:
    """64 x 4 samples of 60 tokens are 15,360: no prompt is cut, which a seeded request on a CPU
    does not survive."""
    tasks = tiny_hf.tasks(*[60] * 64)
    together = student.generate(tasks, max_tokens=4)
    assert_same(
        student.generate(tasks[40:41], max_tokens=4),
        together[160:164],
        logprob_atol=1e-5,
    )


def test_a_prompt_that_is_drawn_again_gets_further_samples(student: Student) -> None:
    (task,) = tiny_hf.tasks(20)
    eight = student.generate([task], samples=8)
    again = student.generate([task, replace(task, first_sample=4)])
    assert_same(again, eight, logprob_atol=1e-5)


def test_a_call_that_is_interrupted_leaves_nothing_behind(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tiny_hf.tasks(6, 7)
    before = student.generate(tasks)
    step, calls = student.engine._llm.llm_engine.step, iter(range(100))

    def interrupted() -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(student.engine._llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            student.generate(tasks)
    assert_same(student.generate(tasks), before, logprob_atol=0)


def test_a_step_that_fails_is_one_line(
    student: Student, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the input, which vLLM would write to the console, and the engine goes on."""
    executor = student.engine._llm.llm_engine.model_executor
    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute_model", lambda *_, **__: 1 // 0)
        with pytest.raises(RunError, match="vLLM failed while generating: ZeroDivisionError"):
            student.generate(tiny_hf.tasks(3, 140))
    assert "scheduler output" not in "".join(capfd.readouterr())
    assert_logprobs_of(student.model, student.generate(tiny_hf.tasks(3, 140)))


def test_an_engine_that_cannot_wake_is_one_line(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = make_probes(8, 0, torch.device("cpu"))
    for name, work in {
        "reading model.norm.weight": lambda: student.engine.project("model.norm.weight", probes),
        "generating": lambda: student.generate(tiny_hf.tasks(3, 140)),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(student.engine, "_asleep", True)
            patch.setattr(student.engine._llm, "wake_up", lambda: 1 // 0)
            with pytest.raises(RunError, match=f"vLLM failed while {name}: ZeroDivisionError"):
                work()


def test_no_prompts_no_rollouts(student: Student) -> None:
    assert student.generate([]) == []


def test_a_sequence_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    directory = tiny_hf.write(tiny_hf.build("qwen3", seed=0), tmp_path)
    with pytest.raises(ConfigError, match="max_sequence_length=513"):
        VllmEngine(
            ModelConfig(str(directory)),
            CONFIG,
            precision="float32",
            max_sequence_length=513,
            seed=0,
        )


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip
# Another attention factor than the one that goes with the factor; vLLM does not read it under this
# name.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 160,
    "attention_factor": 1.6,
}


@pytest.mark.parametrize(
    ("model_type", "scaling", "spelling"),  # of transformers 4 and 5
    [
        ("qwen2", {}, "rope_theta"),
        ("llama", LLAMA3, "rope_scaling"),
        ("qwen3", YARN, "rope_parameters"),
    ],
)
def test_a_recipe_may_change_the_rotary_base_and_the_context(
    model_type: str, scaling: dict, spelling: str, tmp_path: Path
) -> None:
    directory = tiny_hf.write(tiny_hf.build(model_type, seed=0, rope=scaling), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = (
        {"rope_parameters": rope}
        if spelling == "rope_parameters"
        else {"rope_theta": rope.pop("rope_theta")}
    )
    old |= {"rope_scaling": rope} if spelling == "rope_scaling" else {}
    (directory / "config.json").write_text(json.dumps(config | old))
    changed = ModelConfig(str(directory), rope_theta=30.0, max_position_embeddings=700)
    engine = VllmEngine(changed, CONFIG, precision="float32", max_sequence_length=600, seed=0)
    try:
        rows = Student(engine, None).generate(tiny_hf.tasks(3, 560), samples=1)
    finally:
        engine.close()
    expected = transformers.AutoConfig.from_pretrained(directory)
    expected.rope_parameters["rope_theta"] = 30.0
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, config=expected)
    assert_logprobs_of(model, rows)
    unscaled = {"rope_type": "default", "rope_theta": 30.0}
    for other in [transformers.AutoConfig.from_pretrained(directory).rope_parameters] + [
        unscaled
    ] * bool(scaling):
        expected.rope_parameters = other
        with pytest.raises(AssertionError):  # or base and scaling make no difference here
            assert_logprobs_of(
                transformers.AutoModelForCausalLM.from_pretrained(directory, config=expected),
                rows,
            )


def test_an_engine_in_float16_takes_new_weights_and_samples_from_them(tmp_path: Path) -> None:
    model = tiny_hf.build("qwen3", seed=0)
    directory = tiny_hf.write(model, tmp_path)
    engine = VllmEngine(
        ModelConfig(str(directory)), CONFIG, precision="float16", max_sequence_length=300, seed=0
    )
    student = Student(engine, model)
    try:
        report = student.refit(
            lambda name, parameter: (parameter + 0.01 * parameter.sign()).half().float()
        )
        rows = student.generate(tiny_hf.tasks(3, 40, 200))
    finally:
        engine.close()
    assert report.max_error < 1e-3 and len(rows) == 12
    for row in rows:  # some twenty operations of a layer, each rounded to 2**-11
        np.testing.assert_allclose(
            row.logprobs, tiny_hf.logprobs(model, row, 1.0, 1.0), rtol=0, atol=0.03
        )


# ----------------------------------------------------------------------------- the teacher's tokens
def test_tokens_of_a_mixture_come_from_both_models(tmp_path: Path) -> None:
    """Two engines in one process; a token is likelier under the model whose turn it was."""
    models = {"student": tiny_hf.build("qwen3", seed=0), "teacher": tiny_hf.build("qwen2", seed=1)}
    engines = []
    for name, model in models.items():
        directory = ModelConfig(str(tiny_hf.write(model, tmp_path / name)))
        engines.append(
            VllmEngine(directory, CONFIG, precision="float32", max_sequence_length=300, seed=0)
        )
    student, teacher = engines
    tokenizer = student._llm.get_tokenizer()
    draw = replace(DRAW, step=3, samples=64, max_tokens=12)
    mixture = Mixture(student, teacher, tokenizer, teacher_share=0.3)
    try:
        rows = mixture.sample(tiny_hf.tasks(3, 40), draw)
        again = mixture.sample(tiny_hf.tasks(3, 40), draw)
        alone = mixture.sample(tiny_hf.tasks(3, 40)[1:], draw)
        none = Mixture(student, teacher, tokenizer, teacher_share=0.0).sample(
            tiny_hf.tasks(3), draw
        )
    finally:
        teacher.close(groups_too=False)
        student.close()
    assert_same(again, rows, logprob_atol=0)
    assert_same(alone, rows[64:], logprob_atol=1e-5)
    assert not any(r.sources.any() for r in none)
    by_teacher = np.concatenate([r.sources == Source.TEACHER for r in rows])
    assert abs(by_teacher.mean() - 0.3) < 4 * (0.21 / len(by_teacher)) ** 0.5
    of = {
        name: [tiny_hf.logprobs(model, r, 1.0, 1.0) for r in rows] for name, model in models.items()
    }
    for row, expected in zip(rows, of["student"], strict=True):
        np.testing.assert_allclose(
            row.logprobs, np.where(row.sources == Source.TEACHER, 0, expected), rtol=0, atol=1e-4
        )
        ends = row.token_ids == tiny_hf.EOS_ID
        assert not ends[:-1].any() and ends[-1] == (row.finish_reason == "stop")
        assert row.finish_reason == "stop" or row.num_tokens == 12
    ours, theirs = (np.concatenate(of[name]) for name in models)
    # A token is likelier under the model that drew it.
    assert theirs[by_teacher].mean() > ours[by_teacher].mean() + 0.5
    assert ours[~by_teacher].mean() > theirs[~by_teacher].mean() + 0.5


def test_the_first_token_of_a_mixture_has_its_frequencies(tmp_path: Path) -> None:
    """Also where the teacher has an end of its own, which becomes the student's."""
    models = [tiny_hf.build("qwen3", seed=0), tiny_hf.build("qwen3", seed=1)]
    engines = [
        VllmEngine(
            ModelConfig(str(tiny_hf.write(model, tmp_path / str(i)))),
            CONFIG,
            precision="float32",
            max_sequence_length=300,
            seed=0,
        )
        for i, model in enumerate(models)
    ]
    (task,) = tiny_hf.tasks(9)
    with torch.no_grad():
        context = torch.from_numpy(task.prompt_ids.astype(np.int64))[None]
        student, teacher = (model(context).logits[0, -1].softmax(0).numpy() for model in models)
    likely = int(teacher.argmax())
    tokenizer = engines[0]._llm.get_tokenizer()
    draw = replace(DRAW, seed=1, samples=4000, max_tokens=1)
    merged = MergedIds((likely,), tiny_hf.EOS_ID)
    try:
        rows = Mixture(*engines, tokenizer, teacher_share=0.4).sample([task], draw)
        ended = Mixture(*engines, tokenizer, 0.4, merged).sample([task], draw)
    finally:
        engines[1].close(groups_too=False)
        engines[0].close()
    for plain, moved in zip(rows, ended, strict=True):
        becomes_end = plain.sources[0] == Source.TEACHER and plain.token_ids[0] == likely
        assert moved.token_ids[0] == (tiny_hf.EOS_ID if becomes_end else plain.token_ids[0])
    assert sum(plain.token_ids[0] == likely for plain in rows) > 100
    mixture = 0.6 * student + 0.4 * teacher
    drawn = np.bincount([r.token_ids[0] for r in rows], minlength=len(mixture))

    def chi_squared(probabilities: np.ndarray) -> float:
        expected = len(rows) * probabilities
        return float(((drawn - expected) ** 2 / expected).sum())

    # 95 degrees of freedom: mean 95, deviation 14.
    assert chi_squared(mixture) < 95 + 5 * 14
    assert min(chi_squared(student), chi_squared(teacher)) > 95 + 20 * 14


# -------------------------------------------------------------------------------------------- refit
def test_refit_changes_the_policy(student: Student) -> None:
    tasks = tiny_hf.tasks(3, 290)  # longer than two blocks of the prefix cache
    before = student.generate(tasks)
    noise = torch.Generator().manual_seed(student.version)
    report = student.refit(lambda _, old: old + 0.05 * torch.randn(old.shape, generator=noise))
    parameters = list(student.model.parameters())
    assert (report.tensors, report.bytes) == (len(parameters), sum(p.nbytes for p in parameters))
    assert 0 <= report.max_error < 1e-5
    after = student.generate(tasks)
    assert_logprobs_of(student.model, after)
    with pytest.raises(AssertionError):
        assert_logprobs_of(student.model, before)
    with pytest.raises(RunError, match="policy version"):
        replace(student, version=0).generate(tasks)


def test_an_engine_without_weights_takes_nothing_less_than_all_of_them(tmp_path: Path) -> None:
    """As in a run: only config and tokenizer are there to read, and nothing is sampled before the
    trainer's weights."""
    model = tiny_hf.build("qwen2", seed=0)
    directory = tiny_hf.write(model, tmp_path)
    (directory / "model.safetensors").unlink()
    settings = dict(precision="float32", max_sequence_length=300, seed=0, empty=True)
    engine = VllmEngine(ModelConfig(str(directory)), CONFIG, **settings)
    student = Student(engine, model)
    try:
        for _ in ("new", "restarted"):
            with pytest.raises(RunError, match="version 0 asked of an engine that holds None"):
                student.generate(tiny_hf.tasks(3))
            lost, *sent = tiny_hf.tensors(model)
            with pytest.raises(RunError, match=f"1 tensors did not arrive, first {lost[0]}"):
                push(iter(sent), engine, 0)
            with pytest.raises(RunError, match="version 0 asked of an engine that holds None"):
                student.generate(tiny_hf.tasks(3))
            push(tiny_hf.tensors(model), engine, 0)
            assert_logprobs_of(model, student.generate(tiny_hf.tasks(3, 140)))
            engine.restart()
    finally:
        engine.close()


class Tampered:
    """The engine behind a link that changes tensors after the sender has seen them."""

    def __init__(self, engine: VllmEngine, change: Callable[[dict], dict]) -> None:
        self._engine = engine
        self._change = change
        self.dtype = engine.dtype
        self.policy_version: int | None = None
        self.project = engine.project

    def reload(self, named_tensors: NamedTensors) -> None:
        self._engine.reload(self._change(dict(named_tensors)).items())


def swapped(first: str, second: str) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {first: tensors[second], second: tensors[first]}


def replaced(others: dict[str, torch.Tensor]) -> Callable[[dict], dict]:
    return lambda tensors: tensors | others


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("first", "second"),
    [("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
)
def test_swapped_tensors_are_found(student: Student, first: str, second: str) -> None:
    first, second = f"{LAYER}.{first}.weight", f"{LAYER}.{second}.weight"
    tampered = Tampered(student.engine, swapped(first, second))
    with pytest.raises(RunError, match=f"{first}|{second}"):
        push(tiny_hf.tensors(student.model), tampered, student.version + 1)
    assert tampered.policy_version is None
    with pytest.raises(RunError, match="holds None"):
        student.generate(tiny_hf.tasks(3))
    student.refit(lambda _, old: old)
    assert_logprobs_of(student.model, student.generate(tiny_hf.tasks(3, 140)))


def test_every_tensor_of_the_previous_version_is_found(student: Student) -> None:
    """The update is as small as an optimizer step of learning rate 1e-6."""
    student.refit(lambda _, old: old)
    previous = {name: tensor.detach().clone() for name, tensor in tiny_hf.tensors(student.model)}
    updated = [
        (name, Parameter(tensor + 1e-6 * torch.sign(tensor))) for name, tensor in previous.items()
    ]
    for stale in previous:
        tampered = Tampered(student.engine, replaced({stale: previous[stale]}))
        with pytest.raises(RunError, match=f"{stale} in vLLM is not"):
            push(iter(updated), tampered, student.version + 1)
    student.refit(lambda _, old: old)


@pytest.mark.parametrize(
    "lost", ["lm_head.weight", f"{LAYER}.self_attn.k_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(student: Student, lost: str) -> None:
    if lost not in dict(tiny_hf.tensors(student.model)):
        lost = "model.embed_tokens.weight"  # the tied model's output layer
    sent = ((name, tensor) for name, tensor in tiny_hf.tensors(student.model) if name != lost)
    with pytest.raises(RunError, match=f"1 tensors did not arrive, first {lost}"):
        push(sent, student.engine, student.version + 1)
    student.refit(lambda _, old: old)
    assert_logprobs_of(student.model, student.generate(tiny_hf.tasks(3, 140)))


@pytest.mark.parametrize(
    "wrong", [("model.extra.weight", torch.ones(3)), (f"{LAYER}.mlp.up_proj.weight", torch.ones(3))]
)
def test_an_unknown_tensor_is_named_and_the_rest_is_read(
    student: Student, wrong: tuple[str, torch.Tensor]
) -> None:
    sent = iter([wrong, *tiny_hf.tensors(student.model)])
    with pytest.raises(RunError, match=wrong[0]):
        push(sent, student.engine, student.version + 1)
    assert next(sent, None) is None
    student.refit(lambda _, old: old)


def test_a_sender_that_fails_leaves_an_engine_that_can_be_refitted(student: Student) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        for count, item in enumerate(tiny_hf.tensors(student.model)):
            if count == 5:
                raise OSError("a rank is gone")
            yield item

    with pytest.raises(OSError, match="a rank is gone"):
        push(failing(), student.engine, student.version + 1)
    student.refit(lambda _, old: old)
    assert_logprobs_of(student.model, student.generate(tiny_hf.tasks(3, 140)))

"""Recipes: what loads, what is refused and in which words, and that a resolved recipe loads as
itself."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.architectures.architecture import (
    architecture_of,
    config_changes,
    read_architecture,
)
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.checks.processes import processes_needed
from megatron_opd.checks.recipe import check_run_directory, preflight
from megatron_opd.errors import ConfigError, OpdError
from megatron_opd.files.typed import differences, key_paths
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.schedules import LinearDecay
from megatron_opd.methods.terms import CrossEntropyTerm
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import dump_config, load_config, recipe_files
from tests.unit.tiny_model_files import TOKENS, write_model, write_recipe
from tools import make_docs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("recipe")))


def reload(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return load_config(str(path))


# ------------------------------------------------------------------------------------------ loading
def test_numbers_and_words_are_yaml_1_2(recipe: str) -> None:
    config = load_config(
        recipe, ["train.optimizer.lr=1e-6", "name=on", "train.optimizer.weight_decay=1"]
    )
    assert config.train.optimizer.lr == 1e-6
    assert config.name == "on"
    assert type(config.train.optimizer.weight_decay) is float


def test_a_method_name_takes_the_catalogue_entry(recipe: str) -> None:
    for name, entry in CATALOGUE.items():
        assert load_config(recipe, [f"method={name}"]).method == entry.method


def test_a_mapping_changes_keys_of_the_catalogue_entry(recipe: str) -> None:
    policy, guidance = CATALOGUE["tgpo_annealing"].method.terms.values()
    changed = load_config(
        recipe, ["method={name: tgpo_annealing, guidance: {weight: {decay: 1e-6}}}"]
    ).method
    assert isinstance(guidance.weight, LinearDecay)
    assert changed.terms == {
        "policy": policy,
        "guidance": replace(guidance, weight=replace(guidance.weight, decay=1e-6)),
    }


def test_overrides_reach_terms_whatever_the_spelling(recipe: str, tmp_path: Path) -> None:
    overrides = ["method.guidance.weight=0.5", "method.policy.ratio.clip_high=0.28"]
    config = load_config(recipe, overrides)
    assert config.method.terms["guidance"].weight == 0.5
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(load_config(recipe)))
    assert load_config(str(stored), overrides) == config
    assert load_config(str(stored), ["method=grpo"]).method == CATALOGUE["grpo"].method
    assert (
        load_config(recipe, ["method=sft", "method.terms.trace.weight=2.0"])
        .method.terms["trace"]
        .weight
        == 2.0
    )


def test_a_method_of_ones_own_is_written_in_full(recipe: str) -> None:
    terms = "{imitate: {kind: cross_entropy, targets: teacher_argmax}}"
    config = load_config(recipe, [f"method={{name: mine, terms: {terms}}}"])
    assert config.method.terms == {"imitate": CrossEntropyTerm("cross_entropy", "teacher_argmax")}


def test_later_overrides_win_and_make_missing_sections(recipe: str) -> None:
    config = load_config(recipe, ["eval.every=3", "eval.every=4", "data.heldout=x.jsonl"])
    assert config.eval is not None
    assert config.eval.every == 4


def test_a_run_directory_is_a_recipe(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe, ["seed=7"])
    assert reload(config, tmp_path) == load_config(str(tmp_path)) == config


def test_every_packaged_recipe_loads_and_round_trips(tmp_path: Path) -> None:
    assert recipe_files()
    for name in recipe_files():
        config = load_config(name)
        assert reload(config, tmp_path) == config


@pytest.fixture(scope="module")
def recipe_and_folder(
    recipe: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path]:
    return load_config(recipe, ["method=tgpo_annealing"]), tmp_path_factory.mktemp("round_trip")


numbers = st.floats(min_value=1e-300, max_value=1e300)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "1e-6",
        "null",
        "on",
        "~",
        "- a",
        "a: b",
        "{problem}",
        "# x",
        "<think>\n",
        " ",
        "0o17",
        "2026-01-01",
        "'",
        "\x85",
    ]
)


@settings(max_examples=25, deadline=None)
@given(
    lr=numbers,
    start=numbers,
    text=texts,
    prefill=texts,
    seed=st.integers(0, 2**32 - 1),
    system=st.none() | texts,
)
def test_a_written_recipe_loads_as_itself(
    recipe_and_folder: tuple[RunConfig, Path],
    lr: float,
    start: float,
    text: str,
    prefill: str,
    seed: int,
    system: str | None,
) -> None:
    config, folder = recipe_and_folder
    guidance = replace(config.method.terms["guidance"], weight=LinearDecay(start, 1e-22))
    config = replace(
        config,
        seed=seed,
        method=replace(config.method, terms=config.method.terms | {"guidance": guidance}),
        data=replace(
            config.data,
            template=replace(config.data.template, text=text, prefill=prefill, system=system),
        ),
        train=replace(config.train, optimizer=replace(config.train.optimizer, lr=lr)),
    )
    assert reload(config, folder) == config


def test_a_stale_example_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_docs, "REPOSITORY", tmp_path / "repository")
    example = tmp_path / "example.sbatch"
    example.write_text("#!/bin/bash\n")
    monkeypatch.setattr(make_docs, "EXAMPLE_SCRIPT", example)
    monkeypatch.setattr("sys.argv", ["make_docs.py", "--check"])
    assert make_docs.main() == 1
    assert "example.sbatch: stale; run `make docs`\n" in capsys.readouterr().out
    assert example.read_text() == "#!/bin/bash\n"


def test_the_generated_pages_cover_every_key_and_go_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a stale example is written here, not into the repository
    for name in ("CONFIG_PAGE", "CLUSTER_PAGE", "METHODS_PAGE", "VOCAB_PAGE", "EXAMPLE_SCRIPT"):
        without_tables = re.sub(r"(?m)^\|.*\n", "", getattr(make_docs, name).read_text())
        (tmp_path / f"{name}.md").write_text(without_tables)
        monkeypatch.setattr(make_docs, name, tmp_path / f"{name}.md")
    monkeypatch.setattr(make_docs, "REPOSITORY", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_docs.py", "--check"])
    assert make_docs.main() == 1
    monkeypatch.setattr("sys.argv", ["make_docs.py"])
    assert make_docs.main() == 0
    page = (tmp_path / "CONFIG_PAGE.md").read_text()
    keys = {path.rpartition(".")[2] for path in key_paths(RunConfig)}
    assert keys - {"terms"} <= set(re.findall(r"`(\w+)` \|", page))
    monkeypatch.setattr("sys.argv", ["make_docs.py", "--check"])
    assert make_docs.main() == 0
    (tmp_path / "METHODS_PAGE.md").write_text(
        (tmp_path / "METHODS_PAGE.md").read_text().replace("tgpo", "topg")
    )
    assert make_docs.main() == 1


@pytest.mark.parametrize("write", [make_docs.config_page, make_docs.cluster_page])
def test_every_key_is_explained(write: Callable[[], str]) -> None:
    rows = [line for line in write().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert len(rows) > 20
    assert {len(row) for row in cells} == {4}
    assert [row for row in cells if not all(row)] == []


# ----------------------------------------------------------------------------------------- refusals
REFUSED = {
    "rollout.num_promts=3": "unknown key; did you mean num_prompts?",
    "num_prompts=3": "unknown key; did you mean rollout.num_prompts?",
    "student.layout.tp=2": "unknown key; known: tensor_model_parallel_size, "
    "pipeline_model_parallel_size,",
    "eval.evry=1": "unknown key; did you mean every?",
    "num_steps=0": "must be greater than or equal to 1, got 0",
    "num_steps=1e3": "must be an integer, got 1000.0",
    "num_steps=true": "must be an integer, got True",
    "log.tensorboard=yes": "must be a boolean, got 'yes'",
    "name=2026-01-01": "must be a string, got datetime.date(2026, 1, 1)",
    "train.optimizer.lr=.inf": "must be a finite number, got inf",
    "eval.top_p=1.5": "must be less than or equal to 1, got 1.5",
    "precision=float8": "must be 'float32', 'bfloat16' or 'float16', got 'float8'",
    "train.loss_scale.window=0": "must be greater than or equal to 1, got 0",
    "rollout=3": "must be a mapping of keys, got 3",
    "rollout=": "must be a mapping of keys, got nothing",
    "teacher={}": "teacher.path: missing; it has no default",
    "name.x=3": "name: is 'tiny', which has no keys; set name itself",
    "method=tgop": "'tgop': unknown method; did you mean tgpo?",
    "method=[a]": "must be a name or a mapping; names: sft",
    "method.name=grpo": "cannot be overridden; method=NAME chooses another method",
    "method.guidence.weight=1": "unknown term; did you mean guidance? known: policy, guidance",
    "method={name: tgpo, guidence: {weight: 1}}": "unknown term; did you mean guidance? "
    "known: policy, guidance",
    "method.guidance.wieght=1": "unknown key; did you mean weight?",
    "method.guidance.weight=abc": "must be a number, got 'abc'",
    "method.guidance.weight=-1": "must be greater than or equal to 0, got -1",
    "method.guidance.weight={}": "method.guidance.weight.start: missing",
    "method.guidance.weight={start: x, decay: 0.1}": "method.guidance.weight.start: "
    "must be a number, got 'x'",
    "method={name: x, terms: {a: {weight: 1}}}": "method.a.kind: missing; "
    "one of policy_gradient, cross_entropy",
    "method={name: x, terms: {a: {kind: polic}}}": "method.a.kind: unknown kind",
    "method={name: x, terms: {}}": "must be a mapping of at least one term",
    "data.template.text=Problem: {problem}": "must be a string, got a mapping",
    "data.template.date=2026-13-01": "not valid YAML (ValueError: month must be in 1..12); "
    "quote the value",
    "data.template={text: [}": "line 1: expected the node content, but found '}'; quote the value",
    "num_steps": "an override is written key=value",
    "=3": "an override is written key=value",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_override_is_one_line_that_names_it(recipe: str, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    message = str(caught.value)
    assert override in message
    assert REFUSED[override] in message
    assert "\n" not in message


def test_a_wrong_key_of_the_file_names_the_file(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rollout={"num_promts": 3})
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(
        f"{path}: rollout.num_promts: unknown key; did you mean num_prompts?"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nseed: 1\nname: b\n", 'line 3: found duplicate key "name"'),
        ("name: [a\nseed: 1\n", "line 2: expected ',' or ']'"),
        ("name: \ta: b\n", "line 1: found character '\\t'"),
        ("", "must be a mapping of keys"),
        ("- a\n", "must be a mapping of keys"),
        ("name: !!python/object:os.system x\n", "could not determine a constructor"),
        ("name: x\n", "num_steps: missing; it has no default"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    for recipe, problem in {
        "demmo": "did you mean demo?",
        "nowhere/x.yaml": "no such file",
        str(tmp_path): "a directory without config.yaml",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            load_config(recipe)


def test_differences_are_key_paths(recipe: str) -> None:
    config = load_config(recipe)
    other = load_config(recipe, ["seed=1", "method.guidance.weight=1.0", "teacher=null"])
    assert differences(config, config) == []
    assert differences(config, other) == ["method.terms.guidance.weight", "teacher", "seed"]


# --------------------------------------------------------------------------------------- pre-flight
def refusal(recipe: str, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(OpdError) as caught:
        preflight(load_config(recipe, overrides), world_size=world_size)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_recipe_passes_without_warnings(recipe: str) -> None:
    assert preflight(load_config(recipe), world_size=1) == []
    layout = ["student.layout={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}"]
    assert preflight(load_config(recipe, layout), world_size=4) == []
    sft = ["method=sft", "teacher=null", "rollout={num_prompts: 4}"]
    assert preflight(load_config(recipe, sft), world_size=2) == []


# fmt: off
PREFLIGHT: dict[str, tuple[list[str], int | None]] = {
    "student.layout.tensor_model_parallel_size: 3 does not divide the 4 attention heads":
        (["student.layout.tensor_model_parallel_size=3"], 3),
    "teacher.layout.tensor_model_parallel_size: 4 does not divide the 2 key-value heads":
        (["teacher.layout.tensor_model_parallel_size=4"], 4),
    "student.layout.pipeline_model_parallel_size: 3 does not divide the 4 layers":
        (["student.layout.pipeline_model_parallel_size=3"], 3),
    "student.layout.sequence_parallel: no effect":
        (["student.layout.sequence_parallel=true"], None),
    "student.layout: TP 2 x PP 2 needs at least 4 processes, there would be 1; start 4 in all":
        (["student.layout={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}"], 1),
    "teacher.layout: TP 2 x PP 1 needs a multiple of 2 processes, there would be 5; "
    "start 4 in all": (["teacher.layout.tensor_model_parallel_size=2"], 5),
    "rollout.num_prompts: the 8 sequences of an update do not divide among the student's 3":
        ([], 3),
    "teacher: missing; method.guidance of tgpo reads": (["teacher=null"], None),
    "rollout.samples_per_prompt: 1 gives method.policy no group":
        (["rollout.samples_per_prompt=1"], None),
    "method: the weight of every term is 0":
        (["method.policy.weight=0", "method.guidance.weight=0"], None),
    "method.guidance.weight.decay: 0 never decays; write method.guidance.weight=0.1":
        (["method.guidance.weight={start: 0.1, decay: 0}"], None),
    "method.guidance.weight.floor: 0.2 is not below start=0.1":
        (["method.guidance.weight={start: 0.1, decay: 0.1, floor: 0.2}"], None),
    "method.t: is on traces beside terms on samples; "
    "set method.traces_per_group or method.prefix": (
        [
            "method={name: m, terms: {t: {kind: cross_entropy, targets: trace}, p: {kind: "
            "policy_gradient}}}",
            "teacher=null",
        ],
        None,
    ),
    "method.a.gates.x: with its own opposite no token is left": (
        [
            "method={name: m, terms: {a: {kind: policy_gradient, gates: {x: {kind: trust}, "
            "y: {kind: trust, invert: true}}}}}"
        ],
        None,
    ),
    "method.guidance.weight.after: equals before=1.0":
        (["method.guidance.weight={kind: switch, before: 1.0, at: 2, after: 1.0}"], None),
    "method.guidance.weight.end: 2.0 is not below start=1.0":
        (["method.guidance.weight={kind: cosine, start: 1.0, steps: 4, end: 2.0}"], None),
    "method.forward.k: 99 is more than the 16 tokens of the vocabulary":
        (["method=full_fkl", "method.forward.k=99"], None),
    "method.prefix: no effect, no term of tgpo is on traces": (["method.prefix={steps: 3}"], None),
    "method.traces_per_group: no effect, every term of sft is on traces alone": (
        ["method=sft", "method.traces_per_group=1", "teacher=null", "rollout={num_prompts: 4}"],
        None,
    ),
    "method.off_policy.ratio: shaped is of traces in a group":
        (["method={name: luffy, traces_per_group: 0, prefix: {steps: 3}}", "teacher=null"], None),
    "method.distil.advantages.teacher.mix: belongs to transform=floor":
        (["method=opd", "method.distil.advantages.teacher.mix=0.5"], None),
    "method.distil.advantages.teacher.k3_limit: belongs to transform=expm1 alone":
        (["method=opd", "method.distil.advantages.teacher.k3_limit=10.0"], None),
    "method.forward.beta: belongs to divergence=jsd_teacher_side":
        (["method=full_fkl", "method.forward.k=4", "method.forward.beta=0.5"], None),
    "method.jsd.beta: missing with jsd": (["method=gkd", "method.jsd.beta=null"], None),
    "teacher.layout.tensor_model_parallel_size: method.jsd compares whole distributions: "
    "1, or the student's": (["method=gkd", "teacher.layout.tensor_model_parallel_size=2"], None),
    "teacher.layout: method.jsd compares whole distributions, which pipeline stages cannot":
        (["method=gkd", "teacher.layout.pipeline_model_parallel_size=2"], None),
    "method.on_policy_fraction: method.policy needs samples":
        (["method.on_policy_fraction=0.5"], None),
    "method.long.advantages.teacher.anchor: returns are of the student before":
        (["method=minillm", "method.long.advantages.teacher.anchor=current"], None),
    "method.teacher_share: no effect, sft samples nothing":
        (["method=sft", "method.teacher_share=0.2", "rollout={num_prompts: 4}"], None),
    "method.teacher_share: does not go with method.prefix":
        (["method=tropd", "method.teacher_share=0.2"], None),
    "method.teacher_share: does not go with method.on_policy_fraction":
        (["method=gkd", "method.teacher_share=0.2"], None),
    "method.teacher_share: method.distil reads the sampler's logprobs":
        (["method=rkl", "method.teacher_share=0.2"], None),
    "teacher: missing; method.teacher_share of grpo":
        (["method=grpo", "method.teacher_share=0.2", "teacher=null"], None),
    "method.distil.whiten: teacher changes within the update":
        (["method=opd", "method.distil.whiten=true"], None),
    "method: prime has several process_reward advantages": (
        ["method=prime", "method.policy.advantages.another={kind: process_reward}", "teacher=null"],
        None,
    ),
    "rollout.samples_per_prompt: 1 gives method.p no group": (
        [
            "method={name: m, terms: {p: {kind: policy_gradient, advantages: {a: {kind: "
            "process_reward}}}}}",
            "rollout.samples_per_prompt=1",
            "teacher=null",
        ],
        None,
    ),
    "method.policy.advantages: empty": (
        [
            "method={name: m, terms: {policy: {kind: policy_gradient, advantages: {}}}}",
            "teacher=null",
        ],
        None,
    ),
    "method.a.correction.low: 2.0 is not below high=1.0, so no token is kept": (
        [
            "method={name: m, terms: {a: {kind: policy_gradient, correction: {kind: masked, "
            "high: 1, low: 2}}}}",
            "teacher=null",
        ],
        None,
    ),
    "method.a.correction: keeps ratios from 1.5 to 2.0, and none of a sampler that agrees": (
        [
            "method={name: m, terms: {a: {kind: policy_gradient, correction: {kind: geometric, "
            "high: 2, low: 1.5}}}}",
            "teacher=null",
        ],
        None,
    ),
    "method.a.correction.low: no effect with kind=truncated": (
        [
            "method={name: m, terms: {a: {kind: policy_gradient, correction: {kind: truncated, "
            "high: 2, low: 0.5}}}}",
            "teacher=null",
        ],
        None,
    ),
    "method.forward.gates.low.at_most: -1.5 splits no tokens":
        (["method=aopd", "method.forward.k=4", "method.forward.gates.low.at_most=-1.5"], None),
    "method.uncertain.gates.entropy.above: 2.8 nats are no less than the largest entropy of "
    "16 tokens, 2.77": (["method=eopd", "method.uncertain.gates.entropy.above=2.8"], None),
    "max_sequence_length: 65 is more than the student's max_position_embeddings=64":
        (["max_sequence_length=65"], None),
    "rollout.max_completion_tokens: 32 leaves no room for a prompt within max_sequence_length=32":
        (["rollout.max_completion_tokens=32"], None),
    "train.updates_per_step: 3 does not divide rollout.num_prompts=4":
        (["train.updates_per_step=3"], None),
    "train.optimizer.min_lr: no effect with schedule=constant":
        (["train.optimizer.min_lr=1e-5"], None),
    "train.optimizer.min_lr: 0.1 is above train.optimizer.lr=0.001":
        (["train.optimizer.min_lr=0.1", "train.optimizer.schedule=cosine"], None),
    "teacher.offload: a term on whole distributions":
        (["method=gkd", "teacher.offload=true"], None),
    "teacher.layout.context_parallel_size: must be the student's 1":
        (["method=gkd", "teacher.layout.context_parallel_size=2"], None),
    "student.layout.context_parallel_size: a process reward is a sum over whole sequences":
        (["method=prime", "teacher=null", "student.layout.context_parallel_size=2"], None),
    "train.micro_batch_tokens: 31 cannot hold a sequence of max_sequence_length=32; raise it":
        (["train.micro_batch_tokens=31"], None),
    "train.micro_batch_tokens: 16 cannot hold a sequence of max_sequence_length=33 on "
    "the student's 2": (
        [
            "train.micro_batch_tokens=16",
            "max_sequence_length=33",
            "student.layout.context_parallel_size=2",
            "teacher.layout.context_parallel_size=4",
        ],
        None,
    ),
    "student.layout: TP 1 x PP 1 x CP 3 needs at least 3 processes, there would be 2":
        (["student.layout.context_parallel_size=3"], 2),
    "teacher.processes: 2 of 2 leave the student none; start 3 in all":
        (["teacher.processes=2"], 2),
    "teacher.processes: teacher.layout, TP 2 x PP 1, needs a multiple of 2, not 3":
        (["teacher.processes=3", "teacher.layout.tensor_model_parallel_size=2"], None),
    "student.layout: TP 2 x PP 1 needs a multiple of 2 processes, there would be 3 beside "
    "the teacher's 2; start 4":
        (["teacher.processes=2", "student.layout.tensor_model_parallel_size=2"], 5),
    "rollout.num_prompts: the 8 sequences of an update do not divide among the student's 3 data-":
        (["teacher.processes=1"], 4),
    "rollout.processes: 2 of 2 leave the student none; start 3 in all":
        (["rollout.processes=2"], 2),
    "rollout.processes + teacher.processes: 3 of 3 leave the student none; start 4 in all":
        (["rollout.processes=2", "teacher.processes=1"], 3),
    "student.layout: TP 2 x PP 1 needs a multiple of 2 processes, there would be 3 beside "
    "the rollout's 1 and the te": (
        [
            "rollout.processes=1",
            "teacher.processes=2",
            "student.layout.tensor_model_parallel_size=2",
        ],
        6,
    ),
    "rollout.processes: with method.teacher_share":
        (["method=minillm", "rollout.processes=1"], None),
    "rollout.processes: no effect, method sft samples nothing":
        (["method=sft", "teacher=null", "rollout={processes: 1}"], None),
    "teacher.processes: a term on whole distributions":
        (["method=gkd", "teacher.processes=1"], None),
    "teacher.processes: with method.teacher_share":
        (["method=minillm", "teacher.processes=1"], None),
    "teacher.processes: no effect, method grpo reads no teacher":
        (["method=grpo", "teacher.processes=1"], None),
    "teacher.offload: no effect with teacher.processes":
        (["teacher.offload=true", "teacher.processes=1"], None),
    "student.layout.virtual_pipeline_model_parallel_size: no effect without":
        (["student.layout.virtual_pipeline_model_parallel_size=2"], None),
    "student.layout.virtual_pipeline_model_parallel_size: 2 stages of 3 chunks do not divide "
    "the 4 layers": (
        [
            "student.layout.virtual_pipeline_model_parallel_size=3",
            "student.layout.pipeline_model_parallel_size=2",
        ],
        None,
    ),
    "data.trace_column: no effect": (["data.trace_column=response"], None),
    "data.template.system: no effect with kind=raw": (["data.template.system=tgpo"], None),
    "data.max_prompt_tokens: 32 is not below max_sequence_length=32":
        (["data.max_prompt_tokens=32"], None),
    "data.template.prefill: <think>\\n has a backslash and a letter where a line break is meant":
        ([r"data.template.prefill='<think>\n'"], None),
    "eval: needs data.heldout": (["eval={}"], None),
    "eval.samples_per_prompt: greedy samples are all equal":
        (["eval.samples_per_prompt=4", "data.heldout=x"], None),
    "rollout.temperature: no effect, method sft samples nothing":
        (["method=sft", "teacher=null", "rollout={temperature: 0.7}"], None),
    "reward.workers: no effect, method sft samples nothing":
        (["method=sft", "teacher=null", "rollout={}", "reward.workers=3"], None),
    "/nowhere: no such model directory": (["student.path=/nowhere"], None),
}
# fmt: on


@pytest.mark.parametrize("problem", PREFLIGHT)
def test_preflight_names_the_key(recipe: str, problem: str) -> None:
    overrides, world_size = PREFLIGHT[problem]
    if problem.endswith("samples nothing"):
        # its default: nothing is sampled
        overrides = [*overrides, "rollout.max_completion_tokens=1024"]
    assert refusal(recipe, *overrides, world_size=world_size).startswith(problem)


def test_preflight_warns_of_what_may_be_meant(recipe: str) -> None:
    overrides = [
        "method.guidance.weight=0",
        "method.policy.ratio.clip_high=0.28",
        "train.optimizer.warmup_steps=9",
    ]
    assert [
        text.split(":")[0] for text in preflight(load_config(recipe, overrides), world_size=1)
    ] == ["method.policy.ratio.clip_high", "method.guidance.weight", "train.optimizer.warmup_steps"]
    assert preflight(load_config(recipe, [r"data.template.text='{problem}\n= '"]), world_size=1)[
        0
    ].startswith("data.template.text: has a backslash and a letter")
    latex = [r"data.template.text='Is {problem} \neq 0?'", 'data.template.prefill="<think>\\n"']
    assert preflight(load_config(recipe, latex), world_size=1) == []
    assert preflight(load_config(recipe, ["method=grpo"]), world_size=1) == [
        "teacher: not loaded, method grpo reads no teacher"
    ]


def test_processes_needed_is_the_least_common_multiple(recipe: str) -> None:
    layouts = [
        "student.layout.tensor_model_parallel_size=2",
        "teacher.layout.pipeline_model_parallel_size=3",
    ]
    assert processes_needed(load_config(recipe, layouts)) == 6


def test_processes_set_aside_for_the_teacher_are_divided_by_its_layout_alone(recipe: str) -> None:
    layouts = [
        "student.layout.tensor_model_parallel_size=2",
        "teacher.layout.pipeline_model_parallel_size=4",
    ]
    config = load_config(recipe, [*layouts, "teacher.processes=4"])
    assert processes_needed(config) == 6
    assert preflight(config, world_size=6) == preflight(config, world_size=8) == []


def test_processes_set_aside_for_sampling_leave_the_layouts_the_others(recipe: str) -> None:
    layouts = [
        "student.layout.tensor_model_parallel_size=2",
        "teacher.layout.pipeline_model_parallel_size=2",
    ]
    config = load_config(recipe, [*layouts, "rollout.processes=3"])
    assert processes_needed(config) == 5
    assert preflight(config, world_size=5) == preflight(config, world_size=7) == []


def broken(folder: Path, what: str) -> None:
    """Damages the teacher of a recipe in `folder`."""
    teacher = folder / "teacher"
    if what == "weights":
        (teacher / "model.safetensors").unlink()
    if what == "shard":
        (teacher / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "b.safetensors"}})
        )
    if what in ("config.json", "tokenizer.json"):
        (teacher / what).unlink()
    if what == "json":
        (teacher / "tokenizer.json").write_text("{")
    if what == "order":
        shutil.rmtree(teacher)
        write_model(teacher, tokens=[*TOKENS[:2], TOKENS[3], TOKENS[2], *TOKENS[4:]])
    if what == "vocab_size":
        shutil.rmtree(teacher)
        write_model(teacher, vocab_size=8)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("weights", "teacher: no *.safetensors file"),
        ("shard", "teacher/b.safetensors: missing, though model.safetensors.index.json names it"),
        ("config.json", "teacher/config.json: missing"),
        ("tokenizer.json", "teacher/tokenizer.json: missing"),
        ("json", "teacher/tokenizer.json: not valid JSON"),
        ("order", "id 2 is '0' there and '1' here"),
        ("vocab_size", "its highest token id is 14, outside vocab_size=8"),
    ],
)
def test_a_damaged_model_directory_is_named(tmp_path: Path, what: str, problem: str) -> None:
    path = write_recipe(tmp_path)
    broken(tmp_path, what)
    assert problem in refusal(str(path))


def test_one_vocabulary_may_go_on_where_the_other_ends(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    write_model(tmp_path / "teacher", tokens=TOKENS[:-1])
    assert preflight(load_config(str(path)), world_size=1) == [
        "teacher.path: student and teacher share their first 14 ids; the others never become "
        "targets"
    ]


def test_models_that_end_differently_are_reported(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    for name, ids in (("student", 1), ("teacher", [2, 3])):
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert preflight(load_config(str(path)), world_size=1) == [
        "student.path: ends a response with '<eos>' (0) by its tokenizer and with '<unk>' (1) by "
        "its generation config; sampling stops at all of them, and so does what is exported",
        "teacher.path: ends a response with '0' (2) and '1' (3), the student with '<eos>' (0) "
        "and '<unk>' (1); as the teacher's tokens the former count as '<eos>' (0)",
    ]


def test_a_teacher_without_a_gradient_is_refused_and_in_a_papers_own_method_reported(
    recipe: str,
) -> None:
    (warning,) = preflight(load_config(recipe, ["method=tgpo_r"]), world_size=1)
    assert "its expected gradient is 0" in warning and warning.endswith("it is so in the paper")
    shaping = "{kind: policy_gradient, advantages: {a: {kind: shaping, signal: argmax_logprob}}}"
    assert "use a log_ratio advantage" in refusal(
        recipe, f"method={{name: mine, terms: {{p: {shaping}}}}}"
    )
    assert preflight(load_config(recipe, ["method=tgpo_r_indicator"]), world_size=1) == []


# Attention heads, key-value heads, intermediate size, layers, longest sequence of the models that
# recipes name.
SIZES = {
    "Qwen2.5-Math-7B": (28, 4, 18944, 28, 4096),
    "Qwen2.5-Math-1.5B": (12, 2, 8960, 28, 4096),
    "Qwen3-30B-A3B": (32, 4, 6144, 48, 40960),
    "DeepSeek-R1-Distill-Qwen-1.5B": (12, 2, 8960, 28, 131072),
    "Skywork-OR1-Math-7B": (28, 4, 18944, 28, 131072),
    "Qwen3-1.7B": (16, 8, 6144, 28, 40960),
    "Qwen3-8B": (32, 8, 12288, 36, 40960),
    "Qwen2.5-3B-Instruct": (16, 2, 11008, 36, 32768),
    "Qwen2.5-7B-Instruct": (28, 4, 18944, 28, 32768),
}
SIZE_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers",
             "max_position_embeddings")  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that have the sizes a layout must divide, and not the rest, by the names of those that
    recipes name."""
    folder, models = tmp_path_factory.mktemp("stand_ins"), {}
    for name, values in SIZES.items():
        sizes: dict[str, object] = dict(zip(SIZE_KEYS, values, strict=True))
        if "A3B" in name:
            sizes |= {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
                      "moe_intermediate_size": 768}  # fmt: skip
        models[name] = write_model(folder / name, vocab_size=80, **sizes)
    return models


@pytest.mark.parametrize("name", [name for name in recipe_files() if not name.startswith("demo")])
def test_every_recipe_of_a_paper_passes(
    name: str, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    """With stand-ins for the models; and for the environments, whose files are the user's."""
    recipe = load_config(name)
    if recipe.environment:
        world = replace(recipe.environment, kind="workshop", options={}, python=None)
        recipe = replace(recipe, environment=world)
    models = {
        role: getattr(recipe, role) for role in ("student", "teacher") if getattr(recipe, role)
    }
    paths = {
        role: replace(model, path=str(stand_ins[Path(model.path).name]))
        for role, model in models.items()
    }
    config = replace(recipe, **paths, run_dir=str(tmp_path / "run"))
    warnings = preflight(config, world_size=8)
    # A paper's own method may have no teacher in its gradient; the page of the method says so too.
    assert [text for text in warnings if not text.endswith("it is so in the paper")] == []
    assert recipe.name == name


def test_a_recipe_holds_what_differs_from_its_base(tmp_path: Path) -> None:
    base = write_recipe(tmp_path)
    (tmp_path / "below").mkdir()
    recipe = tmp_path / "below" / "mine.yaml"
    recipe.write_text(
        f"base: ../{base.stem}\nname: mine\nmethod: grpo\nteacher: null\nrollout: {{num_prompts: "
        "6}\n"
    )
    mine, theirs = load_config(str(recipe)), load_config(str(base))
    assert (mine.name, mine.method.name, mine.teacher, mine.rollout.num_prompts) == (
        "mine",
        "grpo",
        None,
        6,
    )
    assert (
        mine.rollout.samples_per_prompt == theirs.rollout.samples_per_prompt
        and mine.student == theirs.student
    )
    again = tmp_path / "again.yaml"
    again.write_text("base: below/mine\nname: again\n")
    assert load_config(str(again)) == replace(mine, name="again")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: nowhere\nname: a", "nowhere: unknown recipe"),
        ("base: 3\nname: a", "a.yaml: base: must be the name of a recipe, got 3"),
        ("base: b\nname: a", "b.yaml: base: a has this recipe as its base"),
        ("base: a\nname: a", "a.yaml: base: a has this recipe as its base"),
        ("base: c", "a.yaml: name: missing; a recipe with a base needs a name of its own"),
    ],
)
def test_a_wrong_base_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a\nname: b")
    with pytest.raises(ConfigError, match="^[^\n]*" + re.escape(problem)):
        load_config(str(tmp_path / "a.yaml"))


def test_experts_are_shared_out_whole(tmp_path: Path) -> None:
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    }
    write_model(tmp_path / "teacher", **experts)
    path, key = str(write_recipe(tmp_path)), "teacher.layout.expert_model_parallel_size"
    assert preflight(load_config(path, [f"{key}=2"]), world_size=2) == []
    assert processes_needed(load_config(path, [f"{key}=3"])) == 3
    assert refusal(path, f"{key}=4").startswith(f"{key}: 4 does not divide the 6 experts")
    assert "TP 1 x PP 1 with EP 2 needs a multiple of 2 processes" in refusal(
        path, f"{key}=2", world_size=3
    )
    assert "student.layout.expert_model_parallel_size: no effect" in refusal(
        path, "student.layout.expert_model_parallel_size=2"
    )
    experts_learn = [
        f"student.path={tmp_path / 'teacher'}",
        "student.layout.tensor_model_parallel_size=2",
    ]
    assert "student.layout.sequence_parallel: must be true" in refusal(path, *experts_learn)
    sliced = "student.layout.expert_tensor_parallel_size"
    assert preflight(load_config(path, [experts_learn[0], f"{sliced}=5"]), world_size=None) == []
    assert (
        processes_needed(load_config(path, [f"{key}=3", key.replace("model", "tensor") + "=5"]))
        == 15
    )
    assert f"{sliced}: 3 does not divide the 40 intermediate size" in refusal(
        path, experts_learn[0], f"{sliced}=3"
    )
    assert "intermediate size 40 of the experts" in refusal(path, experts_learn[0], f"{sliced}=10")
    assert f"{sliced}: no effect" in refusal(path, f"{sliced}=2")
    assert "with ETP 5 needs at least 5" in refusal(
        path, experts_learn[0], f"{sliced}=5", world_size=1
    )
    config = write_model(tmp_path / "mixed", **experts) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mlp_only_layers": [0]}))
    assert "layers without experts" in refusal(path, f"teacher.path={tmp_path / 'mixed'}")


def test_a_recipe_may_change_a_models_context(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    longer = [
        "max_sequence_length=100",
        "student.max_position_embeddings=128",
        "teacher.max_position_embeddings=128",
    ]
    assert preflight(load_config(str(path), longer), world_size=1) == []
    assert "more than the teacher's max_position_embeddings=64" in refusal(str(path), *longer[:2])
    directory = tmp_path / "student"
    changed = architecture_of(
        ModelConfig(str(directory), rope_theta=40000.0, max_position_embeddings=128)
    )
    assert (changed.rope_theta, changed.max_position_embeddings) == (40000, 128)
    changes = config_changes(directory, changed)
    assert changes == {
        "rope_theta": 40000, "rope_parameters": {"rope_type": "default", "rope_theta": 40000},
        "max_position_embeddings": 128,
    }  # fmt: skip
    assert config_changes(directory, read_architecture(directory)) == {}


def test_a_sequence_is_no_longer_than_yarn_reaches(tmp_path: Path) -> None:
    """More positions than vLLM has angles for."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 15,
    }
    write_model(tmp_path / "student", rope_parameters=yarn)
    path = str(write_recipe(tmp_path))
    problem = (
        "max_sequence_length: 32 is more than the 30 positions that the factor 2 of the RoPE "
        f"scaling in {tmp_path / 'student'}"
    )
    assert refusal(path).startswith(problem)
    assert preflight(load_config(path, ["max_sequence_length=30"]), world_size=1) == []


def test_every_method_of_the_catalogue_passes(recipe: str) -> None:
    for name in CATALOGUE:
        overrides = [f"method={name}"] + (["rollout={num_prompts: 4}"] if name == "sft" else [])
        preflight(load_config(recipe, overrides), world_size=1)


def test_embeddings_may_differ_in_width(tmp_path: Path) -> None:
    write_model(tmp_path / "teacher", vocab_size=32)
    path = str(write_recipe(tmp_path))
    assert preflight(load_config(path), world_size=1) == []
    assert preflight(load_config(path, ["method=gkd"]), world_size=1) == []
    split = [f"{role}.layout.tensor_model_parallel_size=2" for role in ("student", "teacher")]
    assert refusal(path, "method=gkd", *split).startswith(
        "teacher.layout.tensor_model_parallel_size: must be 1 for a term on whole distributions, "
        "since the teacher's"
    )
    assert preflight(load_config(path, ["method=gkd", split[0]]), world_size=2) == []


def test_the_run_directory_is_new_or_a_run(recipe: str, tmp_path: Path) -> None:
    config = replace(load_config(recipe), run_dir=str(tmp_path / "deep" / "run"))
    check_run_directory(config, resume=False)
    assert not (tmp_path / "deep").exists()
    with pytest.raises(ConfigError, match="holds no run to resume"):
        check_run_directory(config, resume=True)
    (tmp_path / "deep" / "run").mkdir(parents=True)
    check_run_directory(config, resume=False)  # empty
    # of a process that was killed when it had just begun
    (tmp_path / "deep" / "run" / ".lock").touch()
    (tmp_path / "deep" / "run" / "config.yaml.tmp").touch()
    check_run_directory(config, resume=False)
    with pytest.raises(ConfigError, match="holds no run to resume; leave out --resume"):
        check_run_directory(config, resume=True)
    (tmp_path / "deep" / "run" / "metrics.jsonl").touch()
    for resume in (False, True):  # neither advice leads to the other
        with pytest.raises(
            ConfigError,
            match=r"it has metrics.jsonl and no config.yaml; give another run_dir=..., or",
        ):
            check_run_directory(config, resume=resume)
    (tmp_path / "deep" / "run" / "metrics.jsonl").unlink()
    reload(config, tmp_path / "deep" / "run")
    check_run_directory(config, resume=True)
    with pytest.raises(ConfigError, match=r"exists already; use --resume .*, or run_dir="):
        check_run_directory(config, resume=False)
    file = replace(config, run_dir=str(tmp_path / "deep" / "run" / "config.yaml" / "below"))
    with pytest.raises(ConfigError, match="run_dir: cannot write"):
        check_run_directory(file, resume=False)

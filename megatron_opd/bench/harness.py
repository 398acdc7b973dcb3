"""Tasks of the Language Model Evaluation Harness (`lm-eval`), asked of our engines.

Its prompts, its few shots, its metrics; our completions and logprobs.
"""

import importlib.util
import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_opd import __version__
from megatron_opd.architectures.architecture import architecture_of
from megatron_opd.bench.harness_engines import Engines
from megatron_opd.bench.identity import engine_of, identity_of
from megatron_opd.errors import ConfigError, OpdError, RunError, first_line
from megatron_opd.files.atomic import write_atomically
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks import TaskManager

RESULTS = "lm_eval.json"
SAMPLES = "lm_eval_samples.jsonl"


@dataclass(frozen=True)
class HarnessBench:
    """What is asked of which model, and where it is written."""

    config: RunConfig  # whose student is the model; its engine and seed
    tasks: tuple[str | Path, ...]  # names, also of groups and with wildcards; YAML files
    out: Path
    num_fewshot: int | None = None  # None: every task's own
    chat_template: bool = False
    limit: int | None = None  # documents of every task, the first ones
    max_tokens: int | None = None  # of a completion; None: every task's own

    @cached_property
    def known_tasks(self) -> "tuple[TaskManager, list[str | dict[str, object]]]":
        """The tasks as `lm-eval` takes them. Raises ConfigError.

        Reading the index of that package's own tasks takes seconds.
        """
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        manager = TaskManager(include_defaults=any(isinstance(task, str) for task in self.tasks))
        tasks: list[str | dict[str, object]] = []
        for task in self.tasks:
            if isinstance(task, str):
                names = manager.match_tasks([task])
                if not names:
                    raise ConfigError(
                        f"--lm-eval {task}: no such task; `python -m lm_eval ls tasks` has the "
                        "names, and a task of your own is a .yaml file"
                    )
                tasks += names
                continue
            try:
                tasks.append(load_yaml(task, resolve_func=True))
            except Exception as error:  # OSError, yaml's errors, what a function in it raises
                raise ConfigError(f"--lm-eval {task}: {first_line(error)}") from error
        return manager, tasks


def check(bench: HarnessBench) -> None:
    """Raises ConfigError for all that can be known without an engine."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval: needs the package lm-eval; install megatron-opd[lm-eval]")
    for path in (bench.out / RESULTS, bench.out / SAMPLES):
        if path.exists():
            raise ConfigError(f"--out: {path} exists already; give another directory")
    tokenizer = load_tokenizer(bench.config.student.path)
    if bench.chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"--apply-chat-template: the tokenizer of {bench.config.student.path} has none; leave "
            "the option out"
        )
    _ = bench.known_tasks
    try:
        bench.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {bench.out}: {error.strerror}; give another directory") from None


def run_harness(bench: HarnessBench) -> str | None:
    """The table of results, also in `bench.out`; None but on the first process. Collective.

    Raises ConfigError, RunError.
    """
    with ExitStack() as closing:
        engines = Engines(bench.config, closing.enter_context(ExitStack()))
        if dist.get_rank() != 0:
            engines.serve()
            return None
        try:
            results = _evaluate(bench, engines)
        finally:
            engines.dismiss()
    return _write(bench.out, results)


def _evaluate(bench: HarnessBench, engines: Engines) -> "EvalResults":
    from lm_eval import simple_evaluate

    from megatron_opd.bench.harness_model import HarnessModel

    config = bench.config
    manager, tasks = bench.known_tasks
    about = {
        "megatron_opd": __version__,
        "student": identity_of(config.student.path),
        "engine": engine_of(config, None, dist.get_world_size()),
        "apply_chat_template": bench.chat_template,
        "num_fewshot": bench.num_fewshot,
    }
    tokenizer = load_tokenizer(config.student.path)
    context = architecture_of(config.student).max_position_embeddings
    model = HarnessModel(engines, tokenizer, context=context, seed=config.seed, about=about)
    tokens = {"max_gen_toks": bench.max_tokens} if bench.max_tokens else None
    try:
        results = simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=bench.num_fewshot,
            apply_chat_template=bench.chat_template,
            limit=bench.limit,
            gen_kwargs=tokens,
        )
    except OpdError:
        raise
    except Exception as error:  # data that are not here, metrics without their package, ...
        names = ",".join(map(str, bench.tasks))
        raise RunError(
            f"lm-eval failed in {names}: {type(error).__name__}: {first_line(error)}"
        ) from error
    assert results is not None, "the first process has the results"
    return results


def _write(out: Path, results: "EvalResults") -> str:
    """Writes the results and the samples; returns a table."""
    from lm_eval.utils import handle_non_serializable, make_table

    lines = []
    for task, samples in results.pop("samples", {}).items():
        for sample in samples:
            line = {"task": task, **sample}
            lines.append(json.dumps(line, default=handle_non_serializable, ensure_ascii=False))
    write_atomically(out / SAMPLES, "".join(line + "\n" for line in lines).encode())
    text = json.dumps(results, default=handle_non_serializable, ensure_ascii=False, indent=1)
    write_atomically(out / RESULTS, (text + "\n").encode())
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join([*tables, f"wrote {out / RESULTS} and {out / SAMPLES}"])

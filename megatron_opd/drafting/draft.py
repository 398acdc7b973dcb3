"""Drafts a recipe: values by the models, the data and the devices, layouts by the plan."""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.drafting.answers import Answers
from megatron_opd.drafting.material import Material
from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import unknown
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.needs import needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.planning.plan import ClusterPlan, make_plan
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config

GPUS_PER_NODE = 8
PROMPT_TOKENS = 1024  # where they could not be counted
PASSES = 3  # over the data
MOST_STEPS = 300
ROOMY = 0.95  # of the memory: a plan is an estimate, and a tight one is a run that dies
TOKENS_PER_PASS = 8192  # of a micro-batch, if sequences are shorter

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Squeeze:
    """A way to need less memory, which costs time."""

    recompute: str = "none"
    offload: bool = False


@dataclass(frozen=True)
class Draft:
    """A recipe's text with its plan."""

    text: str
    config: RunConfig
    plan: ClusterPlan


def draft(name: str, answers: Answers, material: Material) -> Draft:
    """The recipe with the fastest layouts that fit, kept in memory as far as is needed.

    Raises ConfigError where nothing fits, or where the answers do not go together.
    """
    values = _values(name, answers, material)
    squeezes = [Squeeze()]
    if answers.gpu != "cpu":
        squeezes += [Squeeze("full")]
        if answers.teacher and not _needs(str(values["method"])).teacher_head:
            squeezes += [Squeeze("none", True), Squeeze("full", True)]
    lacks = ""
    for squeeze in squeezes:
        result = _fitting(values, answers, material, squeeze)
        if isinstance(result, Draft):
            return result
        lacks = result
    raise ConfigError(
        f"--gpus: no layout of these models fits {answers.gpus} x {answers.gpu} ({lacks}); give "
        "more GPUs, or smaller models"
    )


def _fitting(
    values: Mapping[str, Value], answers: Answers, material: Material, squeeze: Squeeze
) -> Draft | str:
    """The recipe with the fastest layouts that fit; or else what the best of them lacks."""
    assert answers.gpus is not None and answers.gpu is not None, "asked for"
    squeezed = {**values, "recompute": squeeze.recompute, "offload": squeeze.offload}
    text = _render(squeezed, answers, material)
    config = load(text, str(values["name"]))
    plan = make_plan(config, gpus=answers.gpus, gpu=answers.gpu, gpus_per_node=GPUS_PER_NODE)
    fitting = [layouts for layouts in plan.others if layouts.lacks is None]
    if not fitting:
        best = min(plan.others, key=lambda layouts: layouts.peak, default=plan.own)
        return str(best.lacks)
    roomy = [layouts for layouts in fitting if layouts.peak <= ROOMY * plan.case.hardware.limit]
    chosen = (roomy or fitting)[0]
    layouts = {
        "student_layout": _spelled(chosen.student),
        "teacher_layout": _spelled(chosen.teacher) if chosen.teacher else "",
    }
    text = _render({**squeezed, **layouts}, answers, material)
    return Draft(text, load(text, str(values["name"])), replace(plan, own=chosen))


def load(text: str, name: str) -> RunConfig:
    """The recipe of a text. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(str(path))
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{path}: ", "", 1)) from None


def _values(name: str, answers: Answers, material: Material) -> dict[str, Value]:
    """The values of the template, layouts aside, with a reason for each that was chosen."""
    assert answers.student is not None and answers.gpus is not None, "asked for"
    on_gpu = answers.gpu != "cpu"
    method, method_reason = _method(answers, material)
    prompt, prompt_reason = _prompt(material)
    completion = min(4096 if on_gpu else 256, material.reach - prompt)
    cut = completion == material.reach - prompt
    samples = 8 if on_gpu else 4
    num_prompts = _num_prompts(answers.gpus, samples, min(64 if on_gpu else 16, material.rows))
    steps = max(1, min(MOST_STEPS, PASSES * material.rows // num_prompts))
    rewards = _needs(method).rewards
    student = Path(answers.student).name
    teacher = f" learns from {Path(answers.teacher).name}" if answers.teacher else " learns"
    length = prompt + completion
    return {
        "name": name,
        "subject": f"{student}{teacher}",
        "method": method,
        "method_reason": method_reason,
        "steps": steps,
        "steps_reason": _steps_reason(steps, material.rows, num_prompts),
        "precision": "bfloat16" if on_gpu else "float32",
        "student_layout": "",
        "teacher_layout": "",
        "template": "raw" if material.has_chat_template is False else "chat",
        "template_reason": _TEMPLATE_REASONS[material.has_chat_template],
        "prompt": prompt,
        "prompt_reason": prompt_reason,
        "drop_rows": rewards and material.answered < material.rows,
        "num_prompts": num_prompts,
        "samples": samples,
        "samples_reason": "rewards are compared within them" if rewards else "of each prompt",
        "completion": completion,
        "completion_reason": f"what the models' {material.reach} positions leave"
        if cut
        else "raise it for models that reason at length",
        "micro_batch": max(1, TOKENS_PER_PASS // length) * length,
        "fused": on_gpu,
        "lr": "1e-6" if rewards else "5e-6",
        "lr_reason": "of a whole model from its rewards; small ones bear more"
        if rewards
        else "of a whole model from a teacher's signal; small ones bear more",
        "warmup": min(10, steps // 10),
        "eval_every": max(1, steps // 10),
        "checkpoint_every": max(1, min(20, steps // 5)),
    }


_TEMPLATE_REASONS = {
    True: "the student's tokenizer has a chat template",
    False: "the student's tokenizer has no chat template: it reads the problem alone",
    None: "the student is not here: raw, if its tokenizer has no chat template",
}


def _method(answers: Answers, material: Material) -> tuple[str, str]:
    if answers.method:
        return answers.method, "as you asked"
    if answers.teacher and material.answered:
        return "tgpo", "rewards of the answers, and guidance of the teacher"
    if answers.teacher:
        return "opd", "the rows have no answers: the teacher's signal alone"
    if material.answered:
        return "grpo", "there is no teacher: rewards of the answers alone"
    raise ConfigError(
        f"--teacher: none, and no row of {answers.data} has an answer, so there is nothing to "
        "learn from; give a teacher, or data with answers"
    )


def _needs(method: str) -> Needs:
    if method not in CATALOGUE:
        raise ConfigError(f"--method: {unknown('method', method, CATALOGUE)}")
    return needs_of(CATALOGUE[method].method)


def _prompt(material: Material) -> tuple[int, str]:
    half = material.reach // 2
    if not material.prompt_tokens:
        return min(PROMPT_TOKENS, half), "the student's tokenizer is not here: an assumption"
    longest = material.prompt_tokens[-1]
    rounded = 64 * math.ceil(longest / 64)
    if rounded <= half:
        return rounded, f"the longest has {longest}"
    return half, f"half of the models' positions; the longest prompt has {longest}"


def _num_prompts(gpus: int, samples: int, most: int) -> int:
    """At most `most` prompts, whose samples divide among any number of replicas on the GPUs."""
    unit = gpus // math.gcd(gpus, samples)
    return max(1, most // unit) * unit


def _steps_reason(steps: int, rows: int, num_prompts: int) -> str:
    passes = steps * num_prompts / rows
    return f"{passes:.2g} passes over the data"


def _spelled(layout: LayoutConfig) -> str:
    """The keys that are not the default's, as YAML; "" for none."""
    default = LayoutConfig()
    changed = {key: value for key, value in vars(layout).items() if value != getattr(default, key)}
    pairs = [f"{key}: {json.dumps(value)}" for key, value in changed.items()]
    return f"{{{', '.join(pairs)}}}" if pairs else ""


def _render(values: Mapping[str, Value], answers: Answers, material: Material) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    # JSON's texts are YAML's too, whatever they have in them.
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.get_template("recipe.yaml.j2")
    return template.render(**values, answers=answers, material=material)

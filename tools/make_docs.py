"""Writes docs/config.md and docs/cluster_keys.md from the schemas, the tables of docs/methods.md,
docs/benchmarks.md and docs/vocab_parallel.md, and slurm/examples.

python tools/make_docs.py           write them
python tools/make_docs.py --check   write nothing; exit 1 when one is stale
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_opd.architectures import config  # noqa: E402
from megatron_opd.cli.arguments import described_commands  # noqa: E402
from megatron_opd.cluster import profile, script  # noqa: E402
from megatron_opd.cluster.job import Job  # noqa: E402
from megatron_opd.cluster.profile import (  # noqa: E402
    ClusterConfig,
    ContainerConfig,
    TunnelConfig,
    load_profile,
)
from megatron_opd.methods import (  # noqa: E402
    advantages,
    corrections,
    gates,
    method,
    part,
    ratios,
    scales,
    schedules,
    terms,
)
from megatron_opd.methods.advantages import rewards, student, teacher  # noqa: E402
from megatron_opd.methods.method import MethodConfig  # noqa: E402
from megatron_opd.methods.schedules import CosineDecay, LinearDecay, Switch  # noqa: E402
from megatron_opd.recipe import agents, keys  # noqa: E402
from megatron_opd.recipe import data as recipe_data  # noqa: E402
from megatron_opd.recipe import rewards as recipe_rewards  # noqa: E402
from megatron_opd.recipe.keys import RunConfig  # noqa: E402
from megatron_opd.suites.listing import listed_suites  # noqa: E402
from tools.methods_table import catalogue_table, parts_table  # noqa: E402

CONFIG_PAGE = REPOSITORY / "docs" / "config.md"
CLUSTER_PAGE = REPOSITORY / "docs" / "cluster_keys.md"
COMMANDS_PAGE = REPOSITORY / "docs" / "commands.md"
METHODS_PAGE = REPOSITORY / "docs" / "methods.md"
BENCHMARKS_PAGE = REPOSITORY / "docs" / "benchmarks.md"
VOCAB_PAGE = REPOSITORY / "docs" / "vocab_parallel.md"
EXAMPLE_SCRIPT = REPOSITORY / "slurm" / "examples" / "tgpo_qwen25_math_7b.sbatch"
VOCAB_RESULTS = REPOSITORY / "benchmarks" / "results" / "vocab_parallel.json"

CONFIG_HEAD = """\
<!-- Written by tools/make_docs.py from megatron_opd/recipe/keys.py; edit that file. -->
# Keys of a recipe

A recipe is a YAML 1.2 file. Every key can be set on the command line too:
`rollout.num_prompts=32`, the value in YAML. An unknown key, a value out of range and a setting that
would have no effect are errors. `megatron-opd show RECIPE` prints a recipe with every default
filled in.

A recipe may say `base: NAME`, the file of another one beside it or its name: it then holds what
differs. Mappings are merged key by key, `method` is replaced, and `name` is its own.
"""

CLUSTER_HEAD = """\
<!-- Written by tools/make_docs.py from megatron_opd/cluster/profile.py; edit that file. -->
# Keys of a cluster profile

A profile is a YAML file that says what a Slurm cluster has, such as `slurm/a100.yaml`.
`megatron-opd launch RECIPE --cluster PROFILE` takes its name or its path, and `cluster.KEY=VALUE`
changes a key. [cluster.md](cluster.md) leads to a running job.
"""

METHOD_MODULES = (
    method, part, terms, advantages, rewards, student, teacher, ratios, gates, scales,
    corrections, schedules,
)  # fmt: skip

SHARED = Path("/shared/megatron-opd")  # where the example's checkout lies

METHOD_FORMS = """\
`method` has three spellings:

```yaml
method: tgpo                        # an entry of the catalogue (docs/methods.md)

method:                             # the entry with keys of its terms changed
  name: tgpo
  guidance: {weight: {start: 2e-3, decay: 1e-5}}

method:                             # in full; the name is for the logs
  name: imitation
  terms:
    imitate: {kind: cross_entropy, targets: teacher_argmax}
```

On the command line `method=grpo` replaces it, and `method.guidance.weight=0.5` changes a key of a
term. The sections below are the terms, and the parts they are made of: each is a mapping whose
`kind` says which it is, or names a class of yours, "module:Class" ([extending.md](extending.md)).
Advantages and gates have names of your choice; a term sums its advantages and multiplies its gates.
"""


@dataclass(frozen=True)
class SourceField:
    annotation: str
    comment: str


class SchemaSource:
    """What reflection does not see: type annotations as written, and the comment behind each
    field."""

    def __init__(self, *modules: Any) -> None:
        self.lines: dict[str, list[str]] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.aliases: dict[str, str] = {}
        for module in modules:
            text = Path(module.__file__).read_text()
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name], self.lines[node.name] = node, text.splitlines()
                elif isinstance(node, ast.Assign):
                    self.aliases[ast.unparse(node.targets[0])] = ast.unparse(node.value)

    def fields(self, name: str) -> dict[str, SourceField]:
        return {
            ast.unparse(node.target): SourceField(
                ast.unparse(node.annotation), self._comment(name, node)
            )
            for node in self.classes[name].body
            if isinstance(node, ast.AnnAssign)
        }

    def docstring(self, name: str) -> str:
        return " ".join((ast.get_docstring(self.classes[name]) or "").split())

    def _comment(self, name: str, node: ast.AnnAssign) -> str:
        """What stands behind the field, or in lines of its own before it."""
        before: list[str] = []
        for line in reversed(self.lines[name][: node.lineno - 1]):
            if not line.strip().startswith("# "):
                break
            before.insert(0, line.strip().removeprefix("# "))
        if before:
            return " ".join(before)
        end_line = self.lines[name][(node.end_lineno or node.lineno) - 1].encode()
        return end_line[node.end_col_offset :].decode().strip().removeprefix("#").strip()


# ----------------------------------------------------------------------------------- docs/config.md
def config_page() -> str:
    source = SchemaSource(config, keys, agents, recipe_data, recipe_rewards, *METHOD_MODULES)
    sections = [section(source, "", RunConfig)]
    for path, kind in nested(RunConfig):
        sections.append(section(source, path, kind))
        if path == "method":
            sections.append(METHOD_FORMS)
            sections += [
                section(source, where, kind)
                for where, kinds in METHOD_PARTS.items()
                for kind in kinds
            ]
        if path == "reward":
            kinds = get_args(recipe_rewards.Reward)
            sections += [section(source, "reward.rewards.NAME", kind) for kind in kinds]
        if path == "data.template":
            sections.append(section(source, "data.mixture.NAME", recipe_data.MixturePartConfig))
            sections.append(section(source, "data.heldout_sets.NAME", recipe_data.HeldoutSetConfig))
    return "\n".join([CONFIG_HEAD, *sections])


def nested(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Sections in the order of the schema. The teacher has the keys of the student, and its own."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        below = next((each for each in (hint, *get_args(hint)) if is_section(each)), None)
        if below is not None:
            yield f"{path}{name}", below
            yield from nested(below, f"{path}{name}.") if name != "teacher" else ()


def section(source: SchemaSource, path: str, kind: Any) -> str:
    title = f"## `{path}`" if path else "## Top level"
    if path == "student":
        title += " and `teacher`"
    if path == "teacher":
        title += ", further keys"
    if path in METHOD_PARTS or path == "reward.rewards.NAME":
        title += f": {kind.__name__}"
    written = source.fields(kind.__name__) | {
        "kind": SourceField(" | ".join(kinds_of(kind)) or "str", "")
    }
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for each in fields(kind):
        if kind is MethodConfig and each.name == "terms":
            continue  # the spellings below say what it holds
        if each.name not in written:
            continue  # of the class below it, which has a section
        field = written[each.name]
        explained = meaning(source, kind, each.name)
        cells = [f"`{each.name}`", readable(source, field.annotation), default(each), explained]
        rows.append(table_row(cells))
    about = source.docstring(kind.__name__)
    return "\n".join([title, "", *([about, ""] if about else []), *rows, ""])


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '\\|').replace('<', '&lt;') for cell in cells)} |"


def meaning(source: SchemaSource, kind: Any, name: str) -> str:
    """The comment of a key, that of the same key in a class above, or what its section says."""
    for owner in kind.__mro__:
        if owner.__name__ in source.classes:
            field = source.fields(owner.__name__).get(name)
            if field and field.comment:
                return field.comment
    if name == "kind":
        return "names this one"
    hint = get_type_hints(kind)[name]
    about = [
        source.docstring(each.__name__) for each in (hint, *get_args(hint)) if is_section(each)
    ]
    return about[0].split(". ")[0].rstrip(".") if about else ""


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


# ----------------------------------------------------------------------------- docs/cluster_keys.md
def cluster_page() -> str:
    source = SchemaSource(profile)
    below = {"": ClusterConfig, "container": ContainerConfig, "tunnel": TunnelConfig}
    return "\n".join([CLUSTER_HEAD, *(section(source, path, kind) for path, kind in below.items())])


def kinds_of(kind: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)["kind"]) if "kind" in get_type_hints(kind) else ()


METHOD_PARTS: dict[str, tuple[Any, ...]] = {
    "method.TERM": get_args(terms.Term),
    "method.TERM.advantages.NAME": get_args(advantages.Advantage),
    "method.TERM.ratio": get_args(ratios.Ratio),
    "method.TERM.gates.NAME": get_args(gates.Gate),
    "method.TERM.correction": (corrections.Correction,),
    "weight": (LinearDecay, CosineDecay, Switch),
}
RANGES = {
    "PositiveInt": "int >= 1",
    "NonNegativeInt": "int >= 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float >= 0",
    "Fraction": "float, 0 to 1",
    "Temperature": "float, 0.01 to 2",
    "Seed": "int, 0 to 2^32 - 1",
    "Seconds": "float > 0",
    "Gibibytes": "float > 0",
    "ProperFraction": "float, 0 to below 1",
    "Weight": "float >= 0, or a weight over steps",
    "SignedWeight": "float, or a weight over steps",
    "Ratio": "a ratio",
    "Annotated[float, Gt(0), Le(1)]": "float, above 0 to 1",
    "Annotated[float, Gt(0)]": "float > 0",
    "dict[str, MixturePartConfig | None]": "parts by name",
    "dict[str, HeldoutSetConfig | None]": "sets by name",
    "dict[str, Reward | None]": "rewards by name",
    "dict[str, Advantage]": "advantages by name",
    "dict[str, Gate]": "gates by name",
}


def readable(source: SchemaSource, annotation: str) -> str:
    written = RANGES.get(annotation) or source.aliases.get(annotation, annotation)
    if written.startswith("Literal["):
        return " | ".join(written[len("Literal[") : -1].replace("'", "").split(", "))
    return written.replace("None", "null")


def default(each: Any) -> str:
    if each.default is MISSING and each.default_factory is MISSING:
        return "required"
    if each.default is MISSING:
        made = each.default_factory()
        return (f"`{json.dumps(made)}`" if isinstance(made, list) else "GRPO's") if made else "none"
    return "see below" if is_dataclass(each.default) else f"`{json.dumps(each.default)}`"


# ------------------------------------------------------------------------------- pages with a table
def with_table(page: str, name: str, table: str) -> str:
    """The page with `table` between its two marks."""
    begins = f"<!-- {name}: begin (make docs) -->"
    ends = f"<!-- {name}: end -->"
    before, begun, rest = page.partition(begins)
    _, ended, after = rest.partition(ends)
    if not (begun and ended):
        sys.exit(f"docs: the lines {begins} and {ends} are missing; put them where the table goes")
    return f"{before}{begins}\n{table}{ends}{after}"


# --------------------------------------------------------------------------------- docs/commands.md
def commands_table() -> str:
    """Every command, as `megatron-opd --help` has it."""
    rows = [f"| `{name}` | {text} |" for name, text in described_commands().items()]
    return "\n".join(["| command | |", "|---|---|", *rows]) + "\n"


# ---------------------------------------------------------------------------------- docs/methods.md
def methods_page() -> str:
    """The formulas of every family of parts, and the catalogue."""
    families = {
        "terms": terms.Term,
        "advantages": advantages.Advantage,
        "ratios": ratios.Ratio,
        "gates": gates.Gate,
    }
    page = METHODS_PAGE.read_text()
    for name, union in families.items():
        page = with_table(page, name, parts_table(union))
    return with_table(page, "catalogue", catalogue_table())


# --------------------------------------------------------------------------- docs/vocab_parallel.md
def vocab_table() -> str:
    """Times of every case, and under them what does not depend on the case much: bytes and
    collectives."""
    measured = json.loads(VOCAB_RESULTS.read_text())
    names = list(dict.fromkeys(name for case in measured["results"] for name in case["rows"]))
    head = ["TP", "T x V", "K", "dtype", *names]
    lines = [
        f"On {measured['machine']}, torch {measured['torch']}. Forward and backward, milliseconds: "
        "minimum (maximum)."
    ]
    lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case in measured["results"]:
        cells = [
            str(case["tp"]),
            f"{case['tokens']} x {case['vocab']}",
            str(case["k"]),
            case["dtype"],
        ]
        for name in names:
            row = case["rows"].get(name)
            cells.append(
                f"{1e3 * row['seconds_min']:.0f} ({1e3 * row['seconds_max']:.0f})" if row else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Bytes per logit alive at the peak besides the logits, and collectives (TP 2), at K = 1 "
        "and the larger V:",
    ]
    lines += [
        "",
        "| implementation | bfloat16 | float32 | collectives |",
        "| --- | --- | --- | --- |",
    ]
    widest = max(case["vocab"] for case in measured["results"])
    facts = {
        (case["dtype"], case["tp"]): case["rows"]
        for case in measured["results"]
        if case["k"] == 1 and case["vocab"] == widest
    }
    for name in names:
        size = [facts[dtype, 1].get(name) for dtype in ("bfloat16", "float32")]
        shared = [
            rows[name]["collectives"] for (_, tp), rows in facts.items() if tp > 1 and name in rows
        ]
        cells = [f"{each['bytes_per_logit']:.2f}" if each else "" for each in size]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {max(shared) if shared else ''} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- docs/benchmarks.md
def suites_table() -> str:
    """Every suite, as `megatron-opd bench list` has it."""
    rows = listed_suites()
    names = list(rows[0].samples)
    lines = [f"| suite | | N | samples: {', '.join(names)} | grader | data | licence of the data |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        samples = ", ".join(str(row.samples[name]) for name in names)
        number = "as filtered" if row.questions is None else f"{row.questions:,}"
        cells = (f"`{row.name}`", row.title, number, samples, row.grader, row.data, row.licence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------- slurm/examples
def example_script() -> str:
    """What `megatron-opd launch --prepare` writes of the paper's run, for a checkout in SHARED."""
    run_dir, python = SHARED / "runs" / "tgpo_qwen25_math_7b", SHARED / ".venv" / "bin" / "python"
    cluster = load_profile("a100", ["account=my-account", "partition=batch"])
    return script.sbatch(
        Job("tgpo_qwen25_math_7b", str(run_dir), str(SHARED), str(python), cluster)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a page is stale"
    )
    check = parser.parse_args().check
    stale = False
    pages = {
        CONFIG_PAGE: config_page(),
        CLUSTER_PAGE: cluster_page(),
        COMMANDS_PAGE: with_table(COMMANDS_PAGE.read_text(), "commands", commands_table()),
        METHODS_PAGE: methods_page(),
        EXAMPLE_SCRIPT: example_script(),
        BENCHMARKS_PAGE: with_table(BENCHMARKS_PAGE.read_text(), "suites", suites_table()),
        VOCAB_PAGE: with_table(VOCAB_PAGE.read_text(), "measured", vocab_table()),
    }
    for path, text in pages.items():
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        print(
            f"{path.relative_to(REPOSITORY, walk_up=True)}: "
            + ("stale; run `make docs`" if check else "written")
        )
        if not check:
            path.write_text(text)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())

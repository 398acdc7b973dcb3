"""The plan as text (tables on a terminal, plain lines otherwise) and as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.planning.case import Case
from megatron_opd.planning.engine_memory import engine
from megatron_opd.planning.hardware import GIB
from megatron_opd.planning.layouts import Candidate
from megatron_opd.planning.memory import RankKind
from megatron_opd.planning.step_time import StepTime

SHOWN = 12  # lines of each table

Rows = Sequence[Sequence[str]]


def print_plan(
    case: Case, own: Candidate, others: Sequence[Candidate], notes: Sequence[str]
) -> None:
    """The recipe's own layout by rank kind and phase, then the candidates."""
    hardware = case.hardware
    print(
        f"{case.config.name}: {case.config.method.name} on {case.gpus} x {hardware.name}, "
        f"{case.gpus_per_node} a node"
    )
    for note in notes:
        print(f"note: {note}")
    reserve = ""
    if hardware.reserve:
        reserve = f", {hardware.reserve / GIB:g} of {hardware.memory / GIB:.1f} set aside"
    _print_rows(
        f"The recipe's layout: GiB of a rank, of {hardware.limit / GIB:.1f}{reserve}",
        ("ranks", "phase", "total", "made of"),
        [row for kind in own.kinds for row in _phase_rows(case, kind)],
    )
    if case.generates:
        print(_engine_line(case))
    print(f"fits: {'yes' if own.lacks is None else f'no; {own.lacks}'}")
    print(f"seconds of a step, estimated: {_times(own.time)}\n")
    fitting, lacking = by_student(others)
    total = sum(candidate.lacks is None for candidate in others)
    head = ("student", "teacher", "peak GiB", "step s", "of it generate, teacher, train, refit")
    counted = "pairs of layouts" if own.teacher else "layouts"
    title = f"{total} of {len(others)} {counted} fit. Of each of the student's, the fastest:"
    _print_rows(title, head, [_row(candidate) for candidate in fitting[:SHOWN]])
    if lacking:
        title = "The others:"
        if own.teacher:
            title = "Of the student's layouts that fit with none, what needs least:"
        rows = [(*_row(candidate)[:4], str(candidate.lacks)) for candidate in lacking[:SHOWN]]
        _print_rows(title, (*head[:4], "lacks"), rows)


def by_student(others: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """One candidate for each layout of the student, in two lists.

    The first has the fastest that fits. If none does, the second has the one that needs least.
    """
    fastest: dict[LayoutConfig, Candidate] = {}
    smallest: dict[LayoutConfig, Candidate] = {}
    for candidate in others:
        student = candidate.student
        if candidate.lacks is None:
            fastest.setdefault(student, candidate)
        elif student not in smallest or candidate.peak < smallest[student].peak:
            smallest[student] = candidate
    lacking = [candidate for student, candidate in smallest.items() if student not in fastest]
    return list(fastest.values()), lacking


def as_json(
    case: Case, own: Candidate, others: Sequence[Candidate], notes: Sequence[str]
) -> dict[str, Any]:
    """The whole plan, in bytes and seconds, of the types that JSON reads back."""
    plan = {
        "recipe": case.config.name,
        "method": case.config.method.name,
        "gpus": case.gpus,
        "gpus_per_node": case.gpus_per_node,
        "hardware": asdict(case.hardware),
        "limit_bytes": case.hardware.limit,
        "notes": list(notes),
        "own": _as_dict(own),
        "layouts": [_as_dict(candidate) for candidate in others],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(plan))  # tuples have become lists
    return as_read


def _as_dict(candidate: Candidate) -> dict[str, Any]:
    seconds: dict[str, float | None] = asdict(candidate.time)
    for phase, estimate in asdict(candidate.time).items():
        if not isfinite(estimate):
            seconds[phase] = None
    return {
        "student": asdict(candidate.student),
        "teacher": asdict(candidate.teacher) if candidate.teacher else None,
        "fits": candidate.lacks is None,
        "lacks": candidate.lacks,
        "peak_bytes": candidate.peak,
        "seconds": seconds,
        "ranks": [asdict(kind) for kind in candidate.kinds],
    }


def _phase_rows(case: Case, kind: RankKind) -> list[tuple[str, str, str, str]]:
    last = kind.first_rank + kind.ranks - 1
    ranks = str(kind.first_rank) if kind.ranks == 1 else f"{kind.first_rank}-{last}"
    if case.config.processes_apart:
        ranks += f" {', '.join(kind.stages)}"
    rows = []
    for phase, items in kind.phases.items():
        shown = {item: size / GIB for item, size in items.items() if size >= GIB / 200}
        made_of = ", ".join(f"{item} {size:.2f}" for item, size in shown.items())
        mark = " !" if kind.total(phase) > case.hardware.limit else ""
        named = f"{phase}, idle" if phase in kind.idle else phase
        rows.append((ranks, named, f"{kind.total(phase) / GIB:.2f}{mark}", made_of))
    return rows


def _engine_line(case: Case) -> str:
    memory = engine(case, "student")
    longest = case.config.max_sequence_length
    return (
        f"engine of a rank: {max(memory.cache, 0) / GIB:.2f} GiB of keys and values hold "
        f"{memory.sequences(longest)} sequences of {longest} tokens"
    )


def _row(candidate: Candidate) -> tuple[str, str, str, str, str]:
    time = candidate.time
    phases = f"{time.generate:.0f}, {time.teacher:.0f}, {time.train:.0f}, {time.refit:.1f}"
    teacher = str(candidate.teacher) if candidate.teacher else "-"
    peak = f"{candidate.peak / GIB:.1f}"
    return str(candidate.student), teacher, peak, f"{time.total:.0f}", phases


def _times(time: StepTime) -> str:
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in asdict(time).items())
    return f"{time.total:.3g} ({phases})"


def _print_rows(title: str, head: Sequence[str], rows: Rows) -> None:
    if not sys.stdout.isatty():
        print(title)
        for row in rows:
            print("  " + " | ".join(row))
        return
    table = Table(title=title, title_justify="left")
    for name in head:
        is_number = name in ("total", "peak GiB", "step s")
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)

"""Renders a directory of results into one HTML file that needs nothing else."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_opd.bench import plots
from megatron_opd.bench.papers import PaperRow, read_papers
from megatron_opd.bench.results import Result, SuiteResult, read_result, read_samples_by_suite
from megatron_opd.bench.table import notes_of, over_seeds, percent
from megatron_opd.contracts.suites import GradedSample
from megatron_opd.errors import DataError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.report.samples import shorten
from megatron_opd.report.template import page_template

_PER_KIND = 2  # samples that the page shows of right, wrong and cut ones
_MOST_PROMPT = 900  # characters
_MOST_TEXT = 1600
# Their authors ask that the questions are not put where crawlers find them.
_NOT_SHOWN = "gpqa"


@dataclass(frozen=True)
class Excerpt:
    """A sample of the page."""

    kind: str  # "right", "wrong" or "cut"
    key: str
    prompt: str
    gold: str
    extracted: str  # "" where a program decides: it is what the text shows
    reason: str
    tokens: int
    head: str
    hidden: int  # characters between head and tail
    tail: str


@dataclass(frozen=True)
class PaperLine:
    """A paper's row and how it stands to ours."""

    row: PaperRow
    paper: str
    difference: str  # in points; "" where it does not measure the same
    seeds: str  # the difference that other seeds alone make, in 19 cases of 20
    apart: str  # why it does not
    note: str


@dataclass(frozen=True)
class Section:
    """A suite of the page."""

    name: str
    suite: SuiteResult
    notes: list[str]
    pictures: list[plots.Picture]
    papers: list[PaperLine]
    parts: list[tuple[str, str]]
    excerpts: list[Excerpt]
    withheld: bool  # its questions are not printed
    how: str  # how it was asked, in a sentence
    settings: list[tuple[str, str]]


def write_page(directory: Path) -> Path:
    """Writes `report.html` from results.json and samples.parquet, and returns its path.

    Raises DataError, which names the file, where one is not what bench writes.
    """
    result = read_result(directory)
    by_suite = read_samples_by_suite(directory, result)
    sections = [_section(name, result, samples) for name, samples in by_suite.items()]
    same = {one.name: [line.row for line in one.papers if not line.apart] for one in sections}
    page = page_template(Path(__file__).parent, "report.html.j2").render(
        title=str(result.model.get("path", "results")),
        result=result,
        picture=plots.scores(result, same) if sections else None,
        sections=sections,
        papers=[
            paper
            for name, paper in read_papers().papers.items()
            if any(line.row.paper == name for one in sections for line in one.papers)
        ],
        provenance=[("model", list(_flat(result.model))), ("engine", list(_flat(result.engine)))],
        pct=percent,
        over_seeds=over_seeds,
    )
    path = directory / "report.html"
    try:
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); make the directory writable"
        ) from None
    return path


def _section(name: str, result: Result, samples: Sequence[GradedSample]) -> Section:
    suite = result.suites[name]
    pictures = [plots.lengths(samples, suite.protocol.max_tokens)]
    if suite.summary.samples > 1:  # one sample of a question is right or wrong
        pictures.insert(0, plots.questions(samples))
    of_groups = plots.groups(samples, result)
    withheld = any(_NOT_SHOWN in str(one).lower() for one in (name, suite.data.get("hub")))
    return Section(
        name=name,
        suite=suite,
        notes=notes_of(name, suite),
        pictures=[*pictures, *([of_groups] if of_groups else [])],
        papers=_papers(name, suite),
        parts=[(part.replace("_", " "), percent(v)) for part, v in suite.summary.parts.items()],
        excerpts=[] if withheld else _excerpts(samples),
        withheld=withheld,
        how=_how(suite),
        settings=_settings(suite),
    )


def _how(suite: SuiteResult) -> str:
    """How the questions were asked and graded, and where they are from."""
    protocol = suite.protocol
    drawn = f"at temperature {protocol.temperature:g}, top_p {protocol.top_p:g}"
    words = [
        f"{suite.summary.samples} of every question"
        if suite.summary.samples > 1
        else "every question once",
        "greedily" if protocol.temperature == 0 else drawn,
        f"at most {protocol.max_tokens:,} tokens",
    ]
    if protocol.shuffle != "none":
        words.append(f"options shuffled for every {protocol.shuffle}")
    versions = ", ".join(
        f"{package} {version}" for package, version in suite.grader.versions.items()
    )
    data = suite.data.get("hub") or suite.data.get("path") or "data that are not named"
    return (
        f"Protocol {protocol.name}: {', '.join(words)}. Graded by {suite.grader.name}"
        f"{f' ({versions})' if versions else ''}. Questions: {data}."
    )


def _papers(name: str, suite: SuiteResult) -> list[PaperLine]:
    of = suite.summary
    packaged = read_papers()
    same, apart = packaged.beside(name, of.questions, of.samples)
    seeds = ""
    if of.seed_error is not None:  # of both, taken to have the same
        seeds = f"± {100 * 1.96 * math.sqrt(2) * of.seed_error:.1f}"
    lines = []
    for row in same:
        paper = packaged.papers[row.paper]
        points = f"{100 * of.score - float(row.score):+.1f}"
        other = suite.protocol.name != paper.protocol
        protocol = f"ours by the protocol {suite.protocol.name}" if other else ""
        note = "; ".join(filter(None, [protocol, row.note]))
        lines.append(PaperLine(row, paper.title, points, seeds, "", note))
    for row in apart:
        measure = f"{row.questions} x {row.samples}, ours {of.questions} x {of.samples}"
        note = "; ".join(filter(None, [measure, row.note]))
        lines.append(PaperLine(row, packaged.papers[row.paper].title, "", "", measure, note))
    return lines


def _excerpts(samples: Sequence[GradedSample]) -> list[Excerpt]:
    """Some right, wrong and cut samples, of different questions."""
    chosen: list[Excerpt] = []
    shown: set[str] = set()
    for kind in ("right", "wrong", "cut"):
        left = _PER_KIND
        for one in samples:
            if left and one.key not in shown and _kind(one) == kind:
                chosen.append(_excerpt(one, kind))
                shown.add(one.key)
                left -= 1
    return chosen


def _kind(one: GradedSample) -> str:
    if one.verdict.correct:
        return "right"
    return "cut" if one.truncated else "wrong"


def _excerpt(one: GradedSample, kind: str) -> Excerpt:
    whole = len(one.text) <= _MOST_TEXT
    return Excerpt(
        kind=kind,
        key=one.key,
        prompt=shorten(one.prompt, _MOST_PROMPT),
        gold=shorten(one.gold, 200),
        extracted=shorten(one.verdict.extracted, 200) if one.gold else "",
        reason=one.verdict.reason.replace("_", " "),
        tokens=one.tokens,
        head=one.text if whole else one.text[: _MOST_TEXT * 2 // 3],
        hidden=0 if whole else len(one.text) - _MOST_TEXT // 3 * 3,
        tail="" if whole else one.text[-(_MOST_TEXT // 3) :],
    )


def _settings(suite: SuiteResult) -> list[tuple[str, str]]:
    """The protocol, the data and the grader, as keys and values."""
    protocol = {field.name: getattr(suite.protocol, field.name) for field in fields(suite.protocol)}
    grader = asdict(suite.grader)
    return [*_flat(protocol), *_flat(suite.data, "data."), *_flat(grader, "grader.")]


def _flat(mapping: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in ("", None):
            yield f"{prefix}{key}", str(value)

"""Writes the page that compares runs."""

import base64
from collections.abc import Sequence
from pathlib import Path

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.report.comparison import Comparison, compare_runs, curves, labels_of
from megatron_opd.report.plots import draw
from megatron_opd.report.run import read_run
from megatron_opd.report.template import page_template

_MARK = "Made by <code>megatron-opd report"
_MOST_CHARACTERS = 100  # of a file name


def write_comparison(
    run_dirs: Sequence[str | Path], out: Path | None = None
) -> tuple[Path, Comparison]:
    """Writes one HTML file that compares two or more runs, to `out` or beside the first run.

    Raises ConfigError for a bad `out` or a run that is named twice, DataError for what is not a
    run's directory.
    """
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise ConfigError(f"{run_dirs[place]}: named twice; a run has nothing to add to itself")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    if out is None:
        names = "-".join(path.name for path in paths)
        out = runs[0].directory.absolute().parent / f"report-{names[:_MOST_CHARACTERS]}.html"
    _check_out(out)
    comparison = compare_runs(runs)
    plots = draw([], curves(runs), wide=("eval_accuracy",))
    page = page_template(Path(__file__).parent, "comparison.html.j2").render(
        title=" · ".join(labels_of(runs)),
        comparison=comparison,
        plots=[(plot, base64.b64encode(plot.png).decode()) for plot in plots],
    )
    try:
        write_atomically(out, page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); give --out another file"
        ) from None
    return out, comparison


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a directory; name a file in it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent} is no directory; make it first")
    if out.exists() and _MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"--out: {out} is not a page of this command; name another file")

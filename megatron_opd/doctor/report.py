"""The doctor's report, and the processes it starts on a recipe's layout."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.checks.processes import processes_needed
from megatron_opd.doctor.finding import Finding
from megatron_opd.doctor.judge import judge
from megatron_opd.doctor.packages import check_packages
from megatron_opd.errors import Interrupted, OpdError, RunError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import dump_config


def print_report(config: RunConfig | None, nproc: int | None = None) -> int:
    """Prints one line per check. Returns 1 if any failed, else 0.

    With a recipe: its pre-flight checks, and then small random models of its kinds on its layout,
    in `nproc` processes (None: as few as it needs).
    """
    failed = False
    for finding in _findings(config, nproc):
        print(f"{finding.status:4}  {finding.subject:18}  {finding.text}", flush=True)
        failed |= finding.status == "fail"
    return int(failed)


def _findings(config: RunConfig | None, nproc: int | None) -> Iterator[Finding]:
    yield from check_packages()
    if config is None:
        return
    before = list(_preflight(config, nproc))
    yield from before
    if all(finding.status != "fail" for finding in before):
        with tempfile.TemporaryDirectory(prefix="megatron-opd-doctor-") as folder:
            yield from check_layout(config, nproc or processes_needed(config), Path(folder))


def _preflight(config: RunConfig, nproc: int | None) -> Iterator[Finding]:
    from megatron_opd.checks.training import check_recipe

    subject = f"recipe {config.name}"
    try:
        for warning in check_recipe(config, world_size=nproc or processes_needed(config)):
            yield Finding("warn", subject, warning)
    except OpdError as error:
        yield Finding("fail", subject, str(error))
    else:
        yield Finding(
            "ok", subject, "the recipe, its models and its data pass every pre-flight check"
        )


def check_layout(config: RunConfig, nproc: int, folder: Path) -> Iterator[Finding]:
    """The judged measurements on the recipe's layout; `folder` gets the small models."""
    from megatron_opd.doctor.shrink import alone, shrink

    small = shrink(config, folder, nproc)
    try:
        on_one = _on_one_process(alone(small))
        on_layout = _on_layout(small, nproc)
    except Interrupted:
        raise
    except OpdError as error:
        yield Finding("fail", "layout", str(error))
    else:
        yield from judge(small, nproc, on_layout, on_one)


def _on_one_process(config: RunConfig) -> list[dict[str, float]]:
    """The reference: what `measure_updates` returns in this process."""
    from megatron_opd.doctor.measure import measure_updates
    from megatron_opd.world import processes

    processes.start()
    try:
        return measure_updates(config)
    finally:
        processes.stop()


def _on_layout(config: RunConfig, nproc: int) -> dict[str, Any]:
    """The result of `measure` in `nproc` processes. Raises RunError, Interrupted."""
    from megatron_opd.world.torchrun import run_workers

    folder = Path(config.directory)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_config(config))
    code, message = run_workers(nproc, ["-m", "megatron_opd.doctor.worker", str(folder)])
    if code == Interrupted.exit_code:
        raise Interrupted(message)
    if code:
        raise RunError(f"on {nproc} processes: {message}")
    return json.loads((folder / "measured.json").read_text())

"""The files of a conversion: written, read back, and marked as done when no tensor differs.

NAME.done, beside such a file, has its size and SHA-256, and what its format says of its contents.
"""

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

from megatron_opd.conversion.directions import Conversion
from megatron_opd.errors import DataError, RunError
from megatron_opd.files.manifest import CheckedFile, NewFile, describe, sync
from megatron_opd.weights.distributed import Records

DONE = ".done"
Report = Callable[[str, int, bool], None]  # file, bytes, whether it was there already


def write_files(
    conversion: Conversion,
    partial: Path,
    names: list[str],
    report: Report,
    pool: Executor,
    checks: list[Future[None]],
) -> None:
    """Writes the files, and reads each one back while the next is written.

    Stops when a check of the source fails.
    """
    seals = []
    for name in names:
        for check in checks:
            if check.done():
                check.result()
        path = partial / name
        if kept := _is_done(path):
            report(name, path.stat().st_size, kept)
            continue
        with NewFile(path) as file:
            records = conversion.write(file, name)
        seals.append(pool.submit(_seal, conversion, partial, name, records))
        report(name, path.stat().st_size, kept)
    for seal in seals:
        seal.result()


def _seal(conversion: Conversion, partial: Path, name: str, records: Records) -> None:
    """Reads a file back and, when no tensor differs from its source, leaves NAME.done beside it."""
    path = partial / name
    with CheckedFile(path) as file:
        try:
            tensor = conversion.differing(file, name, records)
        except DataError as error:
            tensor = str(error)
        written = file.record()
    if tensor is not None:
        raise RunError(f"{path}: does not read back as it was written, at {tensor}; check the disk")
    sync(path)
    done = path.with_name(path.name + DONE)
    done.write_text(json.dumps({"file": written, "records": records}))
    sync(done)


def _is_done(path: Path) -> bool:
    try:
        return json.loads(path.with_name(path.name + DONE).read_text())["file"] == describe(path)
    except (OSError, ValueError):
        return False

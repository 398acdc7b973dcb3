"""The files that `data.train` and `data.heldout` name: paths and patterns -> files, and what is in
them as hashes."""

import glob
from pathlib import Path

from megatron_opd.errors import DataError
from megatron_opd.files.manifest import describe
from megatron_opd.recipe.keys import DataConfig

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


def data_files(paths: str | list[str], key: str) -> list[Path]:
    """The files behind a path, a pattern such as `data/train-*.parquet`, or a list of both, in that
    order.

    What a pattern matches is sorted by name. `key` is where the recipe has them, for messages.

    Raises DataError when nothing is there, or something that is no data file.
    """
    files = []
    for path in [paths] if isinstance(paths, str) else paths:
        files += _expand(path, key)
    if not files:
        raise DataError(f"{key}: names no file; give at least one")
    return files


def shown(paths: str | list[str]) -> str:
    """A path, or several, for a message."""
    return paths if isinstance(paths, str) else ", ".join(paths)


def data_sha256(data: DataConfig) -> dict[str, str]:
    """File -> SHA-256 of its bytes, for every file of the training and the held-out data.

    It reads them whole, which takes a small part of the time that parsing them does. Raises
    DataError.
    """
    files = data_files(data.train, "data.train")
    if data.heldout_set is not None:
        files += data_files(data.heldout_set.path, "data.heldout")
    return {str(path): _sha256(path) for path in files}


def changed_data(stored: dict[str, str], data: DataConfig) -> str | None:
    """The first file that is not what it was when `stored` was made by `data_sha256`, or None.

    A file more or fewer counts. `stored` empty: of a run that kept none, so nothing can be said.
    Raises DataError.
    """
    if not stored:
        return None
    now = data_sha256(data)
    return next(
        (name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)), None
    )


def _expand(path: str, key: str) -> list[Path]:
    if glob.has_magic(path) and not Path(path).exists():
        matches = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        if not matches:
            raise DataError(f"{path}: matches no file; check {key}")
        return [_data_file(match, key) for match in matches]
    return [_data_file(Path(path), key)]


def _data_file(path: Path, key: str) -> Path:
    try:
        exists, is_directory = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise DataError(f"{key}: {str(path)!r:.80} cannot be a file's name ({error})") from None
    if is_directory:
        raise DataError(f"{path}: a directory; name its files, as in {key}={path}/*.parquet")
    if not exists:
        raise DataError(f"{path}: no such file; check {key}")
    if not path.name.endswith(KINDS):
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'; give a .jsonl or a .parquet file "
            "(or a .json, .jsonl.gz or .json.gz one)"
        )
    return path


def _sha256(path: Path) -> str:
    try:
        return describe(path)["sha256"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None

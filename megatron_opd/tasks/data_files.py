"""The files of the paths and patterns of `data.train` and `data.heldout`, and their hashes."""

import glob
from pathlib import Path

from megatron_opd.errors import DataError
from megatron_opd.files.manifest import describe
from megatron_opd.recipe.data import DataConfig

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


def data_files(paths: str | list[str], key: str) -> list[Path]:
    """The files of a path, of a pattern such as `data/train-*.parquet`, or of a list of these.

    They are in the list's order, and those of a pattern sorted by name. `key` is the recipe's key,
    for messages. Raises DataError for no file, and for one that is no data file.
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
    """The SHA-256 of every file of the data, and of a chat template, by name.

    Reads the files whole, which takes little time compared with parsing them. Raises DataError.
    """
    files = [path for key, paths in data.files.items() for path in data_files(paths, key)]
    files += map(Path, data.templates)
    return {str(path): _sha256(path) for path in dict.fromkeys(files)}


def changed_data(stored: dict[str, str], data: DataConfig) -> str | None:
    """The first file that has changed, come or gone since `data_sha256` returned `stored`, or None.

    Nothing is compared if `stored` is empty, for a run that kept no hashes. Raises DataError.
    """
    if not stored:
        return None
    now = data_sha256(data)
    changed = [name for name in {*stored, *now} if stored.get(name) != now.get(name)]
    return min(changed, default=None)


def _expand(path: str, key: str) -> list[Path]:
    if glob.has_magic(path) and not Path(path).exists():
        matches = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        if not matches:
            raise DataError(f"{path}: matches no file; check {key}")
        return [_data_file(match, key) for match in matches]
    return [_data_file(Path(path), key)]


def _data_file(path: Path, key: str) -> Path:
    try:
        exists = path.exists()
        is_directory = path.is_dir()
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

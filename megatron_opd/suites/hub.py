"""Data sets of the Hugging Face Hub: downloaded, or from its cache where there is no network."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_opd.errors import DataError, first_line
from megatron_opd.suites.suite import Suite

_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Files that are read. No data set is called so.
KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".arrow")
Choose = Callable[[Sequence[str]], list[str]]  # a suite's files among names


class HubData(NamedTuple):
    """ORGANISATION/NAME, and a branch, tag or commit if not the newest."""

    name: str
    revision: str | None


class Fetched(NamedTuple):
    """Files of a data set by name, and the commit they are of."""

    files: dict[str, Path]
    commit: str


def parse_id(text: str) -> HubData | None:
    """The data set that a text may mean on the Hub; None where it can only be a path."""
    match = _ID.fullmatch(text)
    if match is None or text.endswith(KINDS) or Path(text).exists() or Path(text).parent.exists():
        return None
    return HubData(match["name"], match["revision"])


def fetched(suite: Suite, data: HubData, choose: Choose) -> Fetched:
    """The files of a data set that `choose` takes.

    Raises DataError, with the remedy, where they cannot be had.
    """
    from huggingface_hub.errors import GatedRepoError

    try:
        return _downloaded(data, choose)
    except DataError:  # it was reached, and has other files
        raise
    except Exception as error:  # the network, the Hub and the disk fail in many types
        if cached := _cached(data, choose):
            return cached
        here = f"give its file or folder as {suite.own_data}"
        if isinstance(error, GatedRepoError):
            raise DataError(
                f"{suite.name}: {data.name} is gated; accept its terms on its page and set "
                f"HF_TOKEN, or {here}"
            ) from None
        cause = first_line(error)
        option = f" --revision {data.revision}" if data.revision else ""
        gated = " (gated: it needs HF_TOKEN)" if suite.gated else ""
        raise DataError(
            f"{suite.name}: {data.name} cannot be had from the Hugging Face Hub ({cause:.200}); "
            f"{here}, or run where there is a network: hf download --repo-type dataset "
            f"{data.name}{option}{gated}"
        ) from None


def _downloaded(data: HubData, choose: Choose) -> Fetched:
    from huggingface_hub import HfApi, hf_hub_download

    page = HfApi().dataset_info(data.name, revision=data.revision)
    assert page.sha is not None and page.siblings is not None
    files = {}
    for name in choose([file.rfilename for file in page.siblings]):
        path = hf_hub_download(data.name, name, repo_type="dataset", revision=page.sha)
        files[name] = Path(path)
    return Fetched(files, page.sha)


def _cached(data: HubData, choose: Choose) -> Fetched | None:
    """The files that were downloaded before; None where there are none."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                data.name, repo_type="dataset", revision=data.revision, local_files_only=True
            )
        )
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        chosen = choose(sorted(names))
    except Exception:  # not there, or not whole: the reason for the download's failure is shown
        return None
    return Fetched({name: folder / name for name in chosen}, folder.name) if chosen else None

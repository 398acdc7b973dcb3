"""The folder that a program may write to: counted while it runs, emptied afterwards."""

import itertools
import os


def more_than(folder: str, most_entries: int) -> bool:
    """Whether there are more files and folders beneath `folder`, or some that cannot be counted."""
    count = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > most_entries:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:  # the program has removed it
            continue
        except OSError:  # it has no rights, or its path is too long
            return True
    return False


def empty(folder: str) -> None:
    """Removes all beneath `folder`, however deep and whatever its modes.

    What lies in a folder is first brought up, so that no path is longer than the system allows.
    """
    numbers = itertools.count()
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if not _opened(path):
                os.unlink(path)
                continue
            for inner in os.listdir(path):
                inner_path = os.path.join(path, inner)
                _opened(inner_path)  # without its rights, a folder cannot be moved
                os.rename(inner_path, _free(folder, numbers))
            os.rmdir(path)


def _opened(path: str) -> bool:
    """Whether it is a folder, which then has all of its owner's rights."""
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    os.chmod(path, 0o700)
    return True


def _free(folder: str, numbers: "itertools.count[int]") -> str:
    return next(
        path for number in numbers if not os.path.lexists(path := os.path.join(folder, f"{number}"))
    )

"""Tokens that two vocabularies count as one. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MergedIds:
    """Ends that the teacher alone has, and the student's end that gets their probability."""

    ids: tuple[int, ...]
    into: int

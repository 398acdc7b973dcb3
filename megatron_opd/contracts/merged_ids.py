"""Tokens that two vocabularies count as one. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MergedIds:
    """Tokens whose probability another one gets: ends that the teacher alone has, and an end of the
    student's."""

    ids: tuple[int, ...]
    into: int

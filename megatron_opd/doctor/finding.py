"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    status: Literal["ok", "warn", "fail"]
    subject: str
    text: str

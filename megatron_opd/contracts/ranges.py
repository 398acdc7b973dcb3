"""Ranges of the numbers in recipes and model directories, as types. Imports no torch."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

_MOST = 2**31 - 1  # what counts things stays within C's int
PositiveInt = Annotated[int, Ge(1), Le(_MOST)]
NonNegativeInt = Annotated[int, Ge(0), Le(_MOST)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy's range
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Temperature = Annotated[float, Ge(0.01), Le(2)]  # vLLM takes less for 0.01, and refuses more
Seconds = Annotated[float, Gt(0), Le(86400)]
Gibibytes = Annotated[float, Gt(0), Le(2**20)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]

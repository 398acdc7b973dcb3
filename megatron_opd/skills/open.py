"""The retriever that a recipe asks for."""

from typing import assert_never

from megatron_opd.contracts.skills import Retriever
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.agents import SkillsConfig
from megatron_opd.skills.bank import load_bank
from megatron_opd.skills.matching import by_substring, by_words
from megatron_opd.skills.retrieval import BestOne, Full, Matching, WrongOne


def open_retriever(config: SkillsConfig, seed: int) -> Retriever:
    """The recipe's retriever, on its bank. Raises ConfigError for a bank that does not serve."""
    bank = load_bank(config.bank)
    choosing = config.retrieval in ("random", "ucb")
    if choosing and len(bank.categories) < 2:
        raise ConfigError(
            f"skills.retrieval: {config.retrieval} chooses among categories, and {bank.path} has "
            f"{len(bank.categories)}; set skills.retrieval=full"
        )
    match config.retrieval:
        case "keyword":
            return Matching(bank, by_words)
        case "substring":
            return Matching(bank, by_substring)
        case "full":
            return Full(bank)
        case "random":
            return WrongOne(bank, seed)
        case "ucb":
            return BestOne(bank, seed, config.exploration)
        case _:
            assert_never(config.retrieval)

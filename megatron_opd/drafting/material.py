"""What is seen of the models and the data before a recipe is drafted. No torch."""

from dataclasses import dataclass
from pathlib import Path

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.known import architectures
from megatron_opd.drafting.answers import Answers
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.rows import BadRows
from megatron_opd.recipe.data import DataConfig, TemplateConfig
from megatron_opd.tasks.data import load_tasks
from megatron_opd.tasks.data_files import data_files
from megatron_opd.tasks.examples import read_examples
from megatron_opd.tasks.template import check_chat_template
from megatron_opd.tasks.tokenizer import Tokenizer, tokenizer_for_checks

UNLIMITED = 2**31


@dataclass(frozen=True)
class Material:
    """Facts of the models and the data."""

    reach: int  # the longest sequence that every model takes, tokens
    rows: int
    answered: int  # rows that have an answer
    has_chat_template: bool | None  # of the student; None: its tokenizer is not here
    prompt_tokens: list[int]  # of every row, as the student reads it, ascending; []: not known
    absent: list[str]  # models that are not here; their sizes are from the table


def look(answers: Answers) -> Material:
    """Reads the models' sizes and the data. Raises ConfigError, DataError."""
    assert answers.student is not None and answers.data is not None, "asked for"
    models = {"student": ModelConfig(answers.student)}
    if answers.teacher:
        models["teacher"] = ModelConfig(answers.teacher)
    sizes, _ = architectures(models)
    absent = [model.path for model in models.values() if not Path(model.path).is_dir()]
    tokenizer = tokenizer_for_checks(answers.student) if answers.student not in absent else None
    chat = tokenizer and _has_chat_template(tokenizer)
    examples = read_examples(
        data_files(answers.data, "data.train"),
        DataConfig(),
        "data.train",
        BadRows("error"),
        need_answer=False,
        need_trace=False,
    )
    answered = [bool(example.answer) for example in examples]
    if not answered:
        raise DataError(f"{answers.data}: has no rows; give data with prompts")
    return Material(
        reach=min(size.max_position_embeddings for size in sizes.values()),
        rows=len(answered),
        answered=sum(answered),
        has_chat_template=chat,
        prompt_tokens=_lengths(answers.data, tokenizer, bool(chat)) if tokenizer else [],
        absent=absent,
    )


def _has_chat_template(tokenizer: Tokenizer) -> bool:
    try:
        check_chat_template(TemplateConfig(), tokenizer)
    except (ConfigError, DataError):
        return False
    return True


def _lengths(data: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    template = TemplateConfig(kind="chat" if chat else "raw")
    tasks = load_tasks(
        data,
        DataConfig(template=template),
        tokenizer,
        max_prompt_tokens=UNLIMITED,
        max_sequence_length=UNLIMITED,
        need_answer=False,
        need_trace=False,
        warn=lambda text: None,
    )
    return sorted(len(task.prompt_ids) for task in tasks if task.prompt_ids is not None)

"""From a problem to the text the model reads."""

from megatron_opd.config.schema import TemplateConfig
from megatron_opd.errors import DataError
from megatron_opd.prompts.tokenizer import Tokenizer

SYSTEM_MESSAGES = {
    # TGPO appendix B.2, the same as LUFFY's. Both start the response with `<think>\n` (template.prefill).
    "tgpo": (
        "Your task is to follow a systematic, thorough reasoning process before providing the final solution. "
        "This involves analyzing, summarizing, exploring, reassessing, and refining your thought process through "
        "multiple iterations. Structure your response into two sections: Thought and Solution. In the Thought section, "
        "present your reasoning using the format: “<think>\\n thoughts </think>\\n”. Each thought should include "
        "detailed analysis, brainstorming, verification, and refinement of ideas. After “</think>\\n” in the Solution "
        "section, provide the final, logical, and accurate answer, clearly derived from the exploration in the Thought "
        "section. If applicable, include the answer in \\boxed{} for closed-form results like multiple choices or "
        "mathematical solutions."
    ),
}


def render(template: TemplateConfig, tokenizer: Tokenizer, problem: str) -> str:
    """Return the prompt text of one problem, ending where the model's completion starts.

    Raises DataError when the tokenizer has no chat template or it refuses the messages.
    """
    text = template.text.replace("{problem}", problem)  # not str.format: problems are full of braces
    if template.kind == "chat":
        text = _apply_chat_template(template, tokenizer, text)
    return text + template.prefill


def _apply_chat_template(template: TemplateConfig, tokenizer: Tokenizer, text: str) -> str:
    if not tokenizer.chat_template:
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; set data.template.kind=raw")
    messages = [{"role": "user", "content": text}]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGES.get(template.system, template.system)})
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(
            f"{tokenizer.name_or_path}: the chat template fails ({error}); set data.template.kind=raw or another system"
        ) from error

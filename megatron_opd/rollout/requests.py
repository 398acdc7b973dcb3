"""The numbers of samples, and the room they have."""

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import RunError


def room(task: Task, max_completion_tokens: int, max_sequence_length: int) -> int:
    """How many tokens the task's completion may have. Raises RunError where there is no room for
    one."""
    left = max_sequence_length - len(task.prompt_ids)
    if left < 1:
        raise RunError(
            f"prompt {task.index} has {len(task.prompt_ids)} tokens and leaves no room for a "
            f"completion (max_sequence_length={max_sequence_length}); set data.long_prompts=drop "
            "or raise the limit"
        )
    return min(max_completion_tokens, left)


def sample_numbers(task: Task, samples_per_prompt: int) -> range:
    """The numbers of a task's next samples, which its draws depend on."""
    return range(task.first_sample, task.first_sample + samples_per_prompt)

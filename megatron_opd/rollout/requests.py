"""The numbers of a task's samples, and the room for their tokens."""

from collections.abc import Sequence

from megatron_opd.contracts.rows import Episode, Task
from megatron_opd.errors import RunError


def room(task: Task, max_completion_tokens: int, max_sequence_length: int) -> int:
    """The number of tokens that a task's completion may have. Raises RunError if it is below 1."""
    left = max_sequence_length - len(task.prompt_ids)
    if left < 1:
        raise RunError(
            f"prompt {task.index} has {len(task.prompt_ids)} tokens and leaves no room for a "
            f"completion (max_sequence_length={max_sequence_length}); set data.long_prompts=drop "
            "or raise the limit"
        )
    return min(max_completion_tokens, left)


def new_episodes(tasks: Sequence[Task], samples_per_prompt: int) -> list[Episode]:
    """`samples_per_prompt` episodes of each task, by group and sample."""
    episodes = []
    for group, task in enumerate(tasks):
        for sample in sample_numbers(task, samples_per_prompt):
            episodes.append(Episode(task, sample, group))
    return episodes


def sample_numbers(task: Task, samples_per_prompt: int) -> range:
    """The numbers of a task's next samples, on which their draws depend."""
    return range(task.first_sample, task.first_sample + samples_per_prompt)

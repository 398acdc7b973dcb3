"""The recipe's section of a model: its directory, and how it is split over processes."""

from dataclasses import dataclass

from megatron_opd.contracts.ranges import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class LayoutConfig:
    """The sizes by which a model is split over a world; the data-parallel size is what remains."""

    tensor_model_parallel_size: PositiveInt = 1  # ranks among which every layer is sliced
    pipeline_model_parallel_size: PositiveInt = 1  # stages among which the layers are shared out
    # shard activations between tensor-parallel regions; needs TP > 1
    sequence_parallel: bool = False
    # ranks of a pipeline stage among which whole experts are shared out
    expert_model_parallel_size: PositiveInt = 1
    # ranks among which every expert is sliced, whatever TP the rest has
    expert_tensor_parallel_size: PositiveInt = 1
    # chunks per stage: shorter bubbles, more messages; PP > 1
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    # ranks among which the tokens of every sequence are shared out
    context_parallel_size: PositiveInt = 1

    def __str__(self) -> str:
        """The sizes above 1, such as "TP2 PP4 SP"."""
        sizes = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "VPP": self.virtual_pipeline_model_parallel_size,
            "EP": self.expert_model_parallel_size,
            "ETP": self.expert_tensor_parallel_size,
            "CP": self.context_parallel_size,
        }
        labels = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            labels.append("SP")
        return " ".join(labels) or "TP1"

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on the same sequences."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def padded_length(self, length: int) -> int:
        """`length`, rounded up to what divides over the context-parallel ranks.

        Several ranks hold two slices of equal length each.
        """
        multiple = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return -(-length // multiple) * multiple

    @property
    def expert_parallel_size(self) -> int:
        """Processes of a pipeline stage that hold one copy of its experts."""
        return self.expert_model_parallel_size * self.expert_tensor_parallel_size


@dataclass(frozen=True)
class ModelConfig:
    """A model directory, what is changed of its config.json, and its layout."""

    # directory with config.json, the tokenizer and weights: *.safetensors, or what `convert` wrote
    path: str
    # base of the rotary embedding, for longer contexts; null: config.json's
    rope_theta: PositiveFloat | None = None
    max_position_embeddings: PositiveInt | None = None  # the longest sequence; null: config.json's
    layout: LayoutConfig = LayoutConfig()  # how it is split over processes

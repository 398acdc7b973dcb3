"""The weights of an engine's model, under their Hugging Face names.

vLLM merges projections (q|k|v, gate|up) and, on the host, packs a linear layer's weight into a
buffer of its kernel and drops the original. `LoadedWeights` knows the place of every Hugging Face
tensor and multiplies it with given vectors in any form, which is enough to verify that it is the
tensor that was sent.

Tied parameters are one tensor, under the first of its names. vLLM ties an output layer to the
embedding as two modules with one parameter, and its loaders reach only the first.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from megatron_opd.contracts.stations import Probes
from megatron_opd.rollout.vllm.loaded_experts import ExpertSlot, expert_slots, forget_packing
from megatron_opd.weights.probes import dense, project


@dataclass(frozen=True)
class _Slot:
    """Rows `first_row : first_row + shape[0]` of a parameter, which several modules may share."""

    modules: tuple[Any, ...]
    parameter: str  # "weight" | "bias"
    first_row: int
    shape: tuple[int, ...]

    def project(self, probes: Probes) -> list[torch.Tensor]:
        return [copy_KO for module in self.modules for copy_KO in self._project(module, probes)]

    def _project(self, module: Any, probes: Probes) -> Iterator[torch.Tensor]:
        rows = slice(self.first_row, self.first_row + self.shape[0])
        tensor = getattr(module, self.parameter)
        if tensor.numel():
            yield project(probes, tensor[rows].reshape(self.shape[0], -1))
        if self.parameter == "weight" and hasattr(module, "cpu_linear"):
            dense_KI = dense(probes, module.params_dtype)
            yield module.quant_method.apply(module, dense_KI, None)[:, rows].float()


class LoadedWeights:
    """The tensors of a vLLM model of one rank (tensor-parallel size 1)."""

    def __init__(self, model: Any) -> None:
        self._slots = dict(_slots(model))
        self._experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model, by Hugging Face name (tied weights once)."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        """The products of tensor `name` with the probes, float32 [K, O], for each of its copies.

        A vector of O numbers counts as an [O, 1] matrix. An embedding that is also the output layer
        has two copies, plain and packed.
        """
        return self._slots[name].project(probes)

    def forget_packing(self) -> None:
        """Prepares a reload: see `loaded_experts.forget_packing`."""
        for module in self._experts:
            forget_packing(module)

    def pack_tied(self) -> None:
        """Packs shared parameters again, after a reload, in modules that vLLM's loaders missed."""
        for slot in self._slots.values():
            if isinstance(slot, _Slot):
                for module in slot.modules[1:]:
                    module.quant_method.process_weights_after_loading(module)


def _slots(model: Any) -> Iterator[tuple[str, _Slot | ExpertSlot]]:
    holders: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(module)
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            yield from expert_slots(path, module)
            continue
        parent, _, leaf = path.rpartition(".")
        merged = model.packed_modules_mapping.get(leaf)
        for parameter, tensor in module.named_parameters(recurse=False):
            modules = tuple(holders[id(tensor)])
            if modules[0] is not module:
                continue
            heights, width = _heights_and_width(module, tensor)
            first_row = 0
            for projection, height in zip(merged or [leaf], heights, strict=True):
                shape = (height, width) if parameter == "weight" and width else (height,)
                name = f"{parent}.{projection}.{parameter}".removeprefix(".")
                yield name, _Slot(modules, parameter, first_row, shape)
                first_row += height


def _heights_and_width(module: Any, tensor: torch.Tensor) -> tuple[list[int], int]:
    """The rows of each Hugging Face tensor in a module, and their columns (0 for vectors)."""
    if isinstance(module, LinearBase):
        return list(getattr(module, "output_sizes", [module.output_size])), module.input_size
    if isinstance(module, VocabParallelEmbedding):  # vLLM pads the vocabulary
        return [module.org_vocab_size], module.embedding_dim
    return [tensor.numel()], 0

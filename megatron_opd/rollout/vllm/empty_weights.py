"""A vLLM model without weights, for an engine that gets them from the trainer.

So no file is read twice. vLLM's own `dummy` format draws random numbers for every parameter, once
for each module around it.
"""

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

EMPTY = "megatron_opd_empty"


@register_model_loader(EMPTY)
class EmptyLoader(BaseModelLoader):
    """Fills every parameter with zeros."""

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.zero_()  # vLLM measures its memory with a pass, which must see numbers

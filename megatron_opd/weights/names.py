"""The parameters of a model under the names of the weight table, for every kind of layers.

The table follows Megatron's local layers. Transformer Engine's keep a norm's weight in the linear
layer behind it, and an expert's weight under its number; grouped experts keep all experts of a rank
in one parameter.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

# The table's name of a norm, and its name in a fused layer, which checkpoints use for both kinds.
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_UNFUSED = {fused: name for name, fused in FUSED.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"mlp\.experts\.(linear_\w+\.weight)(\d*)$")


def named_parameters(chunks: Sequence[Module]) -> dict[str, Tensor]:
    """The parameters of this rank by the table's names.

    The names have no wrapper's prefix, and count layers and experts of the whole model. The values
    share the parameters' memory and have no gradient.
    """
    named: dict[str, Tensor] = {}
    for chunk in chunks:
        model: Any = chunk
        # DistributedDataParallel and Float16Module keep the model as `module`.
        while not hasattr(model, "decoder"):
            model = model.module
        for name, parameter in model.named_parameters():
            if match := _LAYER.match(name):
                layer = model.decoder.layers[int(match[1])]
                for rest, value in _in_layer(layer, match[2], parameter):
                    named[f"decoder.layers.{layer.layer_number - 1}.{rest}"] = value
            else:
                named[name] = parameter.detach()
    return named


def _in_layer(layer: Any, name: str, parameter: Parameter) -> Iterator[tuple[str, Tensor]]:
    """One parameter by its name in a layer; grouped experts yield one value for each expert."""
    value = parameter.detach()
    experts = _EXPERTS.match(name)
    if experts is None:
        yield _UNFUSED.get(name, name), value
        return
    linear, number = experts.groups()
    values = [value] if number else value.unbind(0)
    for i, expert in enumerate(values, start=int(number or 0)):
        yield f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[i]}.{linear}", expert

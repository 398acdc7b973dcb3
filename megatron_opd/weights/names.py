"""The parameters of a model under the names of the weight table, whatever kind of layers it is made
of.

The table follows Megatron's local layers. Transformer Engine's hold a norm's weight in the linear
layer behind it, and each expert's weight under its number; grouped experts hold all of a rank's in
one parameter.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

# The table's name of a norm -> that of the fused layer, under which checkpoints of either kind of
# layers store it.
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_UNFUSED = {fused: name for name, fused in FUSED.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"mlp\.experts\.(linear_\w+\.weight)(\d*)$")


def named_parameters(chunks: Sequence[Module]) -> dict[str, Tensor]:
    """The parameters of this rank by the table's names: no wrapper's prefix, layers and experts
    count globally.

    The values share the parameters' memory and take no part in differentiation.
    """
    named: dict[str, Tensor] = {}
    for chunk in chunks:
        model: Any = chunk
        # DistributedDataParallel and Float16Module hold it as `module`
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
    """One parameter, or of grouped experts one value for each."""
    value, experts = parameter.detach(), _EXPERTS.match(name)
    if experts is None:
        yield _UNFUSED.get(name, name), value
        return
    linear, number = experts.groups()
    held, values = layer.mlp.local_expert_indices, [value] if number else value.unbind(0)
    for i, each in enumerate(values, start=int(number or 0)):
        yield f"mlp.experts.local_experts.{held[i]}.{linear}", each

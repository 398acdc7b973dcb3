"""The order of what the gradient kernel does to the device's memory, as compiled for a GPU; none is
needed for that."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_opd.vocab_parallel import kernels

TYPES = {
    "logits": "*bf16",
    "out": "*bf16",
    "columns": "*i64",
    "here": "*u8",
    "width": "i32",
    "valid": "i32",
    "k": "i32",
    "temperature": "fp32",
}


def events(k_padded: int, with_entropy: bool) -> list[str]:
    """Of "load", "store", "barrier" and "label" (where a loop begins or ends), as the PTX has
    them."""
    kernel = kernels._gradient_kernel
    constants = {
        "K_PADDED": k_padded,
        "BLOCK": kernels.BLOCK,
        "WITH_ENTROPY": with_entropy,
        "SCALED": True,
    }
    types = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32")
        for name in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants), target=GPUTarget("cuda", 80, 32),
        options={"num_warps": kernels._GRADIENT_WARPS},
    )  # fmt: skip
    names = {"ld.global": "load", "st.global": "store", "bar.sync": "barrier", "$L__BB": "label"}
    return [
        names[word]
        for word in re.findall(
            r"ld\.global|st\.global|bar\.sync|^\$L__BB(?=\d+_\d+:)", compiled.asm["ptx"], re.M
        )
    ]


print(
    json.dumps(
        {f"{k}, {entropy}": events(k, entropy) for k in (1, 2, 64) for entropy in (True, False)}
    )
)

"""What every process of ours does first."""

import logging
import os
import warnings


def quieten_dependencies() -> None:
    """What packages say about each other's interfaces; `doctor` says what is missing and what that costs."""
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for package in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

"""Megatron-Core as this project uses it: process groups, models, micro-batches and passes."""

import logging
import warnings

# Every rank would warn of every optional package that Megatron lacks; `megatron-opd doctor` warns
# once.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

"""Megatron-Core as this project uses it: the device, process groups, models, batches, schedules,
the vocabulary op."""

import logging
import warnings

# At import, once per rank, Megatron warns of every optional package it lacks; `megatron-opd doctor`
# says it once.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

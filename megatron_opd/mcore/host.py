"""Megatron-Core on the host: stand-ins for the CUDA it asks for by name.

megatron-core 0.19 names CUDA in many places that have a host meaning: buffers created with
`device="cuda"`, `torch.cuda.current_device()`, streams around communication, the CUDA generator. On
a machine without CUDA, `prepare_platform()` gives the modules of `megatron.core` (and nothing else)
a stand-in for the name `torch` that maps those to the host. `torch` itself is untouched, so an
engine living in the same process sees the real one. The two methods of `Tensor` that have to be
replaced look at their caller and change nothing for anybody but Megatron.

With CUDA, `prepare_platform()` patches nothing.
"""

import contextlib
import importlib
import queue
import sys
import types
from typing import Any

import torch

from megatron_opd.world.device import choice, device

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "as_tensor", "zeros", "zeros_like",
)  # fmt: skip

# Modules Megatron imports inside functions: they must hold the stand-in before their first use.
_LAZY_MODULES = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.distributed",
    "megatron.core.tensor_parallel.random",
)


def prepare_platform() -> None:
    """Prepares the device, or Megatron's stand-ins for it, before a model is built. Idempotent."""
    if choice().kind == "cuda":
        torch.cuda.set_device(device())
        return
    for name in _LAZY_MODULES:
        importlib.import_module(name)
    stand_in = _host_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    _map_generator()
    _map_tensor_methods()
    _give_split_sizes_as_integers()
    _let_shares_differ_in_size()
    _keep_checkpoint_queue_in_process()


# ------------------------------------------------------------------------------------ the stand-ins
def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _on_host(factory):
    def call(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


class _HostStream:
    """A stream, an event or their context; none does anything, since calls on the host wait."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def __enter__(self) -> "_HostStream":
        return self

    def __exit__(self, *args: object) -> None: ...
    def record(self, *args: object) -> None: ...
    def wait(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, *args: object) -> None: ...
    def wait_event(self, *args: object) -> None: ...
    def record_event(self, *args: object) -> "_HostStream":
        return self

    def query(self) -> bool:
        return True


def _host_cuda() -> types.ModuleType:
    """The stand-in for `torch.cuda` on a machine without CUDA."""
    cuda = types.ModuleType("torch.cuda")
    answers = {
        "current_device": lambda: torch.device("cpu"),
        "is_available": lambda: False,
        "device_count": lambda: 0,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "set_device": lambda *args: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "current_stream": lambda *args: _HostStream(),
        "default_stream": lambda *args: _HostStream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "Stream": _HostStream,
        "Event": _HostStream,
        "is_current_stream_capturing": lambda: False,
        "nvtx": types.SimpleNamespace(
            range_push=lambda *args: None,
            range_pop=lambda *args: None,
            range=lambda *args: contextlib.nullcontext(),
        ),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
    return cuda


def _host_torch() -> types.ModuleType:
    stand_in = types.ModuleType("torch")
    for name in _FACTORIES:
        setattr(stand_in, name, _on_host(getattr(torch, name)))
    stand_in.cuda = _host_cuda()  # type: ignore[attr-defined]
    stand_in.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    return stand_in


def _map_generator() -> None:
    """Makes Megatron's tracker of CUDA generator states use the host's generator."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _map_tensor_methods() -> None:
    """Makes `Tensor.type()` name CUDA types to Megatron, and `Tensor.cuda()` do nothing for it.

    The optimizer compares the type with "torch.cuda.FloatTensor".
    """
    if getattr(torch.Tensor.type, "for_megatron_on_host", False):
        return
    true_type = torch.Tensor.type
    true_cuda = torch.Tensor.cuda

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None and _called_by_megatron():
            return true_type(self).replace("torch.", "torch.cuda.", 1)
        return true_type(self, *(() if dtype is None else (dtype,)), *args, **kwargs)

    def cuda(self, *args, **kwargs):
        return self if _called_by_megatron() else true_cuda(self, *args, **kwargs)

    type_.for_megatron_on_host = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign]


def _give_split_sizes_as_integers() -> None:
    """Gives Megatron's token dispatcher its split sizes as integers.

    It makes them integers when it moves them to the host, which does not happen on the host.
    """
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    move = dispatcher.maybe_move_tensor_to_cpu
    if getattr(move, "for_megatron_on_host", False):
        return

    def on_host(tensor, as_numpy=False, record_stream=False):
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, False)

    on_host.for_megatron_on_host = True  # type: ignore[attr-defined]
    dispatcher.maybe_move_tensor_to_cpu = on_host


def _let_shares_differ_in_size() -> None:
    """Lets ranks gather and scatter shares of different sizes, which gloo alone refuses.

    With sliced experts every rank has another number of tokens.
    """
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather = mappings._gather_along_first_dim
    reduce_scatter = mappings._reduce_scatter_along_first_dim
    if getattr(gather, "for_megatron_on_host", False):
        return

    def gather_shares(share, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(share, group, output_split_sizes, use_global_buffer)
        whole = share.new_empty(sum(output_split_sizes), *share.shape[1:])
        copies = torch.cat([share] * group.size())
        sent = [len(share)] * group.size()
        torch.distributed.all_to_all_single(whole, copies, output_split_sizes, sent, group=group)
        return whole

    def reduce_scatter_shares(whole, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    gather_shares.for_megatron_on_host = True  # type: ignore[attr-defined]
    mappings._gather_along_first_dim = gather_shares
    mappings._reduce_scatter_along_first_dim = reduce_scatter_shares


def _keep_checkpoint_queue_in_process() -> None:
    """Spares a synchronous save the `multiprocessing.Manager` process that would hold one queue."""
    strategies = "megatron.core.dist_checkpointing.strategies"
    writer: Any = importlib.import_module(f"{strategies}.filesystem_async")
    writer._results_queue = queue.Queue()

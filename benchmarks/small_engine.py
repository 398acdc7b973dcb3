"""An engine for models of a few thousand parameters, whose tokens take less than vLLM's own steps.

Without keys and values kept: a batch is read anew for every token. In a file of its own, which a
recipe names (`rollout.engine`).
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.architectures.ends import read_ends
from megatron_opd.contracts.sampling import Completion, Request, Sampling
from megatron_opd.contracts.stations import Probes
from megatron_opd.errors import RunError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.weights.probes import project


class SmallEngine:
    """transformers' model of the student, in float32 on the host."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, config: RunConfig) -> None:
        self.max_sequence_length = config.max_sequence_length
        self.policy_version: int | None = None
        self._ends = sorted(read_ends(config.student.path).ids)
        self._model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.student.path), dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of the requests: see `contracts.stations.Engine.complete`."""
        if sampling.version != self.policy_version:
            raise RunError(f"the engine holds {self.policy_version}, not {sampling.version}")
        if sampling.top_p != 1.0:
            raise RunError("this engine draws from the whole distribution: top_p=1.0")
        if not requests:
            return []
        drawn = [_Drawn(request, sampling.temperature) for request in requests]
        while open_ := [one for one in drawn if one.finish_reason is None]:
            logprobs_BV = self._next_logprobs(open_, sampling.temperature)
            for one, logprobs_V in zip(open_, logprobs_BV, strict=True):
                one.take(logprobs_V, self._ends)
        return [Completion(one.ids, one.logprobs, one.finish_reason or "length") for one in drawn]

    def _next_logprobs(self, open_: "Sequence[_Drawn]", temperature: float) -> np.ndarray:
        """The logprobs of every sequence's next token, float64 [B, V]."""
        # samples of one prompt that say the same so far are read once
        sequences = [tuple(one.sequence) for one in open_]
        place = {sequence: n for n, sequence in enumerate(dict.fromkeys(sequences))}
        lengths = torch.tensor([len(sequence) for sequence in place])
        width = int(lengths.max())
        ids = [sequence + (0,) * (width - len(sequence)) for sequence in place]
        # padding stands behind, where a causal model does not look
        hidden_BTD = self._model.model(input_ids=torch.tensor(ids)).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(ids)), lengths - 1]
        logits_BV = self._model.lm_head(last_BD).double() / (temperature or 1.0)
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1).numpy()
        return logprobs_BV[[place[sequence] for sequence in sequences]]

    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights: see `contracts.stations.Engine.reload`."""
        self.policy_version = None
        self._model.load_state_dict(dict(named_tensors), strict=False)
        self._model.tie_weights()

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        """The products of a weight: see `contracts.stations.Engine.project`."""
        tensor = self._model.state_dict()[name]
        return [project(probes, tensor.reshape(tensor.shape[0], -1))]

    def sleep(self) -> None:
        """Nothing: the host has the memory."""

    def restart(self) -> None:
        """Nothing is kept from which a call could have failed."""
        self.policy_version = None

    def close(self) -> None:
        """Nothing is open."""


class _Drawn:
    """A sequence that grows, with draws of its own."""

    def __init__(self, request: Request, temperature: float) -> None:
        self.sequence: list[int] = request.prompt_ids.tolist()
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self._left = request.max_tokens
        self._greedy = temperature == 0
        random = np.random.default_rng(request.seed)
        self._uniforms = (random.random() for _ in itertools.count())

    def take(self, logprobs_V: np.ndarray, ends: Sequence[int]) -> None:
        """Draws the next token by the inverse of the distribution function."""
        last = len(logprobs_V) - 1
        if self._greedy:
            token = int(logprobs_V.argmax())
        else:
            cumulative_V = np.exp(logprobs_V).cumsum()
            token = min(int(np.searchsorted(cumulative_V, next(self._uniforms), "right")), last)
        self.sequence.append(token)
        self.ids.append(token)
        self.logprobs.append(float(logprobs_V[token]))
        self._left -= 1
        if token in ends:
            self.finish_reason = "stop"
        elif self._left == 0:
            self.finish_reason = "length"

"""The questions that a part may ask of the tokens it gives numbers to. Imports no torch itself."""

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Whose log-probability of a token: three models that only score, and the student as it is now, as
# it was before the step's first update, and as it sampled.
Model = Literal["teacher", "reference", "process"]
Anchor = Literal["current", "old", "rollout"]
# What becomes of the vocabulary behind the teacher's k best ids.
Tail = Literal["none", "renormalise", "ghost", "generalised"]


class Tokens(Protocol):
    """T completion tokens of N rows, flat in the order of the rows.

    A part that is known *before* the update sees all tokens of the update, in float64 on the host
    (`objective.batch.Batch`). A part that is computed *within* it sees the tokens of a micro-batch,
    in float32 on the device (`objective.loss.View`). Each raises AssertionError with a sentence
    where it is asked for what it does not have: a signal that the part's `needs` left out, or a
    number of the other moment.

    Gradients flow, within the update, through `logprob("current")`, `argmax_logprob`, the student's
    half of `topk`, `divergence` and `entropy("student")`; nothing else has one.
    """

    @property
    def step(self) -> int: ...

    @property
    def zeros_T(self) -> "Tensor":
        """In the precision of the moment."""

    @property
    def sampled_T(self) -> "Tensor":
        """True where the token was drawn for this row, not taken from a trace; bool."""

    @property
    def drawn_T(self) -> "Tensor":
        """True where the student's engine drew the token, and gave it a log-probability; bool."""

    def logprob(self, policy: Model | Anchor) -> "Tensor":
        """The log-probability of the token under a model, nats."""

    def log_ratio(self, model: Model, anchor: Anchor) -> "Tensor":
        """log p_model - log p_anchor of the token, detached; a model gives at least e^-30."""

    def entropy(self, model: Literal["student", "teacher"]) -> "Tensor":
        """The entropy of the distribution that the token was drawn at, nats."""

    def over_rows(self, values_T: "Tensor") -> "Tensor":
        """Each token gets the sum over its row's sampled tokens, detached. Collective where context
        parallelism cuts a row."""

    def mean_over_rows(self, values_T: "Tensor") -> "Tensor":
        """Each token gets the mean over its row's sampled tokens, detached. Collective as
        `over_rows` is."""

    # ------------------------------------------------------------------- known before the update
    @property
    def rewards_N(self) -> "np.ndarray":
        """float64."""

    @property
    def groups_N(self) -> "np.ndarray":
        """The place in the step of each row's task; int64."""

    @property
    def episodes_N(self) -> "np.ndarray":
        """A number that the rows of one attempt share; int64."""

    @property
    def data_sources_N(self) -> "np.ndarray":
        """The source of each row's task, as the data name it; texts."""

    @property
    def turns_T(self) -> "Tensor":
        """A number for every turn of every episode: equal for the tokens of one turn; int64."""

    @property
    def lengths_N(self) -> "np.ndarray":
        """The number of completion tokens of each row, without an environment's; int64."""

    @property
    def max_completion_tokens(self) -> int: ...

    @property
    def uniform_T(self) -> "Tensor":
        """A number drawn from [0, 1) for each token, the same whenever the step is repeated."""

    @property
    def end_T(self) -> "Tensor":
        """True where the token ends its turn; bool."""

    @property
    def finished_T(self) -> "Tensor":
        """True where the token's turn ended by itself, not at the length limit; bool."""

    def spread(self, values_N: "np.ndarray") -> "Tensor":
        """Each token gets the number of its row."""

    def mean_of_rows(self, values_T: "Tensor") -> "np.ndarray":
        """The mean over the sampled tokens of each row, float64 [N]."""

    def to_go(self, values_T: "Tensor", discount: float, *, mean: bool) -> "Tensor":
        """The discounted sum from each token to the end of its row; `mean` divides it by the number
        of tokens that it is over."""

    def before(self, values_T: "Tensor") -> "Tensor":
        """The sum over the tokens in front of each token in its row, without an environment's."""

    # ------------------------------------------------------------------------ within the update
    def argmax_logprob(self) -> "Tensor":
        """The student's log-probability of the teacher's most likely token."""

    @property
    def is_argmax_T(self) -> "Tensor":
        """True where the token is the teacher's most likely one; bool."""

    def topk(self, k: int) -> "tuple[Tensor, Tensor]":
        """The student's and the teacher's log-probabilities of the teacher's k best ids, [T, k]."""

    def topk_forward_kl(self, k: int, tail: Tail) -> "tuple[Tensor, Tensor, Tensor]":
        """The forward KL on the teacher's k best ids, and the teacher's and the student's mass on
        them (detached)."""

    def divergence(self, kind: str, alpha: float | None, beta: float | None) -> "Tensor":
        """A divergence of the student's and the teacher's whole distributions."""

"""The factor of a float16 loss, so that small gradients are not 0 in float16."""

from collections.abc import Mapping

from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_opd.recipe.keys import LossScaleConfig


class LossScale(DynamicGradScaler):
    """Megatron's dynamic loss scale, shared by the optimizers of dense parameters and of experts.

    Megatron makes a scale for each of the two, and multiplies the loss with the first. After an
    overflow in one of them the scales would differ, and the experts' gradients would be divided by
    another number than the loss was multiplied with. Here both optimizers report an overflow, and
    the one scale changes once per update.
    """

    def __init__(self, settings: LossScaleConfig) -> None:
        super().__init__(
            initial_scale=settings.initial,
            min_scale=settings.minimum,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=settings.window,
            hysteresis=settings.hysteresis,
        )
        self._overflow = False

    def update(self, found_inf: bool) -> None:
        """Notes an overflow; Megatron calls it once per optimizer, in `prepare_grads`."""
        self._overflow |= found_inf

    def finish_update(self) -> None:
        """Changes the scale, after all optimizers have reported."""
        super().update(self._overflow)
        self._overflow = False

    @property
    def value(self) -> float:
        """The factor of the loss."""
        return float(self._scale.item())

    @property
    def can_fall(self) -> bool:
        """True while a smaller scale may help against an overflow."""
        return self.value > float(self.min_scale.item())

    def state_dict(self) -> dict[str, float]:
        """The state for a checkpoint's state.json, equal on every rank."""
        return {
            "scale": self.value,
            "growth": self._growth_tracker,
            "hysteresis": self._hysteresis_tracker,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes over a state of `state_dict`."""
        self._scale.fill_(state["scale"])
        self._growth_tracker = int(state["growth"])
        self._hysteresis_tracker = int(state["hysteresis"])

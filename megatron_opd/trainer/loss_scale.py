"""The number that a float16 loss is multiplied with, so that small gradients are not 0 in
float16."""

from collections.abc import Mapping

from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_opd.recipe.keys import LossScaleConfig


class LossScale(DynamicGradScaler):
    """Megatron's dynamic scale, one for all parts of an optimizer.

    Megatron makes one for the dense parameters and one for experts, and multiplies the loss with
    the first. After an overflow among the gradients of one part the two would differ, and the
    others' be divided by what they were not multiplied with. Here every part reports what it found,
    and the scale changes once per update.
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
        """Megatron calls it once per part, in `prepare_grads`."""
        self._overflow |= found_inf

    def finish_update(self) -> None:
        """After all parts."""
        super().update(self._overflow)
        self._overflow = False

    @property
    def value(self) -> float:
        return float(self._scale.item())

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may still be the scale's fault."""
        return self.value > float(self.min_scale.item())

    def state_dict(self) -> dict[str, float]:
        """For state.json; equal on every rank."""
        return {
            "scale": self.value,
            "growth": self._growth_tracker,
            "hysteresis": self._hysteresis_tracker,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._scale.fill_(state["scale"])
        self._growth_tracker, self._hysteresis_tracker = (
            int(state["growth"]),
            int(state["hysteresis"]),
        )

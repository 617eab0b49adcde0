"""Scale fp16 losses: the factor that keeps small gradients from vanishing.

scale = LossScale()
scale.halve()       # after an overflow; the step is made again
scale.record_step() # after a good step
"""

import torch


class LossScale:
    """The factor on the loss: halved where gradients overflow, doubled after 2,000 good steps (Micikevicius et al.,
    2018, Mixed Precision Training). Part of a checkpoint.
    """

    PATIENCE, LARGEST = 2000, 2.0**24

    def __init__(self) -> None:
        self.value, self._good_steps = 2.0**16, 0

    def halve(self) -> bool:
        """Halve the scale after an overflow; return False where the result would be below one, which scales nothing."""
        self.value, self._good_steps = self.value / 2, 0
        return self.value >= 1

    def record_step(self) -> None:
        """Count a good step."""
        self._good_steps += 1
        if self._good_steps == self.PATIENCE:
            self.value, self._good_steps = min(2 * self.value, self.LARGEST), 0

    def state(self) -> torch.Tensor:
        """Return what a checkpoint holds: the value and the good steps since it changed, (2,)."""
        return torch.tensor([self.value, self._good_steps], dtype=torch.float64)

    def restore(self, state: torch.Tensor) -> None:
        """Take over what state() returned."""
        self.value, self._good_steps = float(state[0]), int(state[1])

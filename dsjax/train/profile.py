"""A trace of a few steps, for XProf and TensorBoard."""

from pathlib import Path

import jax


class Profile:
    """Traces the steps from `steps[0]` to `steps[1]`, both included and counted from 1, into a folder. A context
    manager: a run that ends between the two leaves the trace so far."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.steps, self.folder, self.running = steps, folder, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def before(self, step: int) -> None:
        if self.steps and not self.running and self.steps[0] <= step <= self.steps[1]:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, result) -> None:
        """`result` is what the step gives: the trace ends when it is there."""
        if self.running and step >= self.steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
        self.running = False

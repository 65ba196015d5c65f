"""Ratios of times, measured side by side, and of peak memory; each ratio has a bar."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ratio:
    """One line of the table: the ratio in each round, and its bar."""

    name: str
    rounds: list[float]
    bar: float
    goal: float | None = None
    faster: bool = False  # the ratio is a speed-up: it must be at least the bar, not at most

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def missed(self) -> bool:
        """True where even the better quartile of the rounds is on the wrong side of the bar."""
        if len(self.rounds) < 3:
            better = self.median
        else:
            low, _, high = statistics.quantiles(self.rounds, n=4)
            better = high if self.faster else low
        return better < self.bar if self.faster else better > self.bar

    def row(self) -> list[str]:
        shown = ", ".join(f"{ratio:.2f}" for ratio in self.rounds)
        bound = f"{'at least' if self.faster else 'at most'} {self.bar:.2f}"
        goal = "" if self.goal is None else f"{self.goal:.2f}"
        return [self.name, f"{self.median:.2f}", bound, goal, "missed" if self.missed else "held", shown]


def interleaved(steps: Mapping[str, Step], rounds: int, advance: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a first round that does not count; calls `advance` after each step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
            advance()
    return seconds


def against(seconds: Mapping[str, list[float]], name: str, floor: str) -> list[float]:
    """The time of `name` over that of `floor`, round by round."""
    return [ours / other for ours, other in zip(seconds[name], seconds[floor], strict=True)]


def peak_memory(step: Step, device: torch.device = CPU) -> int:
    """Peak bytes of tensors on `device` during one step, less those before it, by the allocator's own count."""
    step()  # a first step allocates the buffers that stay: they do not count
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak

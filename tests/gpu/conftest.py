"""The GPU that `pytest -m gpu` asks for, and the table that it ends with. Without a GPU it fails and skips nothing."""

import json
import platform
import time
from dataclasses import asdict, dataclass, field

import pytest
import torch

from dp_lora.config import ROOT

NO_GPU = "PyTorch sees no GPU here; pytest -m gpu (make test-gpu) needs one NVIDIA GPU, and skips nothing without it"


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    goal: str = ""  # what it is to be, in words; no figure of time is a test

    def row(self) -> list[str]:
        return [self.name, f"{self.value:.3g} {self.unit}".strip(), self.goal]


@dataclass
class Table:
    began: float = field(default_factory=time.monotonic)
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        self.figures.append(Figure(name, value, unit, goal))


TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.exit(NO_GPU, returncode=1)
    return torch.device("cuda")


@pytest.fixture(scope="session")
def table(request, device) -> Table:
    return request.config.stash.setdefault(TABLE, Table())


def pytest_terminal_summary(terminalreporter, config):
    """Print the figures as Markdown, and write them to runs/gpu.json."""
    table = config.stash.get(TABLE, None)
    if table is None:
        return
    from benchmarks.tables import markdown

    properties = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    minutes = (time.monotonic() - table.began) / 60
    table.add("these tests, from the first that measures", minutes, "minutes", "at most 8 minutes")
    terminalreporter.write_line("")
    terminalreporter.write(markdown(["", "measured", "goal"], [figure.row() for figure in table.figures]))
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine.items()))
    path = ROOT / "runs/gpu.json"
    path.parent.mkdir(exist_ok=True)
    content = {"machine": machine, "figures": [asdict(figure) for figure in table.figures]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""A tiny private fine-tuning in a process of its own, for tests that kill it; it notes each noise on disk.

A third argument makes it end itself. `before N` and `after N`: SIGKILL at the rename of its Nth checkpoint. `line N`
and `head N`: SIGKILL with half of its Nth ledger line, or head, written. `between N`: SIGKILL between the two.
`disk BYTES`: no file can grow beyond that size.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from dp_lora.events import Events
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy import heads, ledger
from dp_lora.privacy import step as step_module
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny import tiny_config, tiny_latents

house, overrides = Path(sys.argv[1]), sys.argv[2]
config = tiny_config(overrides)
real = step_module.add_noise


def noted(*arguments):
    noisy = real(*arguments)
    with (house / "drawn").open("a") as file:
        file.write("noise\n")
        file.flush()
        os.fsync(file.fileno())
    return noisy


step_module.add_noise = noted
end, number = sys.argv[3].split() if len(sys.argv) > 3 else ("", "0")
rename, renamed = Path.replace, []


def deadly(self, target):
    if target.parent.name == "checkpoints":
        renamed.append(target)
    if len(renamed) < int(number):
        return rename(self, target)
    if end == "after":
        rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)


def torn(path, text):
    appended.append(path)
    if len(appended) == int(number):
        if end != "between":
            with path.open("a") as file:
                file.write(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    append_line(path, text)


append_line, appended = heads.append_line, []
if end in ("before", "after"):
    Path.replace = deadly
if end in ("line", "head", "between"):
    (ledger if end == "line" else heads).append_line = torn
if end == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
latents, labels = tiny_latents(30)
bound = binding(config, "data", model_digest(house / "base"), "cpu")
torch.set_num_threads(1)
with open_run_folder(house / "run", config, bound) as run:
    print("ready", flush=True)
    data = PrivateData(latents, labels, units_of(30, None, "picture"))
    names = {"path": "base", "digest": bound["base"]}
    finetune(config, load_model(house / "base"), names, data, run, torch.device("cpu"), Events(), lambda *_: None)

"""DVDP: diffusion models whose state shrinks while it is noised (Zhang et al., CVPR 2023).

process = Process(Schedule.dvdp([300, 600]))
images = sample(process, denoiser, shape=(16, 3, 256, 256), steps=250)
"""

import importlib
from typing import TYPE_CHECKING, Any

from dvdp.errors import UserError

if TYPE_CHECKING:
    from dvdp.diffusion.process import Process
    from dvdp.diffusion.sampling import sample
    from dvdp.diffusion.schedule import Schedule

__version__ = "0.1.0"
__all__ = ["Process", "Schedule", "UserError", "__version__", "sample"]

#: Imported when they are asked for: torch takes seconds, and a mistake in params can be told without it.
_MODULES = {"Process": "process", "Schedule": "schedule", "sample": "sampling"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dvdp' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dvdp.diffusion.{_MODULES[name]}"), name)

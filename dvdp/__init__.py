"""DVDP: diffusion models whose state shrinks while it is noised (Zhang et al., CVPR 2023).

process = Process(Schedule.dvdp([300, 600]))
images = sample(process, denoiser, shape=(16, 3, 256, 256), steps=250)
"""

from dvdp.diffusion.process import Process
from dvdp.diffusion.sampling import sample
from dvdp.diffusion.schedule import Schedule
from dvdp.errors import UserError

__version__ = "0.1.0"
__all__ = ["Process", "Schedule", "UserError", "__version__", "sample"]

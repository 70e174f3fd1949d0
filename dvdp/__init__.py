"""DVDP: diffusion models whose state shrinks while it is noised (Zhang et al., CVPR 2023).

process = Process(Schedule.dvdp([300, 600]))
images = sample(process, denoiser, shape=(16, 3, 256, 256), steps=250)
"""

from dvdp.errors import UserError
from dvdp.process import Process
from dvdp.sampling import sample
from dvdp.schedule import Schedule

__version__ = "0.1.0"
__all__ = ["Process", "Schedule", "UserError", "__version__", "sample"]

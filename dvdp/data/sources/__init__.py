"""Where images come from. Every source streams them, always in the same order, and unpacks nothing to disk.

A source is made from ``dataset.path`` of params.yaml by :data:`SOURCES`; making it looks through names, counts and
checksums, so that mistakes show before any work. Iterating it yields an :class:`Item` for each image.
"""

from dvdp.data.sources.base import Item, Pixels, Source, UnreadableImageError, decode
from dvdp.data.sources.celeba import CelebA
from dvdp.data.sources.cifar10 import CIFAR10_LABELS, Cifar10
from dvdp.data.sources.digits import Digits
from dvdp.data.sources.ffhq import Ffhq
from dvdp.data.sources.image_folder import ImageFolder
from dvdp.data.sources.imagenet64 import Imagenet64
from dvdp.data.sources.lsun import Lsun
from dvdp.data.sources.npz import Npz
from dvdp.data.sources.parquet import Parquet
from dvdp.data.sources.webdataset import WebDataset

__all__ = [
    "CIFAR10_LABELS",
    "SOURCES",
    "Cifar10",
    "ImageFolder",
    "Item",
    "Pixels",
    "Source",
    "UnreadableImageError",
    "decode",
]

#: Each source by the name that ``dataset.source`` gives it.
SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "image_folder": ImageFolder,
    "cifar10": Cifar10,
    "celeba": CelebA,
    "lsun": Lsun,
    "ffhq": Ffhq,
    "imagenet64": Imagenet64,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "npz": Npz,
}

"""Mean and covariance of features in the ``.npz`` files that others publish: ``mu`` (f,) and ``sigma`` (f, f)."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dvdp.errors import UserError
from dvdp.evaluation.extractors import file_sha256
from dvdp.files import write_atomically

#: Of the largest entry, or eigenvalue: what rounding to float32 leaves of symmetry and positivity.
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a Frechet distance needs to know of a set of images."""

    mu: NDArray[np.float64]
    """(f,)"""
    sigma: NDArray[np.float64]
    """(f, f)"""


@dataclass(frozen=True, eq=False)
class Published:
    """Statistics from a file, and which file that was."""

    statistics: Statistics
    sha256: str

    @property
    def digest(self) -> str:
        """Stands where a score record names the data set of its reference."""
        return f"npz {self.sha256}"

    @property
    def warning(self) -> str:
        """What no check of the file can tell."""
        return (
            f"the reference is an .npz file of SHA-256 {self.sha256[:12]}.., which does not say how its images were"
            " cropped, resized and encoded, how many they were, whether mirrored ones are among them, nor which weights"
            " made the features: compare only scores that were made with this very file."
        )


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write ``mu`` and ``sigma`` as float64, atomically.

    Raises:
        UserError: the name does not end in .npz.
    """
    if path.suffix != ".npz":
        raise UserError(f"--export: found '{path}', expected a name that ends in .npz.")
    content = io.BytesIO()
    np.savez(content, mu=statistics.mu.astype(np.float64), sigma=statistics.sigma.astype(np.float64))
    write_atomically(path, content.getvalue())


def read_statistics(path: Path, features: int) -> Published:
    """Read ``mu`` and ``sigma`` and check all that can be checked.

    Args:
        features: of the extractor that they are to be compared by.

    Raises:
        UserError: the file is missing or damaged, or its arrays are missing, of other shapes, not finite, or no mean
            and covariance.
    """
    if not path.is_file():
        raise UserError(f"--statistics: found no file '{path}', expected an .npz file with 'mu' and 'sigma'.")
    try:
        with np.load(path, allow_pickle=False) as file:
            # np.load also reads plain arrays, which have no names.
            arrays = {name: file[name] for name in ("mu", "sigma") if name in getattr(file, "files", ())}
            names = ", ".join(getattr(file, "files", [])) or "no named arrays"
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        raise UserError(
            f"--statistics: found '{path}', which is no whole .npz file of numbers, expected one with 'mu' and 'sigma';"
            " get it again."
        ) from None
    if len(arrays) < 2:
        raise UserError(f"--statistics: found {names} in '{path}', expected 'mu' and 'sigma'; give another file.")
    return Published(_checked(path, arrays["mu"], arrays["sigma"], features), file_sha256(path))


def _checked(path: Path, mu: np.ndarray, sigma: np.ndarray, features: int) -> Statistics:
    if (mu.shape, sigma.shape) != ((features,), (features, features)):
        raise UserError(
            f"--statistics: found 'mu' {mu.shape} and 'sigma' {sigma.shape} in '{path}', expected ({features},) and"
            f" ({features}, {features}), the extractor's features; set evaluation.extractor to the one that the file"
            " was made with."
        )
    problem = _problem(mu, sigma)
    if problem:
        raise UserError(
            f"--statistics: found {problem} in '{path}', expected the mean and the covariance of features; get the file"
            " again."
        )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64))


def _problem(mu: np.ndarray, sigma: np.ndarray) -> str:
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not np.issubdtype(array.dtype, np.floating):
            return f"'{name}' of type {array.dtype}"
        if not np.isfinite(array).all():
            return f"numbers in '{name}' that are not finite"
    sigma = sigma.astype(np.float64)
    if np.abs(sigma - sigma.T).max() > TOLERANCE * np.abs(sigma).max():
        return "a 'sigma' that is not symmetric"
    eigenvalues = np.linalg.eigvalsh(sigma)
    if eigenvalues[0] < -TOLERANCE * max(eigenvalues[-1], 0.0):
        return f"a 'sigma' with the negative eigenvalue {eigenvalues[0]:.3g}"
    return ""

"""Recordings of what the runtime observed and of what attention then did: one ``.npz`` a document."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcast import files
from kvcast.errors import KvcastError

VERSION = 1
LOWEST, STEP = -16.0, 0.08


def encode(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Codes of positive scores; 1 for those below e^-16."""
    with np.errstate(divide="ignore"):
        return np.clip(1 + np.rint((np.log(scores) - LOWEST) / STEP), 1, 255).astype(np.uint8)


_VALUES = np.r_[0.0, np.exp(LOWEST + STEP * np.arange(255))].astype(np.float32)


def decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scores of codes; 0 for code 0 and for what was too small to tell."""
    return _VALUES[codes]


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded document; arrays as in the module's docstring."""

    truth: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.uint8]
    estimate: npt.NDArray[np.uint8]
    about: dict

    @property
    def n_primed(self) -> int:
        return len(self.truth) - len(self.seen)

    def save(self, path: Path) -> None:
        """Write whole or not at all.

        Raises
        ------
        KvcastError
            It cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                np.savez_compressed(file, truth=self.truth, seen=self.seen, estimate=self.estimate, about=json.dumps(self.about))
        except OSError as error:
            raise KvcastError(f"the recording {str(path)!r} cannot be written ({files.reason(error)}); free some space") from error


def load(path: Path) -> Trace:
    """Read a recording.

    Raises
    ------
    KvcastError
        The file is missing, damaged or of another version.
    """
    try:
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            if about.get("version") != VERSION:
                raise KvcastError(
                    f"{str(path)!r} is a recording of version {about.get('version')}, this is version {VERSION}; record it again"
                )
            return Trace(file["truth"], file["seen"], file["estimate"], about)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KvcastError(f"{str(path)!r} is not a recording of attention ({error}); make one with `kvcast trace`") from error

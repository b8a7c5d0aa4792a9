"""Files of packages, from the package index that pip or uv is set up for; checked by hash, and gone on with where a download broke off.

Used by ``kvcast.models`` and, on its own, by ``scripts/vendor.py`` inside the build: imports nothing of kvcast.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, PyPISimple, UnsupportedContentTypeError

CHUNK = 1 << 18
TIMEOUT_S = 60.0  # of one answer or silence of the index
INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")


class DownloadError(Exception):
    """A file could not be had; the message says which, why, and what to do."""


def download(name: str, version: str, ends: str, target: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Bring one file of a package's release.

    Parameters
    ----------
    name, version : str
    ends : str
        How the file's name ends: ``.whl``, ``.tar.gz``.
    target : Path
        Where it goes. What came of it is kept beside it, with ``.part`` after its name, and gone on with the next time.
    progress : callable, optional
        Called with (bytes done, bytes in all; 0 where they are not known).

    Raises
    ------
    DownloadError
        There is no such file, no way to the index, or what came has another hash than the index says.
    """
    what = f"{name}=={version}"
    partial = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _session() as session, filelock.FileLock(f"{target}.lock"):
            if target.exists():  # another process has brought it meanwhile
                return
            index = _setting("index-url", INDEX_VARIABLES) or PYPI_SIMPLE_ENDPOINT
            package = _find(PyPISimple(index, session=session), name, version, ends)
            _bring(session, package, partial, progress)
            _check(package, partial)
            os.replace(partial, target)
    except (requests.RequestException, UnsupportedContentTypeError) as error:
        raise DownloadError(
            f"{what} could not be downloaded ({_reason(error)}); check the network, or the index set in pip's configuration"
        ) from error
    except OSError as error:
        raise DownloadError(f"{what} could not be kept in {str(target.parent)!r} ({error.strerror or error}); free some space") from error


def _reason(error: BaseException) -> str:
    """The innermost cause: requests wraps it several times."""
    while isinstance(inner := (error.__cause__ or error.__context__ or getattr(error, "reason", None)), BaseException):
        error = inner
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        if bundle := _setting("cert", ("PIP_CERT",)):
            session.verify = bundle
        yield session


def _find(index: PyPISimple, name: str, version: str, ends: str) -> DistributionPackage:
    try:
        page = index.get_project_page(name, timeout=TIMEOUT_S)
    except NoSuchProjectError:
        raise DownloadError(f"the package index has no {name}; check the index set in pip's configuration") from None
    found = [package for package in page.packages if package.version == version and package.filename.endswith(ends)]
    if not found:
        raise DownloadError(f"the package index has no {ends} file of {name}=={version}; check the index set in pip's configuration")
    return found[0]


def _bring(session: requests.Session, package: DistributionPackage, partial: Path, progress: Callable[[int, int], None] | None) -> None:
    """The file's bytes; those that are there already are not asked for again."""
    n_have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={n_have}-"} if n_have else {})
    with session.get(package.url, stream=True, timeout=TIMEOUT_S, headers=headers) as answer:
        if answer.status_code == 416:  # all of it is there, or more
            return
        answer.raise_for_status()
        if answer.status_code != 206:
            n_have = 0
        n_all = n_have + int(answer.headers.get("Content-Length", 0))
        with partial.open("ab" if n_have else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                n_have += len(chunk)
                if progress:
                    progress(n_have, n_all)


def _check(package: DistributionPackage, partial: Path) -> None:
    """Against the hash that the index names. What differs is thrown away."""
    expected = package.digests.get("sha256")
    if expected and sha256(partial) != expected:
        partial.unlink()
        raise DownloadError(f"{package.filename} arrived damaged (another sha256 than the index says) and was thrown away; try again")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _setting(name: str, variables: tuple[str, ...]) -> str | None:
    """What the environment or pip's configuration says."""
    for variable in variables:
        if value := os.environ.get(variable):
            return value
    found = None
    for path in _pip_configurations():
        parser = configparser.RawConfigParser()
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(path, encoding="utf-8")
            found = parser.get("global", name, fallback=found)
    return found


def _pip_configurations() -> list[Path]:
    """Where pip looks, in its order: later ones win."""
    home, name = os.path.expanduser("~"), "pip.ini" if os.name == "nt" else "pip.conf"
    paths = [Path("/etc/pip.conf"), Path(home, ".pip", name), Path(os.environ.get("XDG_CONFIG_HOME") or Path(home, ".config"), "pip", name)]
    if os.name == "nt":
        paths = [Path(os.environ.get(base, home), "pip", name) for base in ("PROGRAMDATA", "APPDATA")]
    elif sys.platform == "darwin":
        paths.insert(1, Path(home, "Library", "Application Support", "pip", name))
    paths.append(Path(sys.prefix, name))
    if (named := os.environ.get("PIP_CONFIG_FILE")) and named != os.devnull:
        paths.append(Path(named))
    return paths

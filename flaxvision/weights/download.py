"""Downloads files into a cache. An interrupted download never leaves a damaged file in the cache."""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flaxvision import atomic
from flaxvision.weights.files import sha256_of

_log = logging.getLogger(__name__)

_CHUNK = 2**20
_DAY = 86_400


def cache_dir() -> Path:
    """Returns the folder of downloaded files: `$FLAXVISION_CACHE`, or `flaxvision` in the platform's cache folder."""
    if chosen := os.environ.get("FLAXVISION_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flaxvision"


def fetch(
    url: str,
    digest: str | None = None,
    *,
    revision: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    retries: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: bool = True,
) -> Path:
    """Downloads a file, unless it is in the cache.

    The bytes go to a temporary file, which is moved into the cache when it is complete and has the right digest. A
    dropped connection is resumed if the server supports it; otherwise the download starts again.

    Args:
        url: `http://`, `https://`, or `hf://OWNER/REPOSITORY/FILE` for the Hugging Face hub.
        digest: `sha256:HEX` or `md5:HEX`; the beginning of the digest is enough. Without one, the file is compared
            with the MD5 that Google Cloud Storage sends, or with the SHA-256 that the hub states, if there is one.
        revision: Commit, tag or branch on the hub.
        directory: The cache; None for `cache_dir()`.
        retries: Number of attempts after the first one.
        timeout: Seconds without an answer after which a connection counts as dropped.
        pause: Seconds before the first retry; doubled for each further one.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The path of the file.

    Raises:
        ValueError: The file has another digest, or `url` or `digest` has another form.
        ConnectionError: The server refused, or the connection dropped more than `retries` times.
    """
    directory = Path(directory) if directory is not None else cache_dir()
    if digest is not None and not re.fullmatch(r"sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{8,32}", digest):
        raise ValueError(f"digest must be sha256:HEX or md5:HEX with at least 8 digits; got {digest!r}")
    if url.startswith("hf://"):
        return _fetch_from_hub(url, digest, revision, directory / "hub")
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"url must begin with https://, http:// or hf://; got {url!r}")
    name = url.partition("?")[0].rpartition("/")[2]
    # The folder keeps files of the same name from different addresses apart.
    path = directory / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    seen = path.with_name(path.name + ".sha256")
    if path.is_file():
        known = digest or (f"sha256:{seen.read_text().strip()}" if seen.is_file() else "")
        if known and _differs(path, known) is None:
            return path
        # Replaced rather than removed: another process may be about to read it.
        _log.warning("%s in the cache is damaged; downloading it again", path)
    _sweep(path.parent)
    with atomic.replacing(path) as partial:
        stated = _download(url, partial, retries, timeout, pause, progress)
        for expected in filter(None, (digest, stated)):
            if wrong := _differs(partial, expected):
                raise ValueError(f"digest of {url} must begin with {expected}; got {wrong}, and the file was not kept")
        seen.unlink(missing_ok=True)  # after a crash, the digest of an older file must not vouch for the new one
        found = sha256_of(partial)
    with atomic.replacing(seen) as partial:
        partial.write_text(found + "\n")
    return path


def _differs(path: Path, digest: str) -> str | None:
    algorithm, _, beginning = digest.partition(":")
    found = sha256_of(path, algorithm)
    return None if found.startswith(beginning) else f"{algorithm}:{found}"


def _sweep(directory: Path) -> None:
    for old in directory.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _DAY:
                old.unlink()


def _download(url: str, partial: Path, retries: int, timeout: float, pause: float, progress: bool) -> str | None:
    """Downloads `url` to `partial`; returns the digest that the server states, if any."""
    state: dict[str, Any] = {"stated": None, "etag": None}
    reason: Exception = ConnectionError("no attempt was made")
    for attempt in range(retries + 1):
        try:
            _append(url, partial, state, timeout, progress)
            return state["stated"]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the partial file does not fit what is served now
                partial.unlink(missing_ok=True)
            elif error.code not in (408, 425, 429) and error.code < 500:
                raise ConnectionError(
                    f"{url} was refused: HTTP {error.code} {error.reason}; check the address"
                ) from error
            reason = error
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
                raise
            reason = error
        if attempt < retries:
            _log.warning("%s: %s; retrying", url, reason)
            time.sleep(pause * 2**attempt)
    raise ConnectionError(
        f"{url} could not be downloaded in {retries + 1} attempts: {reason}; check the connection"
    ) from reason


def _append(url: str, partial: Path, state: dict[str, Any], timeout: float, progress: bool) -> None:
    from tqdm import tqdm

    start = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "flaxvision", "Accept-Encoding": "identity"}
    if start and state["etag"]:
        headers |= {"Range": f"bytes={start}-", "If-Range": state["etag"]}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        resumed = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")
        start = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        tag = answer.headers.get("ETag") or ""
        state["etag"] = None if tag.startswith("W/") else tag or None  # a weak tag does not promise the same bytes
        state["stated"] = _stated(answer.headers.get_all("x-goog-hash") or []) or (state["stated"] if resumed else None)
        bar = tqdm(
            desc=partial.name[1:].partition(".")[0],
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        )
        with bar, open(partial, "ab" if resumed else "wb") as file:
            while block := answer.read(_CHUNK):
                file.write(block)
                bar.update(len(block))
    if total is not None and (size := partial.stat().st_size) != total:
        raise ConnectionError(f"connection dropped after {size} of {total} bytes")


def _stated(hashes: list[str]) -> str | None:
    """Returns the MD5 in the headers of Google Cloud Storage in hexadecimal digits."""
    for part in ",".join(hashes).split(","):
        if part.strip().startswith("md5="):
            with contextlib.suppress(binascii.Error):
                return f"md5:{base64.b64decode(part.strip()[4:], validate=True).hex()}"
    return None


def _fetch_from_hub(url: str, digest: str | None, revision: str | None, directory: Path) -> Path:
    owner, _, rest = url.removeprefix("hf://").partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name):
        raise ValueError(f"url must be hf://OWNER/REPOSITORY/FILE; got {url!r}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(**options: Any) -> Path:
        return Path(hf_hub_download(f"{owner}/{repository}", name, revision=revision, cache_dir=directory, **options))

    with contextlib.suppress(LocalEntryNotFoundError):
        path = get(local_files_only=True)
        if _wrong_on_hub(path, digest) is None:
            return path
        _log.warning("%s in the cache is damaged; downloading it again", path)
        path.resolve().unlink()
    try:
        path = get(endpoint=os.environ.get("HF_ENDPOINT"))
    except Exception as error:  # the HTTP library, and so the type, depends on the version
        raise ConnectionError(
            f"{url} could not be downloaded: {type(error).__name__} {error}; check the connection"
        ) from error
    if wrong := _wrong_on_hub(path, digest):
        expected, found = wrong
        path.resolve().unlink()
        raise ValueError(f"digest of {url} must begin with {expected}; got {found}, and the file was not kept")
    return path


def _wrong_on_hub(path: Path, digest: str | None) -> tuple[str, str] | None:
    """Returns the expected and the found digest if they differ."""
    # The hub's library names the blob of a large file by the SHA-256 that the hub states.
    blob = path.resolve().name
    stated = f"sha256:{blob}" if re.fullmatch(r"[0-9a-f]{64}", blob) else None
    for expected in filter(None, (digest, stated)):
        if wrong := _differs(path, expected):
            return expected, wrong
    return None

"""One file from an http(s) address: resumed by ranges, whole or absent."""

import re
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from dp_lora.data.versioned import check_space, gigabytes
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import naming_full_disk, read_json, write_json
from dp_lora.progress import progress

TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 5  # most attempts in a row without a new byte
PAUSE = 2.0  # seconds before the next attempt
CHUNK = 1 << 20
AGENT = {"User-Agent": "dp-lora", "Accept-Encoding": "identity"}


def shown_url(url: str) -> str:
    """The address without user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no address: brackets without an IPv6 address
        return url.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def download(url: str, path: Path, events: Events, max_bytes: int | None = None) -> None:
    """Download `url` to `path`; InputError for more than `max_bytes`.

    An interrupted download is kept in PATH.part and resumes by an HTTP range where the server still has the same file
    (ETag, else date, and size); else it begins anew. Honours the proxies of the environment. Raises InputError, one
    line that names the address, and keeps the bytes that arrived.
    """
    part = path.with_name(path.name + ".part")
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, events, max_bytes)
            break
        except HTTPError as error:
            cause, again = f"HTTP {error.code} {error.reason}", error.code in (408, 429, 500, 502, 503, 504)
        except InputError:
            raise
        except ValueError as error:  # no address: the host or port is impossible
            cause, again = " ".join(str(error).split()), False
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            cause, again = " ".join(str(reason).split()), True
        attempt = 1 if part.exists() and part.stat().st_size > before else attempt + 1
        if not again or attempt >= ATTEMPTS:
            raise InputError(
                f"{shown_url(url)}: {cause}; the same command goes on where it stopped; a mirror may serve too"
            ) from None
        events.message(f"{shown_url(url)}: {cause}; trying again")
        time.sleep(PAUSE * attempt)
    part.replace(path)
    _record(part).unlink(missing_ok=True)


def _record(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _transfer(url: str, part: Path, events: Events, max_bytes: int | None) -> None:
    """One request; appends the server's bytes to `part`. Returns when the file is complete."""
    known = _read_record(part)
    have = part.stat().st_size if part.exists() and known.get("url") == shown_url(url) else 0
    headers = dict(AGENT)
    if have and known.get("validator"):
        # If-Range: a server whose file has changed sends the whole of the new one
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        if have == known.get("size"):
            return
        part.unlink()
        raise URLError("the server has another file by now") from None
    with response:
        start, size = _range(response)
        if start not in (0, have) or (start and known.get("size") not in (None, size)):
            part.unlink()
            raise URLError("the server has another file by now")
        if have and not start:
            events.message(f"{shown_url(url)}: no ranges, or another file than before: from the beginning")
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        # a weak ETag does not promise equal bytes
        validator = None if validator is None or validator.startswith("W/") else validator
        if size is not None:
            free = check_space(part.parent, size - start)
            events.message(
                f"{shown_url(url)}: {gigabytes(size - start)} to download, {gigabytes(free)} free on this disk"
            )
        write_json(_record(part), {"url": shown_url(url), "validator": validator, "size": size})
        _receive(response, part, start, size, max_bytes)


def _read_record(part: Path) -> dict[str, Any]:
    try:
        return dict(read_json(_record(part)))
    except (OSError, ValueError):
        return {}


def _range(response: HTTPResponse) -> tuple[int, int | None]:
    """The first byte of the answer, and the size of the whole file, None where the server does not say."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _receive(response: HTTPResponse, part: Path, start: int, size: int | None, max_bytes: int | None) -> None:
    name = part.name.removesuffix(".part")
    bar = progress(total=size, initial=start, unit="B", unit_scale=True, desc=name)
    with naming_full_disk(part), part.open("ab" if start else "wb") as file, bar as shown:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            shown.update(len(chunk))
            if max_bytes is not None and file.tell() > max_bytes:
                part.unlink()
                raise InputError(f"{shown_url(response.url)}: more than {max_bytes:,} bytes")
        received = file.tell()
    if size is not None and received != size:
        raise URLError(f"the connection ended after {received:,} of {size:,} bytes")

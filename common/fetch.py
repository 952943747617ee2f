"""Downloads: mirrors in order, checksums, safe extraction. pooch downloads one file; this chooses the mirror."""

import lzma
import os
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from common.terminal import UserError

import pooch
import requests
from tqdm import tqdm

pooch.get_logger().setLevel("ERROR")


class Unreachable(UserError):
    """No mirror delivered; `reasons` has a line for each."""

    def __init__(self, what, reasons):
        super().__init__(f"{what} could not be fetched ({'; '.join(reasons) or 'it has no mirror'})")
        self.reasons = reasons


class Meter(tqdm):
    """A progress bar that gives up a mirror if it delivers less than `min_rate` bytes/s after `patience` seconds."""

    def __init__(self, patience, min_rate, **options):
        super().__init__(unit="B", unit_scale=True, disable=None, leave=False, **options)
        self.patience = patience
        self.min_rate = min_rate
        self.received = 0
        self.since = time.monotonic()

    def __bool__(self):
        return True  # pooch asks whether there is a bar; tqdm would say whether anything is left

    def update(self, n=1):
        self.received += n
        seconds = time.monotonic() - self.since
        if seconds > self.patience and self.received < self.min_rate * seconds:
            raise TimeoutError(f"delivers only {self.received / seconds / 1000:.0f} kB/s")
        return super().update(n)


def download(urls: list[str], path: Path, checksum: str | None = None, patience=5.0, min_rate=200_000) -> Path:
    """Download `path` from the first of `urls` that answers within `patience` seconds and keeps up `min_rate` bytes/s.

    checksum: "md5:..." or "sha256:..."; a mirror that serves other bytes is skipped like one that is down. The file
    appears under its name complete and verified, or not at all. A file that exists is verified and kept. Raises
    UserError, and Unreachable if no mirror delivers.
    """
    path = Path(path)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        if checksum and not pooch.hashes.hash_matches(path, checksum):
            raise UserError(f"{path}: does not have the published checksum; remove it to fetch it again")
        return path
    reasons, missing = [], [folder for folder in path.parents if not folder.exists()]
    try:
        for url in urls:
            host = url.split("/")[2]
            try:
                return download_one(url, path, checksum, patience, min_rate, host)
            except (requests.RequestException, TimeoutError, ValueError) as error:  # ValueError: the hash differs
                reasons.append(f"{host}: {reason(error)}")
            except OSError as error:  # a local problem, which no other mirror can fix
                raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        for folder in missing if not path.exists() else []:  # created in vain
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    raise Unreachable(path.name, reasons)


def download_one(url, path, checksum, patience, min_rate, host):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as part:
        meter = Meter(patience, min_rate, desc=f"{path.name} from {host}")
        client = pooch.HTTPDownloader(progressbar=meter, timeout=patience)
        try:
            received = pooch.retrieve(url, checksum, path.name, part, downloader=client)
        finally:
            meter.close()
        os.replace(received, path)
    return path


def reason(error):
    """A network error in a few words."""
    text = str(error)
    known = {
        "hash of downloaded file": "served other bytes than published",
        "timed out": "timed out",
        "IncompleteRead": "broke off",
        "Connection broken": "broke off",
        "resolve": "name not found",
        "refused": "connection refused",
    }
    for sign, words in known.items():
        if sign in text:
            return words
    return text.splitlines()[0][:100] if text else type(error).__name__


def extract(archive: Path, folder: Path) -> Path:
    """Unpack the tar `archive`, which holds one folder of that name, as `folder`: completely or not at all.

    Members that would land outside (absolute names, `..`, links) are refused (PEP 706). Raises UserError.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".extract-") as part:
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
            if not folder.exists():  # another process may have been faster
                os.replace(Path(part) / folder.name, folder)
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: refused, it would write outside its folder ({error})") from error
    except (tarfile.TarError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error})") from error
    return folder

"""Fetching files over HTTP: mirrors in order, checksums, safe extraction. pooch downloads; added is which mirror.

The same file, to the byte, lies in every folder that fetches (tests/test_contract.py holds the copies equal).
"""

import lzma
import os
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from run import UserError

pooch.get_logger().setLevel("ERROR")


class Unreachable(UserError):
    """No mirror delivered; `said` is what each of them said instead."""

    def __init__(self, what, said):
        super().__init__(f"{what} could not be fetched ({'; '.join(said) or 'it has no mirror'})")
        self.said = said


class Meter(tqdm):
    """A progress bar that gives a mirror up when, after `patience` seconds, it delivers under `min_rate` bytes/s."""

    def __init__(self, patience, min_rate, **options):
        super().__init__(unit="B", unit_scale=True, disable=None, leave=False, **options)
        self.patience, self.min_rate, self.came, self.since = patience, min_rate, 0, time.monotonic()

    def __bool__(self):
        return True  # pooch asks whether there is a bar, tqdm would say whether anything is left

    def update(self, n=1):
        self.came += n
        seconds = time.monotonic() - self.since
        if seconds > self.patience and self.came < self.min_rate * seconds:
            raise TimeoutError(f"delivers only {self.came / seconds / 1000:.0f} kB/s")
        return super().update(n)


def download(urls, path, checksum=None, patience=5.0, min_rate=200_000):
    """Download `path` from the first of `urls` that answers within `patience` seconds and keeps up `min_rate` bytes/s.

    `checksum` is "md5:..." or "sha256:..."; a mirror that serves other bytes is passed over like one that is down.
    The file appears under its name complete and verified, or not at all. A file that is there already is verified too,
    and kept. Returns `path`; raises Unreachable with what each mirror said.
    """
    path = Path(path)
    if path.exists():
        if checksum and not pooch.hashes.hash_matches(path, checksum):
            raise UserError(f"{path}: does not have the published checksum; remove it to fetch it again")
        return path
    said = []
    for url in urls:
        host = url.split("/")[2]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as part:
                meter = Meter(patience, min_rate, desc=f"{path.name} from {host}")
                client = pooch.HTTPDownloader(progressbar=meter, timeout=patience)
                try:
                    got = pooch.retrieve(url, checksum, path.name, part, downloader=client)
                finally:
                    meter.close()
                os.replace(got, path)
            return path
        except (requests.RequestException, TimeoutError, ValueError) as error:  # pooch: ValueError, the hash differs
            said.append(f"{host}: {reason(error)}")
        except OSError as error:  # what is wrong on this side no other mirror can mend
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    raise Unreachable(path.name, said)


def reason(error):
    """A network error in a few words."""
    text = str(error)
    for sign, words in (
        ("hash of downloaded file", "served other bytes than published"),
        ("timed out", "timed out"),
        ("IncompleteRead", "broke off"),
        ("Connection broken", "broke off"),
        ("resolve", "name not found"),
        ("refused", "connection refused"),
    ):
        if sign in text:
            return words
    return text.splitlines()[0][:100] if text else type(error).__name__


def extract(archive, folder):
    """Unpack the tar `archive`, which holds one folder of that name, as `folder`: whole or not at all.

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
        raise UserError(f"{archive}: refused, it would write outside its folder ({error})") from None
    except (tarfile.TarError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error})") from None
    return folder

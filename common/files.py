"""Files that appear completely or not at all, and folders that are locked."""

import contextlib
import csv
import io
import json
import os
import socket
import warnings
from pathlib import Path

from common.terminal import UserError, printable

import filelock


def write(path: Path, content: bytes | str):
    """Write `content` to `path` completely or not at all: a temporary name, fsync, rename. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and not path.is_file():  # a device: the rename would replace it
            raise OSError(0, "not a regular file")
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a signal raises KeyboardInterrupt
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); the earlier file is unharmed") from error


def append(path: Path, text: str):
    """Append `text` to a UTF-8 file. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def csv_reader(path: Path, text: str):
    """The rows of a CSV file whose content is `text`, with fields of any length. Raises UserError if it is not CSV."""
    limit = csv.field_size_limit(2**31 - 1)  # the csv module's own limit is 131,072 characters
    try:
        yield csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise UserError(f"{path}: is not a valid CSV file ({error})") from error
    finally:
        csv.field_size_limit(limit)


def write_json(path: Path, content):
    write(path, json.dumps(content, indent=1) + "\n")


def write_figure(path: Path, figure):
    """Write a matplotlib figure as a PNG. A character that the font lacks is drawn as a box, without warnings."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write(path, content.getvalue())


def plain_text(text: str) -> str:
    """A user's text for a figure: matplotlib would read text between dollar signs as mathematics."""
    return str(text).encode(errors="backslashreplace").decode().replace("$", r"\$")


def make_folder(path: str | Path) -> Path:
    """The folder `path`, created if it is not there. Call it before the work whose results it is to hold."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror})") from error
    return Path(path)


def lock_folder(folder: Path) -> filelock.FileLock:
    """Lock `folder` for this process and return the lock; the system releases it when the process dies."""
    lock, holder = filelock.FileLock(folder / ".lock", timeout=0), folder / ".lock-holder"
    try:
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout:
        by = holder.read_text(encoding="utf-8", errors="replace") if holder.exists() else "another process"
        raise UserError(f"{folder}: is in use by {by}") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{folder}: cannot be locked ({getattr(error, 'strerror', error)})") from error
    return lock


def display_path(path: str | Path) -> str:
    """`path` for the screen: as one would type it here, with control characters escaped."""
    return printable(typed_path(path))


def typed_path(path: str | Path) -> str:
    """`path` as one would type it here: relative to the current directory if that is shorter."""
    try:
        return min(str(path), os.path.relpath(path), key=len)
    except (OSError, ValueError):  # another drive, or a current directory that is gone
        return str(path)

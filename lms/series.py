"""Series in the order of time: a WAV file, a column of a CSV, or a built-in melody in noise."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import short
from common.run import UserError

import numpy as np
from scipy.io import wavfile
from scipy.signal import lfilter

from data import read_csv

RATE = 8000  # of the melody, in samples per second
NOTES = "E4 E4 F4 G4 G4 F4 E4 D4 C4 C4 D4 E4 E4 D4 D4"  # Beethoven's Ode to Joy
PITCHES = {"C4": 261.63, "D4": 293.66, "E4": 329.63, "F4": 349.23, "G4": 392.00}  # in hertz
NOTE_SECONDS = 0.4
NOISE_DB = 10.0  # the power of the noise above the power of the melody
PATH_TAPS = 32  # of the room between the source of the noise and the microphone


@dataclass
class Series:
    """A series of N samples."""

    name: str
    values: np.ndarray  # (N,) float64
    reference: np.ndarray | None = None  # (N,): recorded where there is noise alone
    rate: int | None = None  # samples per second of a WAV file, whose largest sample is 1; None for a CSV
    clean: np.ndarray | None = None  # (N,): `values` without noise, if that is known


def melody(seed: int = 0) -> Series:
    """A melody in noise that is ten times as strong, and the noise alone from a second microphone.

    White noise reaches the first microphone through a room, a filter of PATH_TAPS taps, and the second one through
    another short filter. The reference is therefore not the noise that is to be cancelled; a filter of it is.
    """
    rng = np.random.default_rng(seed)
    n = round(NOTE_SECONDS * RATE)
    t = np.arange(n) / RATE
    envelope = np.minimum(t / 0.02, 1) * np.exp(-3 * t)
    phases = [2 * np.pi * PITCHES[name] * t for name in NOTES.split()]
    clean = np.concatenate([envelope * (np.sin(phase) + 0.4 * np.sin(2 * phase)) for phase in phases])
    source = rng.normal(size=len(clean))
    room = rng.normal(size=PATH_TAPS) * np.exp(-np.arange(PATH_TAPS) / 8)
    noise = lfilter(room, 1, source)
    noise *= np.sqrt(10 ** (NOISE_DB / 10) * np.mean(clean**2) / np.mean(noise**2))
    reference = lfilter([1, 0.5], 1, source)
    loudest = np.abs(clean + noise).max() / 0.9  # full scale is 1
    reference *= 0.9 / np.abs(reference).max()
    return Series("melody in noise", (clean + noise) / loudest, reference, RATE, clean / loudest)


def read_series(path: Path, column: str | None, reference: str | None) -> Series:
    """The series in a WAV or CSV file. column, reference: names of columns, or numbers of channels from 1 on. Without
    `column`: all channels averaged, or the only column. Raises UserError."""
    try:
        if not path.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file" if path.exists() else "there is none")
        with open(path, "rb") as file:
            beginning = file.read(4)
    except OSError as error:
        raise UserError(f"{run.display_path(path)}: cannot be read ({error.strerror})") from error
    if not beginning:
        raise UserError(f"{run.display_path(path)}: is empty")
    read = read_wav if beginning in (b"RIFF", b"RIFX", b"RF64") else read_table
    series = read(path, column, reference)
    check(series.values, series.name)
    if series.reference is not None:
        check(series.reference, f"{series.name}, --reference {reference}")
    return series


def check(values: np.ndarray, place: str):
    """Raise UserError if a series has nothing that a filter can learn from."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise UserError(f"{place}: sample {bad[0]:,} is not a finite number")
    if len(values) and np.abs(values).max() > 1e100:
        raise UserError(f"{place}: has numbers above 1e100, whose squares may overflow; scale them down")
    if len(values) > 1 and values[len(values) // 2 :].std() == 0:
        raise UserError(f"{place}: is constant in its second half, where the result is measured; cut it")


def read_wav(path: Path, column: str | None, reference: str | None) -> Series:
    """A WAV file of 8, 16, 24 or 32 bits, or of floating-point numbers; its largest possible sample is 1. Raises
    UserError."""
    name = run.display_path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that are no sound, such as a title
            rate, samples = wavfile.read(path)
    except (OSError, ValueError, TypeError, ArithmeticError, MemoryError, LookupError, NameError) as error:
        raise UserError(f"{name}: is not a readable WAV file ({' '.join(str(error).split())[:100]})") from error
    except Exception as error:  # struct.error, which is no ValueError
        raise UserError(f"{name}: is not a readable WAV file (it is cut short or damaged)") from error
    if samples.size == 0:
        raise UserError(f"{name}: holds no samples")
    if samples.dtype == np.uint8:  # 8 bits have no sign, 24 bits come as the upper ones of 32
        samples = (samples.astype(float) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    channels = samples.astype(float).reshape(len(samples), -1)  # (N, channels)
    count = channels.shape[1]

    def channel(text, option):
        if not re.fullmatch("[1-9][0-9]{0,3}", text) or int(text) > count:
            raise UserError(f"{option} {short(text)}: {name} has {count} channels; name one by its number, from 1 on")
        return channels[:, int(text) - 1]

    noise = channel(reference, "--reference") if reference else None
    if column:
        values = channel(column, "--column")
    elif reference:
        others = [i for i in range(count) if i != int(reference) - 1]
        if not others:
            raise UserError(f"--reference {short(reference)}: {name} has no other channel")
        values = channels[:, others].mean(1)
    else:
        values = channels.mean(1)
    averaged = f", {count} channels averaged" if count > 1 and not column and not reference else ""
    return Series(name + averaged, values, noise, int(rate))


def read_table(path: Path, column: str | None, reference: str | None) -> Series:
    """A column of a CSV with a line of names. The other columns may hold anything. Raises UserError."""
    if reference is not None and column is None:
        raise UserError(f"--reference {short(reference)}: name the column with the noise too, with --column")
    wanted = [name for name in (column, reference) if name is not None]
    names, values = read_csv(path, wanted, all_columns=False)
    noise = values[:, 1] if reference is not None else None
    return Series(f"{run.display_path(path)}, column {names[0]}", values[:, 0], noise)

"""Cancel the noise in a recording or a series of your own, by a filter that adapts to it while it runs.

    python lms/cancel.py                                   # a melody in noise ten times as strong: built in
    python lms/cancel.py recording.wav                     # keep what repeats, remove what cannot be predicted
    python lms/cancel.py recording.wav --reference 2       # channel 2 was recorded where there is noise alone
    python lms/cancel.py table.csv --column demand         # a column of a CSV
    python lms/cancel.py table.csv --column ecg --reference mains

With a reference, the filter predicts the noise in the series from the reference, and the error of the prediction is the
clean series (Widrow et al. 1975). Without one, it predicts the series from its own past (the adaptive line enhancer):
tones and cycles can be predicted, and white noise cannot. Writes the clean series, what was removed from it, and
cancel.png into --out. The filter is the folder's own: NLMS for sound and RLS for a CSV, if --filter does not name one.
"""

import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from common import run
from common.options import option

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import welch

import model
from series import Series, melody, read_series

CHUNK = 65_536  # samples for which weights are in memory at once
MOST = 2**27  # weights that RLS, which cannot be continued in chunks, may have in memory: a gigabyte


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    file: str | None = option(
        None, "a WAV or CSV file (default: the melody)", type=run.path_arg, metavar="FILE", positional=True, nargs="?"
    )
    column: str | None = option(None, "column of the CSV, or channel of the WAV, from 1 on", type=str)
    reference: str | None = option(None, "column or channel with the noise alone", type=str, metavar="COLUMN")
    filter: str = option("nlms", "the adaptive filter", choices=["lms", "nlms", "rls"])
    taps: int = option(64, "past samples that predict the next one", above=0, at_most=4096)
    lr: float = option(0.02, "step size r; of nlms below 2", above=0, only=("lms", "nlms"))
    forgetting: float = option(0.999, "how much a sample ago counts", above=0, at_most=1, only="rls")
    delay: int = option(1, "without a reference: samples between the past and the predicted one", above=0)
    out: str = option(str(run.ROOT / "out/lms/cancel"), "folder for the results", type=run.path_arg, metavar="DIR")

    variant: ClassVar[str] = "filter"

    def check(self):
        if self.file is None and (self.column is not None or self.reference is not None):
            raise run.UserError("--column, --reference: are for a file; the melody has its own")
        if self.delay != 1 and (self.file is None or self.reference is not None):
            raise run.UserError(f"--delay {self.delay}: is for a file without a reference")
        if self.filter == "nlms" and self.lr >= 2:
            raise run.UserError(f"--lr {self.lr:g}: NLMS is stable below 2")


FILTERS = {
    "nlms": Options(),
    "lms": Options(filter="lms", lr=0.001),
    "rls": Options(filter="rls", taps=16),
}


def past(series: np.ndarray, taps: int, delay: int) -> np.ndarray:
    """(N, taps): row k is series[k - delay], series[k - delay - 1], ...; zeros before the beginning. No copy."""
    padded = np.concatenate([np.zeros(taps - 1 + delay), series])[: len(series) + taps - 1]
    return np.lib.stride_tricks.sliding_window_view(padded, taps)[:, ::-1]


def predict(args: Options, X: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The predictions (N,) of d by the adaptive filter on the inputs X (N, taps). Raises UserError if it diverges."""
    with np.errstate(over="ignore", invalid="ignore"):  # divergence is looked for below
        if args.filter == "rls":
            _, errors = model.rls(X, d, args.forgetting, delta=1.0)
        else:
            update = {"lms": model.lms, "nlms": model.nlms}[args.filter]
            errors = np.empty(len(d))
            w = None
            for first in range(0, len(d), CHUNK):
                rows = slice(first, first + CHUNK)
                weights, errors[rows] = update(X[rows], d[rows], args.lr, w)
                w = weights[-1]
    sample = model.diverged_at(errors)
    if sample is not None:
        change = "a --forgetting nearer to 1" if args.filter == "rls" else "a smaller --lr"
        raise run.UserError(f"the filter diverged at sample {sample:,}; try {change}")
    return d - errors


def cancel(args: Options, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """(the clean series, what was removed from it), (N,) each. Raises UserError."""
    mean, scale = series.values.mean(), series.values.std()
    d = (series.values - mean) / scale
    if series.reference is None:
        prediction = predict(args, past(d, args.taps, args.delay), d)
        return mean + scale * prediction, scale * (d - prediction)
    noise = (series.reference - series.reference.mean()) / series.reference.std()
    prediction = predict(args, past(noise, args.taps, delay=0), d)
    return mean + scale * (d - prediction), scale * prediction


def decibels(power: float, reference: float) -> float:
    """The ratio of two powers; minus infinity for no power at all."""
    return 10 * math.log10(power / reference) if power > 0 else -math.inf


def noise_gain(series: Series, clean: np.ndarray) -> dict[str, float]:
    """The noise beside the known clean series, before and after, and what was gained, in decibels."""
    half = slice(len(clean) // 2, None)
    truth = series.clean[half]
    before = decibels(np.mean((series.values[half] - truth) ** 2), np.mean(truth**2))
    after = decibels(np.mean((clean[half] - truth) ** 2), np.mean(truth**2))
    return {"before_db": before, "after_db": after, "gained_db": before - after}


def describe(series: Series, clean: np.ndarray, removed: np.ndarray) -> str:
    """What was gained, over the second half, when the filter has adapted."""
    half = slice(len(clean) // 2, None)
    if series.clean is not None:
        gain = noise_gain(series, clean)
        return (
            f"{gain['gained_db']:.1f} dB gained: the noise was {gain['before_db']:.1f} dB above the melody and is now "
            f"{-gain['after_db']:.1f} dB below it"
        )
    power = decibels(np.var(clean[half]), np.var(series.values[half]))
    if series.reference is not None and power >= 0:
        return "the reference does not predict the series, and subtracting its prediction only adds noise"
    if series.reference is not None:
        return (
            f"{-power:.1f} dB removed, all that the reference predicts; how much of this was noise cannot be measured "
            "without the clean series"
        )
    rest = decibels(np.mean(removed[half] ** 2), np.var(series.values[half]))
    if rest >= 0:
        return "its past does not predict the series, and what is kept is the filter's own noise"
    return (
        f"what its past predicts is kept; the rest, {-rest:.1f} dB below the input, is removed, and is the noise only "
        "if the noise is white"
    )


# ------------------------------------------------------------------------------------------------------------ results


def write_results(args: Options, series: Series, clean: np.ndarray, removed: np.ndarray, out: Path) -> list[Path]:
    """Write the series, as WAV files of 16 bits or as one CSV. Returns the files. Raises UserError."""
    if series.rate is None:
        file = out / "cleaned.csv"
        refuse_input(args, file)
        lines = [f"{row[0]!r},{row[1]!r}" for row in zip(clean.tolist(), removed.tolist())]
        run.write(file, "\n".join(["cleaned,removed", *lines]) + "\n")
        return [file]
    sounds = {"cleaned.wav": clean, "removed.wav": removed}
    if series.clean is not None:
        sounds["noisy.wav"] = np.stack([series.values, series.reference], 1)
    for name in sounds:
        refuse_input(args, out / name)
    for name, samples in sounds.items():
        write_wav(out / name, series.rate, samples)
    return [out / name for name in sounds]


def refuse_input(args: Options, file: Path):
    """Raise UserError if `file` is the one that was read."""
    if args.file is not None and file.exists() and file.samefile(args.file):
        raise run.UserError(f"{run.display_path(file)}: is the input, and would be overwritten; name another --out")


def write_wav(path: Path, rate: int, samples: np.ndarray):
    """Write samples (N,) or (N, channels), of which the largest possible one is 1. Raises UserError."""
    content = io.BytesIO()
    wavfile.write(content, rate, (np.clip(samples, -1, 1) * 32767).round().astype(np.int16))
    run.write(path, content.getvalue())


def draw(series: Series, clean: np.ndarray):
    """Left: the series before and after. Right: the spectra of their second halves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rate = series.rate or 1
    step = max(1, len(clean) // 20_000)  # more points than pixels would only take time
    seconds = np.arange(0, len(clean), step) / rate
    curves = {"as recorded": (series.values, "0.75"), "cleaned": (clean, "tab:blue")}
    if series.clean is not None:
        curves["the melody itself"] = (series.clean, "tab:orange")
    for label, (values, color) in curves.items():
        left.plot(seconds, values[::step], lw=0.6, color=color, label=label)
        half = values[len(values) // 2 :]
        frequencies, power = welch(half, rate, nperseg=min(len(half), 1024))
        right.plot(frequencies[1:], 10 * np.log10(np.maximum(power[1:], 1e-30)), lw=1, color=color, label=label)
    left.set(xlabel="seconds" if series.rate else "samples", ylabel="value")
    right.set(xlabel="frequency (Hz)" if series.rate else "frequency (cycles per sample)", ylabel="power (dB)")
    left.legend(loc="upper right", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


# --------------------------------------------------------------------------------------------------------------- main


def recipe(given: dict) -> Options:
    """The defaults of the filter: RLS, which learns from few samples, for a CSV, and NLMS for sound."""
    name = given.get("filter") or ("rls" if str(given.get("file", "")).lower().endswith(".csv") else "nlms")
    return replace(FILTERS[name])


def main(argv=None):
    args = run.parse_options(__file__, Options, argv, recipe)
    series = melody() if args.file is None else read_series(Path(args.file), args.column, args.reference)
    needed = 4 * args.taps + (0 if series.reference is not None else args.delay)
    if len(series.values) < needed:
        raise run.UserError(
            f"{series.name}: {args.taps} taps need at least {needed:,} samples, and there are {len(series.values):,}; "
            "try fewer --taps"
        )
    if args.filter == "rls" and len(series.values) * args.taps > MOST:
        raise run.UserError(f"{series.name}: is too long for --filter rls with {args.taps} taps; try --filter nlms")
    out = run.make_folder(args.out)
    clean, removed = cancel(args, series)
    files = write_results(args, series, clean, removed, out)
    run.write_figure(out / "cancel.png", draw(series, clean))
    if series.clean is not None:
        row = {"setting": args.filter, "taps": args.taps, "state": "done", "final": noise_gain(series, clean)}
        machine = run.environment(torch.device("cpu"), __file__)
        run.write_json(out / "cancel.json", machine | {"rows": [row]})
    how = "with a reference" if series.reference is not None else "from its own past"
    print(
        f"{series.name}, {len(clean):,} samples, {args.filter.upper()} of {args.taps} taps {how}: "
        f"{describe(series, clean, removed)}"
    )
    print(", ".join(map(run.display_path, [out / "cancel.png", *files])))
    return clean, removed


if __name__ == "__main__":
    run.cli(main)

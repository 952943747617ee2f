"""How fast the filters are, in samples per second, beside padasip.

    python lms/bench.py        # two minutes; wants `pip install padasip`

All run on the same samples in one process, in turns, on one thread; the table shows medians of the rounds, and their
ratio to padasip. Each returns every error and the weights before every sample, as padasip does. Leaves bench.json in
--out.
"""

import argparse
import functools
import os
import time

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read once, when NumPy is imported

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402
import run  # noqa: E402
from sweep import write_study  # noqa: E402

TAPS = [2, 32, 256]
SAMPLES = {2: 20_000, 32: 20_000, 256: 2_000}


def problem(taps, samples):
    """(X (samples, taps), d (samples,), r): a noisy filter, and a tenth of the step size that is still stable."""
    rng = np.random.default_rng(taps)
    X = rng.normal(size=(samples, taps))
    return X, X @ rng.normal(size=taps) + 0.1 * rng.normal(size=samples), 0.2 / taps


def measure(functions, repeats):
    """Median seconds of each of `functions`, {name: callable}, which take turns so that they meet the same machine."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):  # the first round warms up
        for name, function in tqdm(functions.items(), "round", leave=False, disable=None):
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def contestants(X, d, r):
    """{name: callable returning (weights, errors)}: padasip's filters and ours, on the same problem."""
    import padasip

    def theirs(kind, **options):
        _, errors, weights = kind(X.shape[1], w="zeros", **options).run(d, X)
        return weights, errors

    return {
        "padasip LMS": lambda: theirs(padasip.filters.FilterLMS, mu=r),
        "lms": lambda: model.lms(X, d, r),
        "lms_blocks": lambda: model.lms_blocks(X, d, r),
        **{f"blocks of {block}": functools.partial(model.lms_blocks, X, d, r, block=block) for block in (16, 32, 64)},
        "padasip NLMS": lambda: theirs(padasip.filters.FilterNLMS, mu=0.5),
        "nlms": lambda: model.nlms(X, d, 0.5),
        "padasip RLS": lambda: theirs(padasip.filters.FilterRLS, mu=1.0, eps=1e-2),
        "rls": lambda: model.rls(X, d, delta=1e-2),
    }


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=run.positive_int, default=15, metavar="N", help="rounds (default: %(default)s)")
    run.add_flags(p, out=dict(default=str(run.ROOT / "out" / "lms" / "bench"), help="where to"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        import padasip  # noqa: F401
    except ImportError:
        raise run.UserError("padasip is not installed; what is compared with it needs: pip install padasip") from None
    out, rows = run.make_folder(args.out), []
    print("   taps  filter           samples/s   times padasip")
    for taps in TAPS:
        X, d, r = problem(taps, SAMPLES[taps])
        seconds = measure(contestants(X, d, r), args.repeats)
        reference = None
        for name, value in seconds.items():
            if name.startswith("padasip"):
                reference = value
            final = {"samples_per_s": round(len(d) / value), "times_padasip": reference / value}
            rows.append(
                {
                    "study": "bench",
                    "setting": f"{name}, {taps} taps",
                    "seed": 0,
                    "state": "done",
                    "table": "block size" if name.startswith("blocks") else "filters",
                    "taps": taps,
                    "filter": name,
                    "repeats": args.repeats,
                    "final": final,
                }
            )
            print(f"{taps:7}  {name:14} {final['samples_per_s']:12,} {final['times_padasip']:15.2f}")
    write_study(out, "bench", rows)


if __name__ == "__main__":
    run.cli(main)

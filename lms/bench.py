"""How many samples per second do the filters process, compared with padasip?

    python lms/bench.py        # two minutes; needs `pip install padasip`

All filters run on the same samples in one process, on one thread, in turns. The table has the median over the rounds,
and the median ratio to padasip in the same round. Like padasip, each filter returns every error and the weights before
every sample. Writes bench.json into --out.
"""

import functools
import os
import statistics
from dataclasses import dataclass

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # NumPy reads these when it is imported

from common import run, timing  # noqa: E402
from common.options import option  # noqa: E402

import numpy as np  # noqa: E402

import model  # noqa: E402
from sweep import write_study  # noqa: E402

SAMPLES = {2: 20_000, 32: 20_000, 256: 2_000}  # for every number of taps


def problem(taps, samples):
    """(X (samples, taps), d (samples,), r): a noisy filter, and a tenth of the largest stable step size."""
    rng = np.random.default_rng(taps)
    X = rng.normal(size=(samples, taps))
    return X, X @ rng.normal(size=taps) + 0.1 * rng.normal(size=samples), 0.2 / taps


def contestants(X, d, r):
    """{name: function that returns (weights, errors)}: the filters of padasip, each followed by ours."""
    from padasip.filters import FilterLMS, FilterNLMS, FilterRLS

    def theirs(kind, **options):
        _, errors, weights = kind(X.shape[1], w="zeros", **options).run(d, X)
        return weights, errors

    return {
        "padasip LMS": lambda: theirs(FilterLMS, mu=r),
        "lms": lambda: model.lms(X, d, r),
        "lms_blocks": lambda: model.lms_blocks(X, d, r),
        **{f"blocks of {block}": functools.partial(model.lms_blocks, X, d, r, block=block) for block in (16, 32, 64)},
        "padasip NLMS": lambda: theirs(FilterNLMS, mu=0.5),
        "nlms": lambda: model.nlms(X, d, 0.5),
        "padasip RLS": lambda: theirs(FilterRLS, mu=1.0, eps=1e-2),
        "rls": lambda: model.rls(X, d, delta=1e-2),
    }


def measure(functions, rounds):
    """{name: seconds of each of `rounds` calls} of {name: function}, in turns."""
    return timing.turns({name: lambda i, f=f: timing.seconds_of(f) for name, f in functions.items()}, rounds)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    rounds: int = option(15, "rounds of every filter", above=0)
    out: str = option(str(run.ROOT / "out/lms/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    try:
        import padasip  # noqa: F401
    except ImportError:
        raise run.UserError("the comparison needs padasip: pip install padasip") from None
    out, rows = run.make_folder(args.out), []
    print("   taps  filter           samples/s   times padasip")
    for taps, samples in SAMPLES.items():
        seconds = measure(contestants(*problem(taps, samples)), args.rounds)
        for name, values in seconds.items():
            if name.startswith("padasip"):
                reference = values
            final = {
                "samples_per_s": round(samples / statistics.median(values)),
                "times_padasip": timing.median_ratio(reference, values),
            }
            table = "block size" if name.startswith("blocks") else "filters"
            rows.append(
                {
                    "study": "bench",
                    "setting": f"{name}, {taps} taps",
                    "seed": 0,
                    "state": "done",
                    "table": table,
                    "taps": taps,
                    "filter": name,
                    "rounds": args.rounds,
                    "final": final,
                }
            )
            print(f"{taps:7}  {name:14} {final['samples_per_s']:12,} {final['times_padasip']:15.2f}")
    write_study(__file__, out, "bench", rows)
    return rows


if __name__ == "__main__":
    run.cli(main)

"""Turn video files into features, one ID.npy of (frames, columns) for each video.

    python s2vt/extract_features.py clips/ --out features --extractor vgg16      # 80 frames x 4096 of each video
    python s2vt/extract_features.py clips/ --out features --extractor small --frames 16
    python s2vt/extract_features.py clips/ --out features --extractor vgg16 --shard 3/16     # one job of sixteen
    python s2vt/extract_features.py clips/ --out features --only s2vt/msvd_clips.txt         # the videos that it names

Videos with features are skipped. A file that is not a readable video is named and counted, and the others go on.
"""

import argparse
import io
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option, short

import numpy as np
from tqdm import tqdm

import extractors
from extractors import find_videos, read_video

AUTO_THREADS = None  # all cores: large convolutions


def shard_arg(text):
    """An argparse type: i/n with 1 <= i <= n."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not i/n with i from 1 to n")
    return text


def prepare(out: Path, extractor: str, frames: int):
    """The folder of features, which notes how they are made. Raises UserError if it holds other ones."""
    file = run.make_folder(out) / "extractor.json"
    made_by = {"extractor": extractor, "frames": frames}
    if file.exists():
        before = run.read_json(file)
        if before != made_by and any(out.glob("*.npy")):
            raise run.UserError(
                f"{out}: holds features of {before.get('extractor')} with {before.get('frames')} frames; "
                "name another --out"
            )
    elif any(out.glob("*.npy")):
        raise run.UserError(f"{out}: holds features of an unknown extractor (no extractor.json); name another --out")
    run.write_json(file, made_by)


def only_named(files: list[Path], only: Path) -> list[Path]:
    """Those of the videos `files` whose name is the last word of a line of the text file `only`. Raises UserError where
    one that it names is not among them."""
    try:
        if not only.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file" if only.exists() else "no such file")
        lines = only.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise run.UserError(f"--only {only}: cannot be read ({reason})") from error
    names = {line.split()[-1] for line in lines if line.strip()}
    found = [file for file in files if file.name in names]
    missing = sorted(names - {file.name for file in found})
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise run.UserError(f"--only {only}: {len(missing):,} of its {len(names):,} videos are missing ({some})")
    return found


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    videos: tuple[str, ...] = option(
        (), "videos, or folders of videos", type=run.path_arg, positional=True, nargs="+", metavar="VIDEO|DIR"
    )
    out: str = option("", "folder of the features", type=run.path_arg, metavar="DIR", required=True)
    extractor: str = option("vgg16", "the network that describes a frame", choices=extractors.NAMES)
    frames: int = option(80, "frames of each video", above=0, at_most=10_000)
    shard: str = option("1/1", "only every n-th video, from the i-th", type=shard_arg, metavar="i/n")
    only: str | None = option(None, "only the videos that FILE names", type=run.path_arg, metavar="FILE")
    device: str = run.device_option()
    threads: int | str = run.threads_option()


def extract(files: list[Path], args, out: Path, device) -> tuple[int, int, int]:
    """Write the features of the videos `files` into the folder `out`. Returns how many videos are done, were there, and
    could not be read."""
    done = 0
    there = 0
    broken = 0
    size = extractors.EXTRACTORS[args.extractor].size
    for file in tqdm(files, "videos", disable=None, leave=False):
        target = out / f"{file.name}.npy"
        if target.exists():
            there += 1
            continue
        try:
            frames = read_video(file, args.frames, size)
        except run.UserError as error:
            broken += 1
            tqdm.write(run.error_line(error), file=sys.stderr)
            continue
        content = io.BytesIO()
        np.save(content, extractors.extract(args.extractor, frames, device).numpy())
        run.write(target, content.getvalue())
        done += 1
    return done, there, broken


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    out = Path(args.out)
    files, other = find_videos(args.videos)
    files = only_named(files, Path(args.only)) if args.only else files
    for name, count in Counter(file.name for file in files).items():
        if count > 1:
            raise run.UserError(f"{name}: two videos have this name, and features are named by it")
    prepare(out, args.extractor, args.frames)
    i, n = map(int, args.shard.split("/"))
    own = files[i - 1 :: n]
    done, there, broken = extract(own, args, out, device)
    print(
        f"{done:,} videos extracted by {args.extractor}, {there:,} were there already, {broken:,} could not be read, "
        f"{other:,} other files; {run.display_path(out)}"
    )
    if broken and not done and not there:
        raise run.UserError(f"none of {len(own):,} videos could be read")


if __name__ == "__main__":
    run.cli(main)

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
from pathlib import Path

from common import run

import numpy as np
from tqdm import tqdm

import extractors
from extractors import find_videos, read_video

AUTO_THREADS = None  # all cores: large convolutions


def shard_arg(text):
    """An argparse type: i/n with 1 <= i <= n, as (i, n)."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not i/n with i from 1 to n")
    return int(match[1]), int(match[2])


def prepare(out: Path, extractor: str, frames: int):
    """The folder of features, which notes how they are made. Raises UserError if it holds other ones."""
    file, wanted = run.make_folder(out) / "extractor.json", {"extractor": extractor, "frames": frames}
    if file.exists():
        found = run.read_json(file)
        if found != wanted:
            raise run.UserError(f"{out}: holds features of {found.get('extractor')} with {found.get('frames')} frames; "
                                "name another --out")  # fmt: skip
    elif any(out.glob("*.npy")):
        raise run.UserError(f"{out}: holds features of an unknown extractor (no extractor.json); name another --out")
    else:
        run.write_json(file, wanted)


def only_named(files: list[Path], only: Path) -> list[Path]:
    """Those of the videos `files` whose name is the last word of a line of the text file `only`. Raises UserError where
    one that it names is not among them."""
    try:
        lines = only.read_text(encoding="utf-8").splitlines()
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


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("videos", nargs="+", type=run.path_arg, metavar="VIDEO|DIR", help="videos, or folders of videos")
    p.add_argument("--extractor", choices=extractors.NAMES, default="vgg16", help="(default: %(default)s)")
    p.add_argument("--frames", type=run.positive_int, default=80, metavar="N", help="frames (default: %(default)s)")
    p.add_argument(
        "--shard", type=shard_arg, default=(1, 1), metavar="i/n", help="only every n-th video, from the i-th"
    )
    p.add_argument("--only", type=run.path_arg, metavar="FILE", help="only the videos that FILE names")
    run.add_flags(p, "device", "threads", out=dict(required=True, help="folder of the features"))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device, size, out = run.pick_device(args.device), extractors.EXTRACTORS[args.extractor].size, Path(args.out)
    files, other = find_videos(args.videos)
    files = only_named(files, Path(args.only)) if args.only else files
    names = [file.name for file in files]
    for name in {name for name in names if names.count(name) > 1}:
        raise run.UserError(f"{name}: two videos have this name, and features are named by it")
    prepare(out, args.extractor, args.frames)
    mine = files[args.shard[0] - 1 :: args.shard[1]]
    done, there, broken = 0, 0, []
    for file in tqdm(mine, "videos", disable=None, leave=False):
        target = out / f"{file.name}.npy"
        if target.exists():
            there += 1
            continue
        try:
            frames = read_video(file, args.frames, size)
        except run.UserError as error:
            broken.append(file.name)
            tqdm.write(str(error), file=sys.stderr)
            continue
        content = io.BytesIO()
        np.save(content, extractors.extract(args.extractor, frames, device).numpy())
        run.write(target, content.getvalue())
        done += 1
    print(f"{done:,} videos extracted by {args.extractor}, {there:,} were there already, {len(broken):,} could not be "
          f"read, {other:,} other files; {run.display_path(out)}")  # fmt: skip
    if broken and not done and not there:
        raise run.UserError(f"none of {len(mine):,} videos could be read")


if __name__ == "__main__":
    run.cli(main)

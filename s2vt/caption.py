"""Describe video files in words.

    python s2vt/videos.py --out clips && python s2vt/caption.py clips/clip0.mp4
    python s2vt/caption.py my.mp4 --run out/s2vt/msvd-gru-s0-1 --beam 5

The network is --run, else the newest finished run, else the committed one, which knows the built-in videos alone. The
frames go through the extractor that the network was trained with.
"""

import argparse
import sys

from common import run

import torch

import checkpoint
import extractors
from decode import caption_all
from extractors import find_videos, read_video

AUTO_THREADS = 1


def extractor_for(trained: checkpoint.Trained, given: str | None) -> str:
    """The name of the extractor that a network needs; `given` names it if that is unknown. Raises UserError."""
    known = trained.config["extractor"]
    if known is None and given is None:
        raise run.UserError(
            f"{trained.name}: was trained on features of an unknown extractor; name it with --extractor"
        )
    if known and given and known != given:
        raise run.UserError(f"--extractor {given}: {trained.name} was trained on features of {known}")
    columns = extractors.EXTRACTORS[known or given].columns
    if columns != trained.config["features"]:
        raise run.UserError(f"--extractor {known or given}: has {columns:,} columns, and {trained.name} takes "
                            f"{trained.config['features']:,}")  # fmt: skip
    return known or given


def features_of(file, trained, extractor, device):
    """(frames uint8 (T, size, size, 3), features (1, T, F)) of a video file. Raises UserError."""
    frames = read_video(file, trained.config["frames"], extractors.EXTRACTORS[extractor].size)
    return frames, extractors.extract(extractor, frames, device)[None]


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("videos", nargs="+", type=run.path_arg, metavar="VIDEO|DIR", help="videos, or folders of videos")
    p.add_argument("--run", type=run.path_arg, metavar="RUN", help=checkpoint.HELP)
    p.add_argument("--beam", type=run.positive_int, default=5, metavar="N", help="beam width (default: %(default)s)")
    p.add_argument("--extractor", choices=extractors.NAMES, help="only if the network does not know its own")
    run.add_flags(p, "device", "threads")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    trained = checkpoint.open_model(args.run, device)
    extractor = extractor_for(trained, args.extractor)
    if args.run is None:
        print(f"no run named: using {trained.name}, trained on {trained.config['dataset']}", file=sys.stderr)
    files, _ = find_videos(args.videos)
    broken = 0
    for file in files:
        try:
            _, features = features_of(file, trained, extractor, device)
        except run.UserError as error:
            if len(files) == 1:
                raise
            broken += 1
            print(error, file=sys.stderr)
            continue
        caption = caption_all(trained.model, torch.as_tensor(features), args.beam, trained.config["max_words"])[0]
        print(f"{run.display_path(file)}: {trained.vocabulary.decode(caption.words)}")
    if broken == len(files):
        raise run.UserError(f"none of {len(files):,} videos could be read")
    if broken:
        print(f"{len(files) - broken:,} videos described, {broken:,} could not be read", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)

"""Describe video files in words.

    python s2vt/videos.py --out clips && python s2vt/caption.py clips/clip0.mp4
    python s2vt/caption.py my.mp4 --run out/s2vt/msvd-gru-s0-1 --beam 5

The network is --run, else the newest finished run whose extractor is known, else the committed one, which knows the
built-in videos alone. The frames go through the extractor that the network was trained with.
"""

import sys
from dataclasses import dataclass

from common import run
from common.arguments import ScriptOptions, device_option, parse_options, path_arg, threads_option
from common.options import option

import checkpoint
import extractors
from decode import MAX_WIDTH
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
    name = known or given
    columns = extractors.EXTRACTORS[name].columns
    if columns != trained.config["features"]:
        raise run.UserError(
            f"--extractor {name}: has {columns:,} columns, and {trained.name} takes {trained.config['features']:,}"
        )
    return name


def features_of(file, trained, extractor, device):
    """(frames uint8 (T, size, size, 3), features (1, T, F)) of a video file. Raises UserError."""
    frames = read_video(file, trained.config["frames"], extractors.EXTRACTORS[extractor].size)
    return frames, extractors.extract(extractor, frames, device)[None]


@dataclass(kw_only=True)
class Options(ScriptOptions):
    videos: tuple[str, ...] = option(
        (), "videos, or folders of videos", type=path_arg, positional=True, nargs="+", metavar="VIDEO|DIR"
    )
    run: str | None = option(None, checkpoint.HELP, type=path_arg, metavar="RUN")
    beam: int = option(5, "beam width; 1 is greedy search", above=0, at_most=MAX_WIDTH)
    extractor: str | None = option(None, "only if the network does not know its own", choices=extractors.NAMES)
    device: str = device_option()
    threads: int | str = threads_option()


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    trained = checkpoint.load(args.run, device, lambda dataset: args.extractor or dataset.get("extractor"))
    extractor = extractor_for(trained, args.extractor)
    files, _ = find_videos(args.videos)
    if trained.config["dataset"] == "builtin":
        print("this network knows rendered shapes alone: what it says of any other video is wrong", file=sys.stderr)
    extractors.network(extractor)  # what is missing for it is no fault of a video
    broken = 0
    for file in files:
        try:
            _, features = features_of(file, trained, extractor, device)
        except run.UserError as error:
            if len(files) == 1:
                raise
            broken += 1
            print(run.error_line(error), file=sys.stderr)
            continue
        (caption,) = trained.captions(features, args.beam)
        print(run.printable(f"{run.display_path(file)}: {caption}"))
    if broken == len(files):
        raise run.UserError(f"none of {len(files):,} videos could be read")
    if broken:
        print(f"{len(files) - broken:,} videos described, {broken:,} could not be read", file=sys.stderr)


if __name__ == "__main__":
    run.cli(main)

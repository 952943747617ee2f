"""Video files: read as evenly spaced frames, and written, by PyAV."""

import io
from pathlib import Path

from common import run

import numpy as np

ENDINGS = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".gif", ".flv", ".wmv"}


def import_av():
    """The module av. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise run.UserError("video files need PyAV: pip install -r requirements.txt") from None
    av.logging.set_level(None)  # what is wrong with a file is said in one line, by us
    return av


def read_video(file: Path, count: int, size: int) -> np.ndarray:
    """uint8 (count, size, size, 3): `count` evenly spaced frames of a video, each scaled to a square.

    A video of fewer frames shows some of them several times. Damaged frames at the end are left out. Raises UserError
    for a file without a frame that can be decoded.
    """
    av = import_av()
    if not file.is_file():
        raise run.UserError(f"{file}: is {'not a regular file' if file.exists() else 'missing'}")
    frames, stride, error = [], 1, None
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise run.UserError(f"{file}: holds no video, only sound or text")
            for i, frame in enumerate(container.decode(video=0)):
                if i % stride:
                    continue
                frames.append(frame.reformat(size, size, "rgb24", interpolation="AREA").to_ndarray())
                if len(frames) == 8 * count:  # a long video: from now on every second one of these
                    frames, stride = frames[::2], 2 * stride
    except (av.error.FFmpegError, OSError, ValueError, MemoryError, IndexError, OverflowError) as caught:
        error = " ".join(str(getattr(caught, "strerror", None) or caught).split())[:80]
    if not frames:
        raise run.UserError(f"{file}: is no readable video ({error or 'it has no frames'})")
    places = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.stack([frames[i] for i in places])


def write_video(file: Path, frames: np.ndarray, rate: int = 12):
    """Write uint8 (T, H, W, 3), H and W even, as an MPEG-4 video of `rate` frames per second. Raises UserError."""
    av, content = import_av(), io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames.shape[1:3], "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    run.write(file, content.getvalue())


def find_videos(paths: list[str]) -> tuple[list[Path], int]:
    """(the videos among the files and folders `paths`, sorted, without duplicates; how many files were skipped because
    their name has no ending of a video). A file named itself is taken whatever its ending. Raises UserError."""
    found, skipped = set(), 0
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
            videos = [file for file in inside if file.suffix.lower() in ENDINGS]
            found |= set(videos)
            skipped += len(inside) - len(videos)
        elif path.exists():
            found.add(path)
        else:
            raise run.UserError(f"{path}: is missing")
    return sorted(found), skipped

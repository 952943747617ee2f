"""Generate images and measure them against real ones. Every number goes with its protocol."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from common import run

import torch
import torch.nn.functional as F
from torch import Tensor

import scores
from data import Images, to_uint8
from features import Features
from grids import noise_of, wanted_labels
from model import GAN


@torch.no_grad()
def generate(gan: GAN, count: int, seed: int, device, weights: str = "ema") -> tuple[Tensor, Tensor]:
    """(uint8 (count, C, 32, 32), int64 (count,)): images from noise that is a function of `seed`, and their labels,
    equally many per class. weights: "ema" (averaged) or "generator" (last)."""
    net = getattr(gan, weights)
    was_training = net.training
    net.eval()
    labels = wanted_labels(count, net.classes)
    noise = noise_of(count, net.noise, seed)
    images = torch.cat([to_uint8(net(z.to(device), y.to(device))) for z, y in zip(noise.split(250), labels.split(250))])
    net.train(was_training)
    return images, labels


class Judge:
    """Real images, as `features` has them, against which generated ones are measured.

    part: "held out" or "test", for the protocol; folder: keeps the features of real images between runs, or None;
    probe: says of what class a generated image is, where the features have no classifier of their own.
    """

    def __init__(self, features: Features, real: Images, part: str, folder: Path | None, digest: str):
        self.features, self.part = features, part
        self.name = f"{digest[:12]}-{part.replace(' ', '-')}"
        self.images = real.images
        self.folder = folder
        self.labels = real.labels.cpu()
        self.classes = len(real.classes)
        self.probe: Probe | None = None

    @cached_property
    def real(self) -> Tensor:
        """The features (N, D) of the real images, which may take minutes."""
        return self.features.of_part(self.images, self.name, self.folder)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        return scores.moments(self.real)

    @cached_property
    def region(self) -> scores.RealRegion:
        return scores.RealRegion(self.real)

    def protocol(self, generated: int) -> dict:
        """The protocol of a number: features, counts of generated and real images, source of the real ones."""
        return self.features.facts() | {
            "generated": generated,
            "real": len(self.real),
            "reference": f"{self.part} images",
            "too_few": min(generated, len(self.real)) <= self.real.shape[1],  # for the dimensions of the features
        }

    def distance(self, fake: Tensor) -> tuple[float, float]:
        """(FID, diversity): the Frechet distance of features (N, D) of generated images, and their total variance as
        a share of the diversity of real ones. A generator that always draws the same image has a diversity of zero."""
        moments = scores.moments(fake)
        return scores.frechet(*self.moments, *moments), (moments[1].trace() / self.moments[1].trace()).item()

    def measure(self, images: Tensor, labels: Tensor | None = None, subsets: int = 50) -> dict:
        """All measures of generated images (N, C, 32, 32). labels: the requested classes, or None; subsets: of KID."""
        fake = self.features(images)
        values = dict(zip(("fid", "diversity"), self.distance(fake)))
        values["kid"] = scores.kid(self.real, fake, subsets)
        values["precision"], values["recall"] = self.region.precision_recall(fake)
        classifier = self.features.classifier or self.probe
        if classifier and self.classes > 1:
            sure, named = classifier.probabilities(fake).max(1)
            values["confident"] = share_of_sure(sure)
            values["rarest_class"] = named.bincount(minlength=self.classes).min().item() / len(named)
        if labels is not None and self.probe:
            values["asked_class"] = (self.probe.probabilities(fake).argmax(1) == labels).float().mean().item()
        return values

    def measure_probe(self) -> dict:
        """The shares of real images that the probe puts into their class, and of which it is sure."""
        if not self.probe:
            return {}
        sure, named = self.probe.probabilities(self.real).max(1)
        accuracy = (named == self.labels).float().mean().item()
        return {"probe_accuracy": accuracy, "probe_confident": share_of_sure(sure)}


def share_of_sure(probabilities: Tensor) -> float:
    """The share of images whose likeliest class has a probability above 0.9."""
    return (probabilities > 0.9).float().mean().item()


class Probe:
    """Logistic regression from features (N, D) to labels (N,) of real images: it says of what class a generated image
    is, by the same features as the FID."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.mean = features.mean(0)
        self.std = features.std(0) + 1e-6
        x = self.scaled(features)
        weights = torch.zeros(x.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss_of():
            optimizer.zero_grad()
            logits = x @ weights[:-1] + weights[-1]
            loss = F.cross_entropy(logits, labels) + 1e-3 * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(loss_of)
        self.weights = weights.detach()

    def scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def probabilities(self, features: Tensor) -> Tensor:
        """(N, classes)"""
        return (self.scaled(features) @ self.weights[:-1] + self.weights[-1]).softmax(1)


def probe_of(held_out: Judge, model: str) -> Probe | None:
    """A probe that is trained on the held-out images, which no GAN has seen, where one is read: for features without a
    classifier, and for the classes that an ACGAN is asked for."""
    if held_out.classes < 2 or (held_out.features.classifier and model != "acgan"):
        return None
    return Probe(held_out.real, held_out.labels)


def check_counts(name: str, held_out: Images, test_set: Images):
    """Raise UserError if a part of the dataset `name` is too small for a distance: one image has no covariance."""
    for part, images in (("held-out", held_out), ("test", test_set)):
        if len(images) < 2:
            raise run.UserError(f"{name}: has {len(images)} {part} image; FID needs two, and thousands are better")


def cache_folder(features: str, data_dir: str | None, facts: dict) -> Path | None:
    """Where the features of real images are kept: in the folder of datasets, for networks with fixed weights."""
    folder = run.data_dir(data_dir)
    if features == "classifier" or facts["builtin"] or not folder.is_dir():
        return None
    return folder / "gan-features"


def problems_of(name: str, row: dict, early: float) -> Iterator[str]:
    """The problems of the model `name` in the epochs before the evaluation `row` of the metrics, one line for each.

    early: the epoch until which it is usual that all images look alike.
    """
    if row["diversity"] < 0.1 and row["epoch"] > early:
        yield f"epoch {row['epoch']:.0f}: collapsed, the generated images hardly differ from one another"
    if name in ("dcgan", "acgan") and row["train_g_loss"] > 20:
        yield f"epoch {row['epoch']:.0f}: saturated, the discriminator is always right and the generator cannot learn"


def describe(protocol: dict) -> str:
    """The protocol in a few words."""
    size = f" at {protocol['size']} x {protocol['size']}" if protocol["size"] != 32 else ""
    few = " (too few for the dimensions of the features)" if protocol["too_few"] else ""
    real = f"{protocol['real']:,} {protocol['reference']}"
    return f"{protocol['generated']:,} samples against {real}, features {protocol['name']}{size}{few}"


def final_measures(args, r, gan: GAN, features: Features, judge: Judge, test_set: Images, facts) -> dict:
    """The final entries of the record: measures of the last and of the best weights, on new noise against the test
    images. judge: of the held-out images, with the probe."""
    tester = Judge(features, test_set, "test", cache_folder(args.features, args.data_dir, facts), facts["digest"])
    tester.probe = judge.probe

    def measure():
        images, labels = generate(gan, args.samples, seed=2, device=r.device)
        return tester.measure(images, labels if args.model == "acgan" else None) | tester.measure_probe()

    last = measure()
    state = r.load_best(model=gan)
    best = last if state["epoch"] == args.epochs else measure()
    final = {"protocol": tester.protocol(args.samples), "best_epoch": state["epoch"], "val_fid": state["fid"]}
    final |= {f"last_{name}": value for name, value in last.items()}
    final |= {f"best_{name}": value for name, value in best.items()}
    return final

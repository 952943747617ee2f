"""Train DCGAN, WGAN, WGAN-GP or ACGAN on CIFAR-10, MNIST or images of your own.

    python gan/train.py --data mnist --model acgan         # digits; a classifier is sure of 93% of them; minutes
    python gan/train.py --model wgan-gp --width 16 --epochs 10      # CIFAR-10, a small network
    python gan/train.py --model acgan --recipe paper       # the network of ACGAN's paper
    python gan/train.py --data builtin                     # shapes, without any download
    python gan/train.py --data FOLDER --model dcgan        # your own images, scaled to 32 x 32

An epoch is one pass of the discriminator over the training images. The distance to held-out images chooses best.pt;
what is reported uses new noise and the test images. The recipe sets every hyper-parameter; flags override it.
"""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import run
from common.options import option

import torch
from tqdm import tqdm

import data
import features
import fid
import grids
import model
import optim
from data import DATA_HELP, dataset_arg
from features import features_option
from model import MODELS, NETWORKS

RECIPE_NAMES = ["plain", "paper", "digits", "shapes", "tiny"]
RECIPE_OF_DATA = {"mnist": "digits", "builtin": "shapes"}  # if no flag names one; else plain
RECIPE_HELP = (
    "a named set of hyper-parameters; flags override it; unnamed: digits for --data mnist, shapes for --data builtin"
)
WITH_ADAM = ("dcgan", "wgan-gp", "acgan")


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    recipe: str = option("plain", RECIPE_HELP, choices=RECIPE_NAMES)
    model: str = option("dcgan", "the model, whose losses are trained", choices=list(MODELS))
    network: str = option("plain", "plain: one for all models; paper: the model's own", choices=list(NETWORKS))
    width: int = option(64, "channels of the first layer; scales all others", above=0, at_most=4096)
    noise: int = option(128, "numbers that an image is generated from", at_least=2, at_most=100_000)
    epochs: int = option(50, "passes of the discriminator over the training set", above=0)
    bs: int = option(64, "batch size", above=0)
    lr: float = option(2e-4, "learning rate of the generator", above=0)
    lr_ratio: float = option(1.0, "learning rate of the discriminator / of the generator (Heusel et al. 2017)", above=0)
    decay: str = option("none", "schedule of the learning rate; linear: it falls to zero", choices=["none", "linear"])
    betas: tuple[float, float] = option((0.5, 0.999), "betas of Adam", at_least=0, below=1, only=WITH_ADAM)
    critic_steps: int = option(1, "steps of the discriminator for each step of the generator", above=0)
    clip: float = option(0.01, "the critic's weights are clipped to [-X, X]", above=0, only="wgan")
    penalty: float = option(10.0, "weight of the gradient penalty", above=0, only="wgan-gp")
    class_weight: float = option(1.0, "weight of the cross-entropy of the classes", at_least=0, only="acgan")
    spectral_norm: bool = option(False, "spectral normalization in the discriminator (Miyato et al. 2018)")
    ema: float = option(0.999, "decay of the average of the generator's weights", at_least=0, below=1)
    eval_every: int = option(5, "epochs between evaluations", above=0)
    eval_samples: int = option(2000, "images generated at each evaluation", at_least=10, at_most=1_000_000)
    samples: int = option(10_000, "images generated at the end", at_least=10, at_most=1_000_000)
    features: str = features_option("classifier")
    feature_size: int = option(96, "side of the images in pixels, for efficientnet-lite0", at_least=32, at_most=1024)
    classifier_images: int = option(40_000, "images on which the classifier is trained", above=0, at_most=100_000_000)

    variant: ClassVar[str] = "model"

    def check(self):
        if self.spectral_norm and self.model == "wgan":
            raise run.UserError("--spectral-norm: wgan clips its weights instead")


def change_all(recipes: dict[str, Options], **changes) -> dict[str, Options]:
    return {name: replace(options, **changes) for name, options in recipes.items()}


PLAIN = {
    "dcgan": Options(model="dcgan"),
    "wgan": Options(model="wgan", lr=5e-5, critic_steps=5),
    "wgan-gp": Options(model="wgan-gp", betas=(0.0, 0.9), critic_steps=5),
    "acgan": Options(model="acgan"),
}
PAPER = change_all(PLAIN, network="paper")
PAPER["wgan-gp"] = replace(PAPER["wgan-gp"], decay="linear")
SMALL = change_all(PLAIN, bs=32, width=16, lr=1e-3, eval_samples=1000, samples=2000, classifier_images=20_000)
DIGITS = change_all(SMALL, epochs=3, eval_every=1)  # for MNIST
DIGITS["wgan"] = replace(DIGITS["wgan"], lr=5e-4, critic_steps=2)
DIGITS["wgan-gp"] = replace(DIGITS["wgan-gp"], critic_steps=2)
SHAPES = change_all(SMALL, epochs=40)  # for the built-in images
SHAPES["dcgan"] = replace(SHAPES["dcgan"], network="paper", lr=2e-3, betas=(0.0, 0.99))
SHAPES["wgan"] = replace(SHAPES["wgan"], lr=5e-4, critic_steps=2)
SHAPES["wgan-gp"] = replace(SHAPES["wgan-gp"], lr=2e-3, critic_steps=1)
SHAPES["acgan"] = replace(SHAPES["acgan"], spectral_norm=True)
TINY = change_all(PLAIN, epochs=2, bs=20, width=2, noise=8, lr=2e-4)  # a second, for tests
TINY = change_all(TINY, eval_every=1, eval_samples=40, samples=60, classifier_images=200)
RECIPES = {"plain": PLAIN, "paper": PAPER, "digits": DIGITS, "shapes": SHAPES, "tiny": TINY}
AUTO_PRECISION = "bf16"  # bench.py: faster than fp32 if the hardware multiplies it
AUTO_THREADS = 1  # tools/seconds.py: a second one gains nothing, and beside other work it loses much
SAVE_SECONDS = 200  # between checkpoints within an epoch
COLUMNS = ("train_d_loss", "train_estimate", "d_gradient", "train_g_loss", "g_gradient")


@dataclass
class Progress:
    """What a checkpoint holds beside the networks and optimizers."""

    # (steps of an epoch, COLUMNS): what each step has measured; zero if the generator had no step
    totals: torch.Tensor
    epoch: int = 0  # that is under way
    step: int = 0  # in this epoch
    best: float = float("inf")  # lowest FID to the held-out images
    seconds: float = 0.0  # of training, without the evaluations

    def add(self, *measured: torch.Tensor):
        """Keep what a step has measured, in the order of COLUMNS."""
        self.totals[self.step, : len(measured)] = torch.stack(measured).detach()
        self.step += 1

    def means(self, generator_steps: int) -> dict[str, float]:
        """{column: mean over the steps of the epoch}; the two columns of the generator count its own steps."""
        of_generator = ("train_g_loss", "g_gradient")
        counts = [max(1, generator_steps) if name in of_generator else len(self.totals) for name in COLUMNS]
        return dict(zip(COLUMNS, (self.totals.sum(0).cpu() / torch.tensor(counts)).tolist()))


def begin(args, r, gan, optimizers, steps: int) -> Progress:
    """The progress of the run that is resumed, or of a new one, whose first samples it draws."""
    state = r.load(model=gan, optimizers=optimizers)
    if state is None:
        draw_samples(r, gan, 0)
        return Progress(torch.zeros(steps, len(COLUMNS), device=r.device))
    progress = Progress(**{name: state[name] for name in ("totals", "epoch", "step", "best", "seconds")})
    progress.totals = progress.totals.to(r.device)
    return progress


def train(args, r, gan, train_set, judge):
    """Train. Writes metrics.csv, samples/, last.pt and best.pt, the lowest distance to the held-out images."""
    optimizers = optim.build_optimizers(args, gan)
    d_optimizer, g_optimizer = optimizers
    bs = min(args.bs, len(train_set))
    steps = len(train_set) // bs
    progress = begin(args, r, gan, optimizers, steps)

    for epoch in range(progress.epoch, args.epochs):
        gan.train()
        began = time.monotonic() - progress.seconds
        batches = train_set.batches(bs, (args.seed, epoch), progress.step)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=progress.step, leave=False, disable=None)
        for images, labels in bar:
            done = epoch * steps + progress.step
            generator_turn = (done + 1) % args.critic_steps == 0
            if args.decay == "linear":
                optim.set_lr(optimizers, 1 - done / (args.epochs * steps))
            noise = torch.randn(bs, args.noise, device=r.device)
            fake_labels = torch.randint(len(train_set.classes), (bs,), device=r.device)
            with torch.set_grad_enabled(generator_turn), r.autocast():
                fake = gan.generator(noise, fake_labels)

            # (1) update D: minimize d_loss over real and generated images
            with r.autocast():
                d_loss, estimate = model.d_loss(args, gan.discriminator, images, labels, fake.detach(), fake_labels)
            d_gradient = optim.step_of(d_optimizer, d_loss)
            if args.model == "wgan":
                model.clip_weights(gan.discriminator, args.clip)
            measured = [d_loss, estimate, d_gradient]

            # (2) update G: minimize g_loss over the same generated images
            if generator_turn:
                gan.discriminator.requires_grad_(False)  # its weights need no gradients here
                with r.autocast():
                    g_loss = model.g_loss(args, gan.discriminator, fake, fake_labels)
                g_gradient = optim.step_of(g_optimizer, g_loss)
                gan.discriminator.requires_grad_(True)
                gan.update_ema(args.ema, (done + 1) // args.critic_steps)
                measured += [g_loss, g_gradient]

            progress.add(*measured)
            if progress.step % 50 == 0:
                r.check_finite(progress.totals[: progress.step], epoch * steps)
                recent = progress.totals[progress.step - 50 : progress.step, 0]
                bar.set_postfix(d_loss=f"{recent.mean().item():.3f}")
            stopping = r.should_stop()
            if stopping or r.save_due(SAVE_SECONDS):
                progress.seconds = time.monotonic() - began
                r.save(model=gan, optimizers=optimizers, **vars(progress))
            if stopping:
                r.stop()

        r.check_finite(progress.totals, epoch * steps)
        progress.seconds = time.monotonic() - began
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            evaluate(args, r, gan, judge, progress, epoch + 1)
        progress.totals.zero_()
        progress.epoch, progress.step = epoch + 1, 0
        r.save(model=gan, optimizers=optimizers, **vars(progress))


def evaluate(args, r, gan, judge, progress: Progress, epoch: int):
    """Draw samples, measure them against the held-out images, log a row, and keep the best weights."""
    draw_samples(r, gan, epoch)
    images, labels = fid.generate(gan, args.eval_samples, seed=1, device=r.device)
    measures = judge.measure(images, labels if args.model == "acgan" else None, subsets=10)
    distance = measures["fid"]
    diversity = measures.pop("diversity")
    steps = len(progress.totals)
    generator_steps = epoch * steps // args.critic_steps
    means = progress.means(generator_steps - (epoch - 1) * steps // args.critic_steps)
    row = {"epoch": epoch, "generator_steps": generator_steps, **means}
    row |= {f"val_{name}": value for name, value in measures.items()}
    row |= {"diversity": diversity, "training_seconds": round(progress.seconds, 2)}
    r.log(row)
    losses = f"loss {means['train_d_loss']:.3f} D {means['train_g_loss']:.3f} G"
    scores = f"estimate {means['train_estimate']:.3f}   FID {distance:.2f}   diversity {diversity:.0%}"
    r.print(f"epoch {epoch:>3}/{args.epochs}   {losses}   {scores}   {progress.seconds:.0f} s")
    for problem in fid.problems_of(args.model, row, args.epochs / 4):
        r.print(f"*** {problem}")
    if distance < progress.best:
        progress.best = distance
        r.save_best(model=gan, epoch=epoch, fid=distance)


def samples_file(r, epoch: float):
    return r.folder / "samples" / f"epoch-{int(epoch):05d}.png"


def draw_samples(r, gan, epoch: int):
    """samples.png, and a copy in samples/ for the animation: the same noise at every evaluation."""
    images, _ = fid.generate(gan, grids.GRID, seed=0, device=r.device)
    pixels = grids.tile(images)
    run.make_folder(r.folder / "samples")
    grids.write_png(samples_file(r, epoch), pixels)
    grids.write_png(r.folder / "samples.png", pixels, scale=2)


def build_model(args: Options, facts: dict) -> model.GAN:
    """The networks for a dataset with facts["channels"] and facts["classes"]."""
    return model.build(
        args.model, args.network, facts["channels"], facts["classes"], args.width, args.noise, args.spectral_norm
    )


def recipe(given: dict) -> Options:
    """The recipe of the model that the flags `given` name. The data choose it if no flag does."""
    name = given.get("recipe") or RECIPE_OF_DATA.get(given.get("data"), "plain")
    return replace(RECIPES[name][given.get("model", "dcgan")], recipe=name)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    *parts, facts = data.load(args.data, args.data_dir, args.limit)
    args.data = facts["name"] if args.data == "auto" else args.data
    fid.check_counts(facts["name"], *parts[1:])
    steps = args.epochs * (len(parts[0]) // min(args.bs, len(parts[0])))
    if steps < args.critic_steps:
        raise run.UserError(f"--critic-steps {args.critic_steps}: the generator would have no step in {steps} steps")
    if args.model == "acgan" and facts["classes"] < 2:
        raise run.UserError(f"{args.data}: ACGAN needs classes, a folder of images each; choose another --model")
    name = f"{facts['name']}-{args.model}"
    with run.Run(args, __file__, name, AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True) as r:
        train_set, held_out, test_set = (part.to(r.device) for part in parts)
        plain = replace(args, spectral_norm=False)  # which has no weights of its own, and computes
        run.check_memory(lambda: build_model(plain, facts), r.device, "--width, --noise")
        sizes = args.feature_size, args.classifier_images
        seen_by = features.load(args.features, train_set, held_out, facts["digest"], r.folder, *sizes, args.data_dir)
        gan = build_model(args, facts).to(r.device, memory_format=torch.channels_last)
        counts = [run.count_parameters(net) for net in (gan.generator, gan.discriminator)]
        cache = fid.cache_folder(args.features, args.data_dir, facts)
        judge = fid.Judge(seen_by, held_out, "held out", cache, facts["digest"])
        judge.probe = fid.probe_of(judge, args.model)
        protocol = judge.protocol(args.eval_samples)
        what = f"{args.model}, {args.network} network, {counts[0]:,} + {counts[1]:,} parameters"
        r.note(
            f"{what}, on {facts['name']}: {len(train_set):,} training images; FID by {fid.describe(protocol)}",
            dataset=facts,
            parameters=sum(counts),
            generator_parameters=counts[0],
            val_protocol=protocol,
        )
        train(args, r, gan, train_set, judge)

        epochs = [0, *(row["epoch"] for row in r.rows)]
        files = [samples_file(r, epoch) for epoch in epochs]
        grids.write_gif(r.folder / "training.gif", [file for file in files if file.exists()])
        final = fid.final_measures(args, r, gan, seen_by, judge, test_set, facts)
        final["problems"] = []
        for row in r.rows:
            final["problems"] += fid.problems_of(args.model, row, args.epochs / 4)
        last = f"FID {final['last_fid']:.2f} with the last weights"
        best = f"{final['best_fid']:.2f} with the weights of epoch {final['best_epoch']}"
        r.finish(f"{last}, {best}, of {fid.describe(final['protocol'])}", **final)
    return r.record


if __name__ == "__main__":
    run.cli(main)

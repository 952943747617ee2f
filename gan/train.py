"""Train DCGAN, WGAN, WGAN-GP or ACGAN on CIFAR-10, MNIST or images of your own.

    python gan/train.py --data mnist                       # digits, 47% of them clear to a classifier, in minutes
    python gan/train.py --model wgan-gp --width 16 --epochs 10      # CIFAR-10, a small network
    python gan/train.py --model acgan --recipe paper       # the network of ACGAN's paper
    python gan/train.py --data builtin                     # shapes, without any download
    python gan/train.py --data FOLDER --model dcgan        # your own images, scaled to 32 x 32

An epoch is one pass of the discriminator over the training images. The distance to held-out images chooses best.pt;
what is reported uses new noise and the test images. The recipe sets every hyper-parameter; flags override it.
"""

import argparse
import time

from common import run

import torch
from tqdm import tqdm

import data
import features
import fid
import grids
import model
import optim

PLAIN = dict(
    epochs=50,
    bs=64,
    width=64,
    network="plain",  # the same for all four; "paper": the network of the model's own paper
    noise=128,  # numbers that an image is generated from
    lr_ratio=1.0,  # learning rate of the discriminator / of the generator (Heusel et al. 2017)
    decay="none",  # "linear": the learning rate falls to zero
    ema=0.999,  # decay of the average of the generator's weights
    spectral_norm=False,  # in the discriminator (Miyato et al. 2018)
    eval_every=5,  # epochs
    eval_samples=2000,  # generated at each evaluation, and 10,000 at the end
    samples=10000,
    feature_size=96,  # side of the images in pixels, for efficientnet-lite0
    classifier_images=40_000,  # on which features=classifier is trained
)
ADAM = dict(lr=2e-4, betas=[0.5, 0.999], critic_steps=1)
MODELS = {  # critic_steps: of the discriminator, for each step of the generator
    "dcgan": ADAM,
    "wgan": dict(lr=5e-5, clip=0.01, critic_steps=5),
    "wgan-gp": dict(lr=2e-4, betas=[0.0, 0.9], penalty=10.0, critic_steps=5),
    "acgan": ADAM | dict(class_weight=1.0),
}
SMALL = dict(bs=32, width=16, lr=1e-3, eval_samples=1000, samples=2000, classifier_images=20_000)
TINY = SMALL | dict(epochs=2, bs=20, lr=2e-4, width=2, noise=8, eval_every=1, eval_samples=40, samples=60)
CHANGES = {
    "plain": {},
    "paper": dict(network="paper"),
    "digits": SMALL | dict(epochs=3, eval_every=1),  # for MNIST
    "shapes": SMALL | dict(epochs=40, eval_every=5),  # for the built-in images
    "tiny": TINY | dict(classifier_images=200),  # a second, for tests
}
RECIPES = {name: {m: PLAIN | MODELS[m] | change for m in model.MODELS} for name, change in CHANGES.items()}
for name in ("digits", "shapes"):
    RECIPES[name]["wgan"] |= dict(lr=5e-4, critic_steps=2)
RECIPES["digits"]["wgan-gp"] |= dict(critic_steps=2)
RECIPES["shapes"]["dcgan"] |= dict(network="paper", lr=2e-3, betas=[0.0, 0.99])
RECIPES["shapes"]["wgan-gp"] |= dict(critic_steps=1, lr=2e-3)
RECIPES["shapes"]["acgan"] |= dict(spectral_norm=True)
RECIPES["paper"]["wgan-gp"] |= dict(decay="linear")
AUTO_PRECISION = "bf16"  # bench.py: faster than fp32 if the hardware multiplies it
AUTO_THREADS = 1  # tools/seconds.py: a second one gains nothing, and beside other work it loses much
SAVE_EVERY = 200  # seconds between checkpoints within an epoch
COLUMNS = ("train_d_loss", "train_estimate", "d_gradient", "train_g_loss", "g_gradient")


def train(args, r, gan, train_set, judge, facts):
    """Train. Writes metrics.csv, samples/, last.pt and best.pt, the lowest distance to the held-out images."""
    optimizers = d_optimizer, g_optimizer = optim.build_optimizers(args, gan)
    bs = min(args.bs, len(train_set))
    steps, classes = len(train_set) // bs, facts["classes"]
    first_epoch, step, best, seconds, totals = 0, 0, float("inf"), 0.0, torch.zeros(steps, len(COLUMNS))
    if state := r.load(model=gan, optimizers=optimizers):
        first_epoch, step, best, seconds, totals = (state[k] for k in ("epoch", "step", "best", "seconds", "totals"))
    else:
        draw_samples(args, r, gan, 0)
    totals, saved = totals.to(r.device), time.monotonic()

    for epoch in range(first_epoch, args.epochs):
        gan.train()
        began = time.monotonic()
        batches = train_set.batches(bs, (args.seed, epoch), step)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=step, leave=False, disable=None)
        for images, labels in bar:
            done = epoch * steps + step
            generator_turn = (done + 1) % args.critic_steps == 0
            if args.decay == "linear":
                optim.set_lr(optimizers, 1 - done / (args.epochs * steps))
            noise = torch.randn(bs, args.noise, device=r.device)
            wanted = torch.randint(classes, (bs,), device=r.device)
            with torch.set_grad_enabled(generator_turn), r.autocast():
                fake = gan.generator(noise, wanted)

            with r.autocast():  # the discriminator's step
                scored = model.score_both(gan.discriminator, images, fake.detach())
                real_score, real_classes, fake_score, fake_classes = scored
                d_loss = model.D_LOSS[args.model](real_score, fake_score)
                if args.model == "wgan-gp":
                    d_loss = d_loss + args.penalty * model.gradient_penalty(gan.discriminator, images, fake.detach())
                if args.model == "acgan":
                    both = model.class_loss(real_classes, labels) + model.class_loss(fake_classes, wanted)
                    d_loss = d_loss + args.class_weight * both
            d_gradient = optim.step_of(d_optimizer, d_loss)
            if args.model == "wgan":
                model.clip_weights(gan.discriminator, args.clip)
            values = [d_loss.detach(), (real_score.mean() - fake_score.mean()).detach(), d_gradient]

            if generator_turn:  # with the same noise; no gradients of the discriminator's weights are needed
                gan.discriminator.requires_grad_(False)
                with r.autocast():
                    score, fake_classes = gan.discriminator(fake)
                    g_loss = model.G_LOSS[args.model](score)
                    if args.model == "acgan":
                        g_loss = g_loss + args.class_weight * model.class_loss(fake_classes, wanted)
                values += [g_loss.detach(), optim.step_of(g_optimizer, g_loss)]
                gan.discriminator.requires_grad_(True)
                gan.update_ema(args.ema, (done + 1) // args.critic_steps)
            totals[step, : len(values)] = torch.stack(values)

            step += 1
            if step % 50 == 0:
                r.check_finite(totals[:step].sum(1), epoch * steps)
                bar.set_postfix(d_loss=f"{totals[step - 50 : step, 0].mean().item():.3f}")
            stopping = r.should_stop()
            if stopping or time.monotonic() - saved > SAVE_EVERY:
                r.save(model=gan, optimizers=optimizers, epoch=epoch, step=step, best=best, totals=totals,
                       seconds=seconds + time.monotonic() - began)  # fmt: skip
                saved = time.monotonic()
            if stopping:
                r.stop()

        r.check_finite(totals.sum(1), epoch * steps)
        seconds += time.monotonic() - began
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            best = evaluate(args, r, gan, judge, epoch + 1, steps, totals, best, seconds)
        step = 0
        totals.zero_()
        r.save(model=gan, optimizers=optimizers, epoch=epoch + 1, step=0, best=best, totals=totals, seconds=seconds)
        saved = time.monotonic()


def evaluate(args, r, gan, judge, epoch, steps, totals, best, seconds):
    """Draw samples, measure them against the held-out images, log a row, and keep the best. Returns the best FID."""
    draw_samples(args, r, gan, epoch)
    images, _ = fid.generate(gan, args.eval_samples, seed=1, device=r.device)
    distance, diversity = judge.distance(judge.features(images))
    turns = epoch * steps // args.critic_steps - (epoch - 1) * steps // args.critic_steps
    counts = torch.tensor([steps, steps, steps, max(1, turns), max(1, turns)])
    means = dict(zip(COLUMNS, (totals.sum(0).cpu() / counts).tolist()))
    r.log({"epoch": epoch, "generator_steps": epoch * steps // args.critic_steps, **means, "val_fid": distance,
           "diversity": diversity, "seconds": round(seconds, 2)})  # fmt: skip
    r.print(f"epoch {epoch:>3}/{args.epochs}   loss {means['train_d_loss']:.3f} D {means['train_g_loss']:.3f} G   "
            f"estimate {means['train_estimate']:.3f}   FID {distance:.2f}   diversity {diversity:.0%}   "
            f"{seconds:.0f} s")  # fmt: skip
    for problem in fid.problems_of(args.model, r.rows[-1], args.epochs / 4):
        r.print(f"*** {problem}")
    if distance < best:
        r.save_best(model=gan, epoch=epoch, fid=distance)
    return min(best, distance)


def draw_samples(args, r, gan, epoch):
    """samples.png, and a copy in samples/ for the animation: the same noise at every evaluation."""
    images, _ = fid.generate(gan, grids.GRID, seed=0, device=r.device)
    pixels = grids.tile(images)
    grids.write_png(run.make_folder(r.folder / "samples") / f"epoch-{epoch:05d}.png", pixels)
    grids.write_png(r.folder / "samples.png", pixels, scale=2)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=model.MODELS, default="dcgan", help="(default: %(default)s)")
    run.add_flags(p, "set", "tensorboard", "data_dir", "out", "resume",
                  recipe=dict(choices=list(RECIPES), help="(default: plain; digits for mnist, shapes for builtin)"),
                  data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP))  # fmt: skip
    run.add_flags(p, "epochs", "bs", "lr", "seed", "device", "threads", "precision", "limit")
    p.add_argument("--width", type=run.positive_int, metavar="N", help="channels of the first layer; scales all others")
    features.add_flags(p)
    p.epilog = "recipes, as they differ from plain:\n" + "\n".join(
        f"  {name} {m}: "
        + ", ".join(f"{k} {v}" for k, v in values.items() if name == "plain" or RECIPES["plain"][m][k] != v)
        for name, models in RECIPES.items()
        for m, values in models.items()
    )
    return p


def recipe(args):
    """The recipe of the model, which the data chooses if no flag names it."""
    args.recipe = args.recipe or {"mnist": "digits", "builtin": "shapes"}.get(args.data, "plain")
    return RECIPES[args.recipe][args.model]


def check(args):
    """Raise UserError for values of --set that are out of range or do not fit together."""
    for name, choices in {"network": model.NETWORKS, "decay": ("none", "linear")}.items():
        if getattr(args, name) not in choices:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be one of {', '.join(choices)}")
    for name in ("lr_ratio", "noise", "critic_steps", "eval_every", "clip", "penalty"):
        if getattr(args, name, 1) <= 0:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be above 0")
    for name, low in (("eval_samples", 10), ("samples", 10), ("feature_size", 32), ("classifier_images", 1)):
        if not low <= getattr(args, name) <= 100_000_000:
            raise run.UserError(f"--set {name}={getattr(args, name)}: must be at least {low}")
    betas = getattr(args, "betas", [0.0, 0.0])
    numbers = all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in [*betas, args.ema])
    if not numbers or len(betas) != 2 or getattr(args, "class_weight", 0) < 0:
        raise run.UserError("--set: ema and both betas must be at least 0 and below 1, class_weight at least 0")
    if args.spectral_norm and args.model == "wgan":
        raise run.UserError("--set spectral_norm=true: wgan clips its weights instead")


def parse(argv=None):
    return run.parse(__file__, parser(), argv, recipe, check, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    *parts, facts = data.load(args.data, args.data_dir, args.limit)
    args.data = facts["name"] if args.data == "auto" else args.data
    if args.model == "acgan" and facts["classes"] < 2:
        raise run.UserError(f"{args.data}: ACGAN needs classes, a folder of images each; choose another --model")
    with run.Run(
        args, __file__, f"{facts['name']}-{args.model}", AUTO_PRECISION, AUTO_THREADS, stop_within_epoch=True
    ) as r:
        train_set, held_out, test_set = (part.to(r.device) for part in parts)
        seen_by = features.load(args, train_set, held_out, facts["digest"], r.folder, r.device)
        gan = model.build(args.model, args.network, facts["channels"], facts["classes"], args.width, args.noise,
                          args.spectral_norm).to(r.device, memory_format=torch.channels_last)  # fmt: skip
        counts = [model.num_parameters(net) for net in (gan.generator, gan.discriminator)]
        judge = fid.Judge(seen_by, held_out, "held out", fid.cache_folder(args, facts), facts["digest"])
        protocol = judge.protocol(args.eval_samples)
        r.note(f"{args.model}, {args.network} network, {counts[0]:,} + {counts[1]:,} parameters, on {facts['name']}: "
               f"{len(train_set):,} training images; FID by {fid.describe(protocol)}", dataset=facts,
               parameters=sum(counts), generator_parameters=counts[0], val_protocol=protocol)  # fmt: skip
        train(args, r, gan, train_set, judge, facts)

        files = [r.folder / "samples" / f"epoch-{int(row['epoch']):05d}.png" for row in [{"epoch": 0}, *r.rows]]
        grids.write_gif(r.folder / "training.gif", files)
        final = fid.final_measures(args, r, gan, seen_by, judge, test_set, held_out, facts)
        final["problems"] = [problem for row in r.rows for problem in fid.problems_of(args.model, row, args.epochs / 4)]
        r.finish(f"FID {final['last_fid']:.2f} with the last weights, {final['best_fid']:.2f} with the weights of "
                 f"epoch {final['best_epoch']}, of {fid.describe(final['protocol'])}", **final)  # fmt: skip
    return r.record


if __name__ == "__main__":
    run.cli(main)

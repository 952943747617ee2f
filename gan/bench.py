"""Steps per second of training: the usual way, and the gain of each change.

    python gan/bench.py                     # DCGAN and WGAN-GP at width 32, batches of 64
    python gan/bench.py --rounds 2 --steps 10 --width 8

The usual way: a torchvision dataset of PIL images and a DataLoader, unfused optimizers, one forward pass of the
discriminator each for real and for generated images, another forward pass of the generator for its own step, gradients
of the discriminator's weights in the generator's step, PyTorch's own layers. Then one change after another, up to what
`train.py` does. The ways take turns, so that a machine that slows down slows all of them. All in one precision:
bfloat16 if the hardware multiplies it, else float32; `--precision` names one. Writes bench.json into --out.
"""

import statistics
import time
from dataclasses import dataclass, replace

from common import run, timing
from common.convolutions import Downsample, LeakyReLU, Upsample
from common.options import option
from common.usual import torchvision_transforms, usual_loader

import torch

import data
import model
import optim
import train
from data import DATA_HELP, dataset_arg

WAYS = (
    "usual",
    "+ batches on the device",
    "+ fused optimizers",
    "+ real and generated in one forward pass",
    "+ generated images used twice",
    "+ no discriminator gradients in the generator's step",
    "+ channels last",
    "+ gradients of convolutions.py",
)
BATCHES, FUSED, TOGETHER, TWICE, NO_GRADIENTS, CHANNELS_LAST, LAYERS = range(1, len(WAYS))


def image_loader(dataset, bs):
    """A shuffling DataLoader of torchvision's transforms. Raises UserError if torchvision is not installed."""
    transforms = torchvision_transforms()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    return usual_loader(dataset, transform, bs, drop_last=True)


def score_apart(discriminator, real, fake):
    """What model.score_both returns, of two forward passes."""
    return *discriminator(real), *discriminator(fake)


def use_pytorch_layers(net):
    """Each layer of common/convolutions.py becomes the layer of PyTorch that it is derived from."""
    for module in net.modules():
        if isinstance(module, Downsample | Upsample | LeakyReLU):
            module.__class__ = type(module).__base__


class Way:
    """One way to train `args.model`: the first `level` changes of WAYS. Called with a round, it takes `steps` steps of
    the discriminator and returns the images per second."""

    def __init__(self, level, args, steps, dataset, device, bf16):
        torch.manual_seed(0)
        self.level = level
        self.args = args
        self.device = device
        self.bf16 = bf16
        self.gan = model.build(args.model, "plain", 3, 10, args.width, args.noise).to(device)
        if level < LAYERS:
            use_pytorch_layers(self.gan)
        if level >= CHANNELS_LAST:
            self.gan = self.gan.to(memory_format=torch.channels_last)
        self.gan.train()
        self.optimizers = optim.build_optimizers(args, self.gan)
        if level < FUSED:
            for optimizer in self.optimizers:
                optimizer.param_groups[0].update(fused=False, foreach=False)
                optimizer.defaults.update(fused=False, foreach=False)
        self.batches = self.endless(dataset, image_loader(dataset, args.bs) if level < BATCHES else None)
        self.steps = steps  # of a round
        self.done = 0

    def endless(self, dataset, loader):
        """Batches without end: of `loader`, or without one, of the dataset's own."""
        while True:
            yield from dataset.batches(self.args.bs, (0, 0)) if loader is None else loader

    def __call__(self, round):
        began = time.perf_counter()
        for _ in range(self.steps):
            loss = self.step(*next(self.batches))
        loss.item()  # a GPU has finished when its last result is here
        return self.steps * self.args.bs / (time.perf_counter() - began)

    def step(self, real, labels):
        args = self.args
        gan = self.gan
        d_optimizer, g_optimizer = self.optimizers
        real = real.to(self.device)
        if self.level < CHANNELS_LAST:
            real = real.contiguous()
        self.done += 1
        turn = self.done % args.critic_steps == 0
        noise = torch.randn(len(real), args.noise, device=self.device)
        with torch.set_grad_enabled(turn and self.level >= TWICE), self.autocast():
            fake = gan.generator(noise)
        score = model.score_both if self.level >= TOGETHER else score_apart
        with self.autocast():
            loss, _ = model.d_loss(args, gan.discriminator, real, labels, fake.detach(), labels, score)
        self.update(d_optimizer, loss)
        if turn:
            gan.discriminator.requires_grad_(self.level < NO_GRADIENTS)
            with self.autocast():
                fake = fake if self.level >= TWICE else gan.generator(noise)
                g_loss = model.g_loss(args, gan.discriminator, fake, labels)
            self.update(g_optimizer, g_loss)
            gan.discriminator.requires_grad_(True)
        return loss

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def update(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int = option(10_000, "only the first N examples", above=0)
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    precision: str = option("auto", "auto: bf16 if the hardware multiplies it", choices=["auto", "fp32", "bf16"])
    rounds: int = option(5, "turns of each way", above=0)
    steps: int = option(40, "steps of the discriminator in a round", above=0)
    width: int = option(32, "channels of the first layer", above=0, at_most=4096)
    out: str = option(str(run.ROOT / "out/gan/bench"), "folder for bench.json", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads)
    device, out = run.pick_device(args.device), run.make_folder(args.out)
    train_set, _, _, facts = data.load(args.data, args.data_dir, args.limit)
    if facts["channels"] != 3:
        raise run.UserError(f"--data {args.data}: bench.py compares on colour images")
    train_set = train_set.to(device)
    machine = run.environment(device, __file__)
    rows = []
    bf16 = args.precision == "bf16" or args.precision == "auto" and run.native_bf16(device)
    for name in ("dcgan", "wgan-gp"):
        options = replace(train.PLAIN[name], width=args.width)
        options.bs = min(options.bs, len(train_set))
        ways = {way: Way(level, options, args.steps, train_set, device, bf16) for level, way in enumerate(WAYS)}
        if bf16:
            ways["the last, in float32"] = Way(len(WAYS), options, args.steps, train_set, device, False)
        rates = timing.turns(ways, args.rounds)
        for way, measured in rates.items():
            row = {
                "model": name,
                "way": way,
                "precision": "bf16" if ways[way].bf16 else "fp32",
                "width": args.width,
                "bs": options.bs,
                "images_per_s": statistics.median(measured),
                "times_usual": timing.median_ratio(measured, rates["usual"]),
                "rates": measured,
            }
            rows.append(row)
            rate = f"{row['images_per_s']:7,.0f} images/s, {row['times_usual']:.2f} times the usual way"
            print(f"{name:8} {way:54} {row['precision']}  {rate}")
    run.write_json(out / "bench.json", {"bench": "gan", **machine, "dataset": facts, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)

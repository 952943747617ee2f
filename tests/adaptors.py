"""What test_contract.py has to know of each folder: how its data come in parts, and how it evaluates a network."""

import copy
import dataclasses
import functools

import torch

from helpers import load

# ------------------------------------------------------------------------------------------------ the parts of the data

# where `tiny` learns too little for its epochs to differ on a test set
LEARNS = {"resnet": dict(epochs=6, lr=0.2, limit=100), "s2vt": dict(epochs=4, bs=20, lr=0.02, limit=60)}
NO_TEST_PART = {"lms": "its last rows validate, and choose nothing: there is one epoch to report, the last"}
PLACES = {"train": 0, "val": 1, "test": 2}


def part_of(loaded, name):
    """The part `name` ("train", "val", "test") of what a folder's data.load returned."""
    if hasattr(loaded, "val_inputs"):  # lms/
        first = {"train": "", "val": "val_"}[name]
        return getattr(loaded, f"{first}inputs"), getattr(loaded, f"{first}targets")
    if not isinstance(loaded, tuple):  # lstm_imdb/, nanogpt/
        return getattr(loaded, name)
    if isinstance(loaded[0], dict):  # distilgpt2/
        return loaded[0][{"val": "validation"}.get(name, name)]
    return loaded[PLACES[name]]


def with_part(loaded, name, part):
    """What data.load returned, with another part in place of the validation or the test part."""
    if hasattr(loaded, "val_inputs"):
        return dataclasses.replace(loaded, val_inputs=part[0], val_targets=part[1])
    if not isinstance(loaded, tuple):
        return dataclasses.replace(loaded, **{name: part})
    if isinstance(loaded[0], dict):
        return loaded[0] | {{"val": "validation"}.get(name, name): part}, *loaded[1:]
    place = PLACES[name]
    return *loaded[:place], part, *loaded[place + 1 :]


def like_training(loaded, name):
    """In place of the part `name`: examples that were trained on, as many. Every epoch is better on them."""
    part, train = part_of(loaded, name), part_of(loaded, "train")
    if isinstance(part, torch.Tensor):  # tokens (N,)
        return train[: len(part)].clone()
    if isinstance(part, tuple):
        return tuple(array[: len(part[1])] for array in train)
    if hasattr(part, "ids") and isinstance(part.ids, torch.Tensor):  # of distilgpt2/
        return dataclasses.replace(part, ids=train.ids[: len(part.ids)].clone())
    if hasattr(part, "captions"):
        return train.first(len(part))
    if hasattr(part, "images"):
        return with_examples(part, train.images[: len(part)], train.labels[: len(part)])
    return train  # reviews


def unlike_training(loaded, name):
    """The same with wrong answers: every epoch is worse on them."""
    part = like_training(loaded, name)
    if isinstance(part, torch.Tensor):
        return part.flip(0)
    if isinstance(part, tuple):
        return part[0], -part[1]
    if hasattr(part, "captions"):
        rolled = {key: getattr(part, key)[1:] + getattr(part, key)[:1] for key in ("raw", "captions", "tokens")}
        return dataclasses.replace(part, **rolled)
    if hasattr(part, "ids"):
        return dataclasses.replace(part, ids=part.ids.flip(0))
    if hasattr(part, "images"):
        return with_examples(part, 255 - part.images, (part.labels + 1) % len(part.classes))
    return dataclasses.replace(part, labels=(part.labels + 1) % 2)


def with_examples(part, images, labels):
    """A part of images like `part`, with other images and labels."""
    other = copy.copy(part)
    other.images, other.labels = images, labels
    if hasattr(other, "rows"):  # of gan/
        other.rows = images.permute(0, 2, 3, 1).contiguous()
    return other


# ----------------------------------------------------------------------------------------------------------- evaluation

# what gives a network dropout or batch normalization, where `tiny` has none
OPTIONS = {
    "cifar": ["--model", "simplenn", "--bn"],
    "nanogpt": ["--dropout", "0.2"],
    "simplenn": ["--dropout", "0.5"],
}
NO_NETWORK = {"lms": "a linear model has neither dropout nor batch normalization"}
EVALUATE = {  # (module, function): what evaluates the network in a run
    "distilgpt2": ("scoring", "block_loss"),
    "gan": ("fid", "generate"),
    "nanogpt": ("train", "evaluate"),
    "s2vt": ("train", "validate"),
}


def in_batches_of(folder, size, backwards, patch, args):
    """The arguments of the function that evaluates a network, so that the examples come `size` at a time, and in
    reverse order if `backwards`. patch: pytest's monkeypatch, for what is not an argument."""
    net, part, *others = args
    step = -1 if backwards else 1
    if folder == "nanogpt":
        blocks = load("nanogpt", "data").blocks

        def other_blocks(*args):
            for x, y in list(blocks(*args))[::step]:
                order = torch.arange(len(x))
                order = order.flip(0) if backwards else order
                yield from zip(x[order].split(size), y[order].split(size))

        patch.setattr(load("nanogpt", "data"), "blocks", other_blocks)
        return args
    if folder == "distilgpt2":  # a batch has 1,024 tokens or more
        part = dataclasses.replace(part, ids=part.ids.repeat(20))
        own, (options, *rest) = load("distilgpt2", "data").Blocks.__getitem__, others
        if backwards:
            patch.setattr(load("distilgpt2", "data").Blocks, "__getitem__", lambda b, i: own(b, len(b) - 1 - i))
        return net, part, changed(options, micro_batch=size), *rest
    order = torch.arange(len(part))
    order = order.flip(0) if backwards else order
    if folder == "s2vt":
        options, r = others
        keys = ("ids", "raw", "captions", "tokens", "events")
        lists = {key: getattr(part, key)[::step] for key in keys if getattr(part, key)}
        return net, dataclasses.replace(part, features=part.features[order], **lists), changed(options, bs=size), r
    if folder == "lstm_imdb":
        return net, changed(part, order=lambda *_: order.split(size)), *others
    part = with_examples(part, part.images[order], part.labels[order])
    part.eval_batch_size = size  # of resnet/
    part.batches = functools.partial(batches_of, type(part).batches, part, size)
    return net, part, *others


def batches_of(batches, part, size, *_, **options):
    return batches(part, size, **options)


def changed(thing, **values):
    """A copy of `thing` with other attributes."""
    other = copy.copy(thing)
    for name, value in values.items():
        setattr(other, name, value)
    return other

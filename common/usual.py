"""The usual way to feed images to a network, with which benches compare: PIL images one by one, through torchvision's
transforms, in a DataLoader."""

from common.terminal import UserError

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class PILImages(Dataset):
    """One PIL image and label at a time, through a transform. images: uint8 (N, C, H, W); labels: int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, transform):
        grey = images.shape[1] == 1
        arrays = images[:, 0] if grey else images.permute(0, 2, 3, 1)
        self.images = [Image.fromarray(array) for array in arrays.cpu().numpy()]
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def torchvision_transforms():
    """torchvision.transforms. Raises UserError if it is not installed."""
    try:
        from torchvision import transforms
    except ImportError:
        raise UserError("bench.py compares with torchvision: pip install -r requirements.txt") from None
    return transforms


def crop_and_flip_transform(mean: Tensor, std: Tensor, padding: int):
    """Random crop, random flip, to a tensor, normalized. mean, std: in units of pixel values."""
    transforms = torchvision_transforms()
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((mean.flatten() / 255).tolist(), (std.flatten() / 255).tolist()),
        ]
    )


def usual_loader(
    dataset, transform, batch_size: int, workers: int = 0, seed: int | None = None, drop_last: bool = False
):
    """A shuffling DataLoader over the `images` and `labels` of a dataset; seed: of the order."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(
        PILImages(dataset.images, dataset.labels, transform),
        batch_size,
        shuffle=True,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=generator,
    )

"""Random crops of images in memory, a whole batch at a time."""

import torch
from torch import Tensor


def crop_and_flip(padded: Tensor, size: int, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Crops (B, C, size, size) of the images `index` (B,) of `padded` (N, C, H, W), which is contiguous, at the offsets
    `shift` (B, 2) in y and x; flipped where `flip` (B,) is true. The same, an image at a time:

        for i, (y, x), flipped in zip(index, shift, flip):
            crop = padded[i, :, y : y + size, x : x + size]
            crops.append(crop.flip(2) if flipped else crop)

    A row of a crop is `size` consecutive values of `padded`. So all crops are one gather of rows, from the view in
    which row k starts at value k: ten times as fast as a gather of pixels.
    """
    _, channels, height, width = padded.shape
    device = padded.device
    windows = padded.view(-1).as_strided((padded.numel() - size + 1, size), (1, 1))
    corner = index * (channels * height * width) + shift[:, 0] * width + shift[:, 1]  # (B,)
    plane = torch.arange(channels, device=device)[:, None] * height * width  # (C, 1)
    row = torch.arange(size, device=device) * width  # (size,)
    starts = (corner[:, None, None] + plane + row).view(-1)  # (B, C, size) -> (B * C * size,)
    crops = windows.index_select(0, starts).view(-1, channels, size, size)
    flipped = flip.nonzero().squeeze(1)
    return crops.index_copy_(0, flipped, crops.index_select(0, flipped).flip(3))

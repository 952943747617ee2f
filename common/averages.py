"""The average of a network's weights over the last steps of training."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_average(net: nn.Module, ema: float, steps: int) -> AveragedModel:
    """The exponential moving average of weights and buffers (Polyak and Juditsky 1992): a <- ema a + (1 - ema) w.

    Its horizon is 1 / (1 - ema) steps, at most a tenth of the run's `steps`; otherwise a short run's average would
    still contain its initial weights.
    """
    ema = max(0.0, min(ema, 1 - 10 / steps))
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)

"""Metrics as event files in a run folder, for `tensorboard --logdir out`."""

import textwrap
from pathlib import Path

from common.terminal import UserError


class Events:
    """The event files of a run; nothing is written before the first row. Raises UserError if TensorBoard is missing."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard: is not installed; pip install tensorboard") from error
        self._make_writer = SummaryWriter
        self._folder = folder
        self._writer = None

    def log(self, row: dict):
        """Write a row of metrics: train_loss as loss/train. Its first column is the step."""
        x, step = next(iter(row.items()))
        if self._writer is None:  # events of an earlier process from this step on are hidden
            self._writer = self._make_writer(str(self._folder), purge_step=step)
        for name, value in row.items():
            part, _, quantity = name.partition("_")
            tag = f"{quantity}/{part}" if part in ("train", "val") else name
            if name != x:
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def text(self, tag: str, text: str, step: int):
        """Write a text, shown as it is and not as Markdown."""
        if self._writer:
            self._writer.add_text(tag, textwrap.indent(text, "    "), step)
            self._writer.flush()

    def close(self):
        if self._writer:
            self._writer.close()

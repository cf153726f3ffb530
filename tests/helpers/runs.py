"""Config and user code of small runs of the command line."""

from pathlib import Path

TINY = (Path(__file__).parents[2] / "benchmarks" / "tiny.yaml").read_text()

OWN_NETS = '''
from torch import nn

from teamnet_pl.data import Digits


class FewDigits(Digits):
    """Keeps few images, or all."""

    def __init__(self, keep: int | None = 100, **kwargs):
        super().__init__(train_size=keep, **kwargs)


class PoisonedDigits(Digits):
    """An image of the second training batch of the last process is NaN."""

    batches = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.batches += 1
            if self.batches == 2 and self.trainer.global_rank == self.trainer.world_size - 1:
                images[0] = float("nan")
        return images, labels


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())


class GroupNormNet(nn.Sequential):
    """Without batch norm, so that a batch may be cut in two."""

    def __init__(self, num_classes, in_channels, width=4):
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            *(Residual(width) for _ in range(4)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


def counts_classes(num_classes):
    """Takes no number of channels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


def takes_anything(**kwargs):
    return GroupNormNet(**kwargs)
'''

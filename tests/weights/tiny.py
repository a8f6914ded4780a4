"""A SparK model that takes no time: two convolutions, strides 4 and 8."""

import torch
from torch import nn

from spark_fast import build_spark


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, 2, padding=1)

    def forward(self, images):
        first = self.bn1(self.conv1(images))
        return [first, self.conv2(first)]


def tiny_spark(seed=0):
    torch.manual_seed(seed)
    return build_spark(TwoConvolutions(), input_size=32, mask_ratio=0.5, decoder_width=8, check=False)

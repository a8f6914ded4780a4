"""The network of the run that an earlier version wrote: two convolutions, strides 4 and 8."""

from torch import Tensor, nn


class TwoConvolutions(nn.Module):
    """(B, 3, H, W) -> [(B, 8, H/4, W/4), (B, 16, H/8, W/8)]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> list[Tensor]:
        """The two feature maps."""
        first = self.act(self.bn1(self.conv1(images)))
        return [first, self.act(self.bn2(self.conv2(first)))]


def build() -> TwoConvolutions:
    """What --model compat_network:build calls."""
    return TwoConvolutions()

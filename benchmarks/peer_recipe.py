"""lightly's CIFAR-10 benchmark of BYOL, as a sequence of training steps."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torchvision.transforms.v2 as transforms

import peer_lightly


class Recipe:
    """BYOL as in lightly's `cifar10_benchmark.py`.

    That is: its ResNet with a 3x3 stem, heads of 1024 and 256, SGD with momentum 0.9 and weight decay 5e-4, a
    cosine schedule that moves once per epoch, a target EMA of 0.99, and its two BYOL transforms without blur.

    Args:
      images: uint8 `[N, 3, H, W]`.
      encoder: lightly's name of a ResNet, such as 'resnet-9', which has one block per stage.
      width: multiple of the number of channels.
      learning_rate: the peak rate; the benchmark has 0.06 * batch_size / 128.
      num_epochs: length of the cosine schedule, rounded up.
      seed: the seed of PyTorch's global generator, from which lightly draws everything.
      **settings: `image_size`, the side of the views (the benchmark has 32), `batch_size`, `dtype` and `workers`, as
        for `peer_lightly.Peer`.
    """

    def __init__(
        self,
        images: torch.Tensor,
        *,
        encoder: str,
        width: float,
        learning_rate: float,
        num_epochs: float,
        seed: int,
        **settings: Any,
    ):
        from lightly.models import ResNetGenerator
        from lightly.transforms import utils

        torch.manual_seed(seed)
        resnet = ResNetGenerator(encoder, width=width)
        self._peer = peer_lightly.Peer(
            images,
            # The benchmark assembles the children, and so leaves out the ReLU after the first batch norm.
            torch.nn.Sequential(*list(resnet.children())[:-1], torch.nn.AdaptiveAvgPool2d(1)),
            resnet.linear.in_features,
            lambda params: torch.optim.SGD(params, lr=learning_rate, momentum=0.9, weight_decay=5e-4),
            momentum=0.99,
            hidden_size=1024,
            output_size=256,
            device=torch.device('cpu'),
            gaussian_blur=0.0,
            **settings,
        )
        self.batch_size, self._num_epochs = self._peer.batch_size, math.ceil(num_epochs)
        self._normalize = transforms.Normalize(**utils.IMAGENET_NORMALIZE)

    def steps(self) -> Iterator[None]:
        """Trains for all epochs; each iteration is one step, including data loading."""
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._peer.optimizer, self._num_epochs)
        for _ in range(self._num_epochs):
            yield from self._peer.epoch()
            schedule.step()

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds images `[B, 3, S, S]` in 0..1 in float32, with the moving averages of batch norm."""
        encoder = self._peer.encoder
        encoder.eval()
        features = encoder(self._normalize(images)).flatten(start_dim=1)
        encoder.train()
        return features

"""lightly's CIFAR-10 benchmark of BYOL, built from lightly's own components, as a sequence of training steps."""

import copy
import math
from collections.abc import Iterator

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
      view_size: side of the views in pixels; the benchmark has 32.
      batch_size: number of images per batch.
      learning_rate: the peak rate; the benchmark has 0.06 * batch_size / 128.
      num_epochs: length of the cosine schedule.
      dtype: float32, or another dtype, which is used for autocast.
      workers: number of processes of the data loader; 0 transforms the images in this process.
      seed: the seed of PyTorch's global generator, from which lightly draws everything.
    """

    def __init__(
        self, images, *, encoder, width, view_size, batch_size, learning_rate, num_epochs, dtype, workers, seed
    ):
        from lightly import loss
        from lightly.models import ResNetGenerator, modules, utils
        from lightly.transforms import byol_transform
        from lightly.transforms import utils as transform_utils

        torch.manual_seed(seed)
        self.batch_size, self._dtype, self._utils = batch_size, dtype, utils
        self._num_epochs = math.ceil(num_epochs)
        resnet = ResNetGenerator(encoder, width=width)
        # The benchmark assembles the children, and so leaves out the ReLU after the first batch norm.
        self.encoder = torch.nn.Sequential(*list(resnet.children())[:-1], torch.nn.AdaptiveAvgPool2d(1))
        self._projector = modules.BYOLProjectionHead(resnet.linear.in_features, 1024, 256)
        self._predictor = modules.BYOLPredictionHead(256, 1024, 256)
        for module in (self.encoder, self._projector, self._predictor):
            module.to(memory_format=torch.channels_last)
        self._target_encoder, self._target_projector = copy.deepcopy(self.encoder), copy.deepcopy(self._projector)
        utils.deactivate_requires_grad(self._target_encoder)
        utils.deactivate_requires_grad(self._target_projector)
        self._criterion = loss.NegativeCosineSimilarity()
        online = (self.encoder, self._projector, self._predictor)
        self._optimizer = torch.optim.SGD(
            [p for module in online for p in module.parameters()], lr=learning_rate, momentum=0.9, weight_decay=5e-4
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self._num_epochs)
        views = (byol_transform.BYOLView1Transform, byol_transform.BYOLView2Transform)
        transform = byol_transform.BYOLTransform(*(v(input_size=view_size, gaussian_blur=0.0) for v in views))
        self._normalize = transforms.Normalize(**transform_utils.IMAGENET_NORMALIZE)
        self._loader = torch.utils.data.DataLoader(
            peer_lightly.Images(images, transform),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def steps(self) -> Iterator[None]:
        """Trains for all epochs; each iteration is one step, including data loading."""
        for _ in range(self._num_epochs):
            for x0, x1 in self._loader:
                self._utils.update_momentum(self.encoder, self._target_encoder, m=0.99)
                self._utils.update_momentum(self._projector, self._target_projector, m=0.99)
                x0, x1 = (x.to(memory_format=torch.channels_last) for x in (x0, x1))
                with torch.autocast('cpu', self._dtype, enabled=self._dtype != torch.float32):
                    p0, z0 = self._online(x0), self._target(x0)
                    p1, z1 = self._online(x1), self._target(x1)
                    loss = 0.5 * (self._criterion(p0, z1) + self._criterion(p1, z0))
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                yield
            self._schedule.step()

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds images `[B, 3, S, S]` in 0..1 in float32, with the moving averages of batch norm."""
        self.encoder.eval()
        features = self.encoder(self._normalize(images)).flatten(start_dim=1)
        self.encoder.train()
        return features

    def _online(self, x: torch.Tensor) -> torch.Tensor:
        return self._predictor(self._projector(self.encoder(x).flatten(start_dim=1)))

    def _target(self, x: torch.Tensor) -> torch.Tensor:
        return self._target_projector(self._target_encoder(x).flatten(start_dim=1)).detach()

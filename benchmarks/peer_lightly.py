"""The BYOL of lightly, built from lightly's components, on the same images and sizes as ours."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from PIL import Image


class _Images(torch.utils.data.Dataset):
    """A data set that converts uint8 images in memory to PIL images and transforms each into two views."""

    def __init__(self, images: torch.Tensor, transform: Any):
        self._images, self._transform = images.permute(0, 2, 3, 1).numpy(), transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self._transform(Image.fromarray(self._images[index]))


class Peer:
    """A training loop built from lightly's components: transform, heads, loss and momentum update.

    Args:
      images: uint8 `[N, 3, H, W]`.
      encoder: a module from images to features, which are flattened.
      num_features: the number of features.
      optimizer: makes an optimizer of parameters.
      momentum: the EMA of the target.
      image_size: side of the views in pixels.
      batch_size: number of images per batch.
      hidden_size: hidden size of the heads.
      output_size: output size of the heads.
      device: the device to train on.
      dtype: float32, or another dtype, which is used for autocast.
      workers: number of processes of the data loader; 0 transforms the images in this process.
      **augmentations: arguments of lightly's two views.
    """

    def __init__(
        self,
        images: torch.Tensor,
        encoder: torch.nn.Module,
        num_features: int,
        optimizer: Callable[[list], torch.optim.Optimizer],
        *,
        momentum: float,
        image_size: int,
        batch_size: int,
        hidden_size: int,
        output_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        **augmentations: Any,
    ):
        from lightly import loss
        from lightly.models import modules, utils
        from lightly.transforms import byol_transform

        self.device, self.dtype, self.batch_size, self._utils = device, dtype, batch_size, utils
        self.encoder, self._momentum = encoder, momentum
        self.projector = modules.BYOLProjectionHead(num_features, hidden_size, output_size)
        self.predictor = modules.BYOLPredictionHead(output_size, hidden_size, output_size)
        for module in (self.encoder, self.projector, self.predictor):
            module.to(device, memory_format=torch.channels_last)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_projector = copy.deepcopy(self.projector)
        utils.deactivate_requires_grad(self.target_encoder)
        utils.deactivate_requires_grad(self.target_projector)
        self.criterion = loss.NegativeCosineSimilarity()
        online = (self.encoder, self.projector, self.predictor)
        self.optimizer = optimizer([p for module in online for p in module.parameters()])
        views = (byol_transform.BYOLView1Transform, byol_transform.BYOLView2Transform)
        transform = byol_transform.BYOLTransform(*(view(input_size=image_size, **augmentations) for view in views))
        self.loader = torch.utils.data.DataLoader(
            _Images(images, transform),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == 'cuda',
            persistent_workers=workers > 0,
        )

    def epoch(self) -> Iterator[None]:
        """Trains for an epoch; each iteration is one step, including data loading."""
        for x0, x1 in self.loader:
            self._utils.update_momentum(self.encoder, self.target_encoder, m=self._momentum)
            self._utils.update_momentum(self.projector, self.target_projector, m=self._momentum)
            x0, x1 = (x.to(self.device, non_blocking=True, memory_format=torch.channels_last) for x in (x0, x1))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                p0, z0 = self._online(x0), self._target(x0)
                p1, z1 = self._online(x1), self._target(x1)
                loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield

    def _online(self, x: torch.Tensor) -> torch.Tensor:
        return self.predictor(self.projector(self.encoder(x).flatten(start_dim=1)))

    def _target(self, x: torch.Tensor) -> torch.Tensor:
        return self.target_projector(self.target_encoder(x).flatten(start_dim=1)).detach()


def example(images: torch.Tensor, *, encoder_class: str, stem: str, **settings: Any) -> Iterator[None]:
    """Trains endlessly as lightly's PyTorch example does; each iteration is one step.

    Args:
      images: uint8 `[N, 3, H, W]`.
      encoder_class: TinyResNet, or torchvision's ResNet18, ResNet34 or ResNet50.
      stem: 'cifar' or 'imagenet'.
      **settings: the sizes, device, dtype and workers of `Peer`.
    """
    encoder, size = _encoder(encoder_class, stem)
    peer = Peer(images, encoder, size, lambda params: torch.optim.SGD(params, lr=0.06), momentum=0.996, **settings)
    while True:
        yield from peer.epoch()


def _encoder(encoder_class: str, stem: str) -> tuple[torch.nn.Module, int]:
    first = (3, 64, 3, 1, 1) if stem == 'cifar' else (3, 64, 7, 2, 3)
    pool = torch.nn.Identity() if stem == 'cifar' else torch.nn.MaxPool2d(3, 2, 1)
    if encoder_class == 'TinyResNet':
        blocks = [_tiny_block(64, 1), *(_tiny_block(8, 2) for _ in range(3))]
        return torch.nn.Sequential(
            torch.nn.Conv2d(*first, bias=False),
            torch.nn.BatchNorm2d(64),
            torch.nn.ReLU(),
            pool,
            *blocks,
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        ), 8
    resnet = getattr(torchvision.models, encoder_class.lower())()
    size = resnet.fc.in_features
    resnet.conv1, resnet.maxpool = torch.nn.Conv2d(*first, bias=False), pool
    resnet.fc = torch.nn.Identity()
    return resnet, size


def _tiny_block(in_channels: int, stride: int) -> torch.nn.Module:
    """Returns torchvision's basic block with 8 output channels and a projection."""
    projection = torch.nn.Sequential(torch.nn.Conv2d(in_channels, 8, 1, stride, bias=False), torch.nn.BatchNorm2d(8))
    return torchvision.models.resnet.BasicBlock(in_channels, 8, stride, projection)

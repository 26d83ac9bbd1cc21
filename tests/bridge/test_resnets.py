"""Encoders that have no counterpart in torchvision or timm are refused in one line."""

import pytest
import torch

from byol_func.bridge import resnets
from byol_func.errors import UserError
from configs import byol


def _network(encoder_class, norm='batch_norm', **options):
    network = byol.get_config().network.to_dict() | dict(encoder_class=encoder_class, norm=norm)
    network['encoder_config'] |= options
    return network


@pytest.mark.parametrize('function', [resnets.to_torchvision, resnets.to_timm])
@pytest.mark.parametrize(
    'encoder_class, options, message',
    [
        ('ResNet18', {}, "config.network.encoder_class='ResNet18': .* the identity there"),
        ('ResNet50', dict(stem='cifar'), "config.network.encoder_config.stem='cifar': .* expected imagenet"),
        ('ResNet50', dict(norm='group_norm'), "config.network.norm='group_norm': .* expected batch_norm"),
    ],
)
def test_what_does_not_fit_is_said(function, encoder_class, options, message):
    with pytest.raises(UserError, match=message):
        function(torch.nn.Identity(), {}, _network(encoder_class, **options))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(resnet_v2=True), 'encoder_config.resnet_v2=True: torchvision has no such network, expected False'),
        (dict(width_multiplier=2.0), 'encoder_config.width_multiplier=2.0: torchvision has no such network'),
    ],
)
def test_torchvision_has_version_1_and_width_1(options, message):
    with pytest.raises(UserError, match=message):
        resnets.to_torchvision(torch.nn.Identity(), {}, _network('ResNet50', **options))

"""`--mode=export --format=hub`: a folder as the Hugging Face hub wants it, with a model card; `--push` uploads it."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch

from byol_func import library
from byol_func.bridge import plain_module, resnets
from byol_func.errors import UserError, counted
from byol_func.utils import checkpointing
from byol_func.workdir import files, summaries

LICENCE = 'Apache 2.0, as the code; the terms of the data are their own'
_FRONT = """---
license: apache-2.0
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [byol, self-supervised]
---

"""
_TIMM = """import timm
import torch
from PIL import Image

model = timm.create_model('local-dir:{folder}', pretrained=True).eval()  # on the hub: 'hf-hub:USER/NAME'
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    features = model(transform(Image.open('image.png').convert('{mode}'))[None])  # float32 [1, {size}]"""
_TIMM_ARRAYS = """import timm
import torch

model = timm.create_model('local-dir:{folder}', pretrained=True).eval()  # on the hub: 'hf-hub:USER/NAME'
images = torch.zeros(1, {channels}, {side}, {side})  # float32 in 0..1
mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
with torch.no_grad():
    features = model((images - mean) / std)  # float32 [1, {size}]"""
_OURS_ARRAYS = """import byol_func
import torch

encoder = byol_func.load_encoder('{folder}')
features = encoder.embed(torch.zeros(1, {channels}, {side}, {side}))  # float32 [1, {size}]; 0..1, or paths of files"""
_OURS = """import byol_func

encoder = byol_func.load_encoder('{folder}')
features = encoder.embed(['image.png'])  # float32 [1, {size}]; PIL images and tensors work too"""


def published(checkpoint: checkpointing.Checkpoint, path: str) -> checkpointing.Checkpoint:
    """Returns the encoder of a pre-training as a checkpoint for `path`, without the paths of this machine."""
    encoder = checkpointing.encoder_only(checkpoint, path)
    data = encoder.config['dataset']
    config = encoder.config | {'dataset': data | {'root': 'DIR' if data['root'].startswith('/') else data['root']}}
    if config.get('init_from'):
        config['init_from'] = os.path.basename(config['init_from'])
    return encoder._replace(config=config, data={})


def card(
    title: str,
    about: str,
    *,
    example: str,
    accuracies: Mapping[str, str],
    facts: Mapping[str, str],
    weights: pathlib.Path,
    closing: str,
) -> str:
    """Returns a model card in Markdown.

    Args:
      title: the first line.
      about: what the file is.
      example: Python code that loads it.
      accuracies: what was measured -> top-1 in percent.
      facts: such as 'Data' and 'Recipe'.
      weights: the file, whose checksum the card shows.
      closing: the last paragraph.
    """
    table = ['| test top-1 (%) | |', '|---|---|', *(f'| {name} | {value} |' for name, value in accuracies.items()), '']
    listed = [f'- **{name}**: {value}' for name, value in facts.items()]
    checksum = f'- **SHA-256**: `{hashlib.sha256(weights.read_bytes()).hexdigest()}`'
    start = [f'# {title}', '', about, '', '```python', example, '```', '']
    return '\n'.join([*start, *(table if accuracies else []), *listed, checksum, '', closing, ''])


def recipe(config: Mapping[str, Any], epochs: float) -> str:
    """Returns the settings of a pre-training in words."""
    views = config.get('view_size') or config['image_size']
    return (
        f'{counted(epochs, "epoch", "g")}, batch {config["batch_size"]}, {config["optimizer"]} with base rate '
        f'{config["lr_schedule"]["base_learning_rate"]:g}, base EMA {config["base_target_ema"]:g}, views of {views} '
        f'pixels, seed {config["random_seed"]}; everything else is in [config.json](config.json) and in the file'
    )


def write(folder: pathlib.Path, checkpoint: checkpointing.Checkpoint, encoder: library.Encoder) -> str:
    """Writes the folder of an encoder and returns the Python expression that loads it.

    timm loads it if it has such a network. timm pads its strided layers on both sides, which makes no difference at
    sizes of 32 k + 1 pixels. The folder therefore asks for the size of the training rounded to such a number.

    Args:
      folder: a folder that does not exist yet.
      checkpoint: a checkpoint of a pre-training.
      encoder: the encoder in it.

    Raises:
      OSError: the folder cannot be written.
    """
    weights = folder / library.HUB_FILE
    ours = published(checkpoint, os.fspath(weights))
    config, channels = ours.config, encoder.num_channels
    name, size = resnets.timm_name(config['network']), config['image_size']
    folder.mkdir(parents=True)
    if name:
        size = max(33, round(size / 32) * 32 + 1)
        tensors = resnets.to_timm(encoder.as_module(), None, config['network'])
        header = {'format': 'pt', 'config': json.dumps(config), 'step': str(checkpoint.step)}
        safetensors.torch.save_file(tensors, weights, header)
        described = _for_timm(name, config, channels, size, encoder.output_size)
    else:
        checkpointing.write(ours)
        described = {}
    (folder / 'config.json').write_text(json.dumps({**described, 'byol_func': config}, indent=2) + '\n')
    count = sum(tensor.numel() for key, tensor in ours.tensors.items() if key.startswith('online_params/'))
    about = {1: 'a grey image', 3: 'a colour image'}.get(channels, f'an image with {channels} channels')
    filled = dict(
        folder=folder.name,
        size=encoder.output_size,
        mode='RGB' if channels == 3 else 'L',
        channels=channels,
        side=size,
    )
    examples = (_TIMM, _OURS) if channels in (1, 3) else (_TIMM_ARRAYS, _OURS_ARRAYS)
    facts = {
        'Data': config['dataset']['name'],
        **_size_note(config['image_size'], size),
        'Recipe': recipe(config, round(checkpoint.scalars.get('epoch', 0), 1)),
        'Licence of the weights': LICENCE,
    }
    text = card(
        f'{config["network"]["encoder_class"]} trained by {config.get("variant") or "BYOL"}',
        f'`{weights.name}` holds an encoder of {count / 1e6:.2f} million parameters, float32. It turns {about} '
        f'of {size} x {size} pixels into {counted(encoder.output_size, "feature")}.',
        example=examples[0 if name else 1].format(**filled),
        accuracies=_accuracies(checkpoint),
        facts=facts,
        weights=weights,
        closing="Trained with byol_func, a port of DeepMind's BYOL to PyTorch.",
    )
    (folder / 'README.md').write_text(_FRONT.format(library='timm' if name else 'byol_func') + text)
    path = f'local-dir:{folder}' if name else str(folder)
    return f'timm.create_model({path!r}, pretrained=True)' if name else f'byol_func.load_encoder({path!r})'


def _size_note(trained: int, wanted: int) -> dict[str, str]:
    """Returns the fact of the card that explains why timm wants another size than that of the training."""
    if trained == wanted:
        return {}
    note = f'trained at {trained} x {trained} pixels; at {wanted}, timm pads to the same outputs as this code'
    return {'Image size': note}


def _for_timm(name: str, config: Mapping[str, Any], channels: int, size: int, features: int) -> dict[str, Any]:
    """Returns what timm reads from config.json."""
    mean, std = plain_module.normalisation(channels)
    options = config['network']['encoder_config']
    return {
        'architecture': name,
        'num_classes': 0,
        'num_features': features,
        'model_args': {
            'in_chans': channels,
            'preact': options['resnet_v2'],
            'width_factor': options['width_multiplier'],
        },
        'pretrained_cfg': {
            'input_size': [channels, size, size],
            'interpolation': 'bicubic',
            'crop_pct': config['eval_crop_fraction'],
            'crop_mode': 'center',
            'mean': mean,
            'std': std,
            'num_classes': 0,
            'first_conv': 'stem.conv',
            'classifier': 'head.fc',
            'license': 'apache-2.0',
        },
    }


def _accuracies(checkpoint: checkpointing.Checkpoint) -> dict[str, str]:
    """Returns the accuracies that the summaries of the workdir give for this very checkpoint, in percent."""
    found = {}
    path = pathlib.Path(checkpoint.path)
    for summary in map(files.read_json, sorted(path.parents[1].glob('summary.*.json'))):
        measured = os.path.basename(str(summary.get('checkpoint', ''))) == path.name
        if not measured and (summary.get('mode'), summary.get('steps')) != ('pretrain', checkpoint.step + 1):
            continue
        split = summary.get('eval_split')
        for measure, words in summaries.MEASURES.items():
            if (value := summary.get(f'{split}/{measure}_top1')) is not None:
                note = '' if split == 'test' else f' ({split} set)'
                found[words.format(rule=summary.get('variant', 'BYOL')) + note] = f'{100 * value:.1f}'
    return found


def check_push(repository: str) -> Any:
    """Returns the module huggingface_hub.

    Raises:
      UserError: it is not installed, or the hub allows no such name.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]{1,96}', repository, re.ASCII) or re.search(r'--|\.\.|\.git$', repository):
        raise UserError(f'--push={repository}: expected USER/NAME, of letters, digits, -, _ and . alone')
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"--push={repository}: {error}; pip install huggingface_hub, or 'byol_func[hub]'") from error
    return huggingface_hub


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to the hub with the user's own login, and returns its address there.

    Raises:
      UserError: the hub refuses it or cannot be reached.
    """
    hub = check_push(repository)
    try:
        hub.create_repo(repository, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # An error of the hub, of the network or of a bad name.
        reason = ' '.join(str(error).split())[:200].rstrip('.')
        raise UserError(f'--push={repository}: {reason}; {folder} is complete') from error

"""Shows why a narrow encoder dies on small images: `python -m benchmarks.dead_encoder --root=DIR`.

Pre-trains TinyResNet, whose embedding has eight features, on 1,000 images of a folder (32 px, batch 64, six epochs)
with different optimisers and stems. After some steps it prints the share of embeddings that are all zeros, and the
mean of the offsets that the batch normalisations add before the last ReLU.
"""

import torch
from absl import app, flags

from byol_func import byol_experiment, eval_experiment
from byol_func.evaluation import embedding_health
from byol_func.runtime import compilation
from byol_func.utils import augmentations, dataset
from configs import folder

_ROOT = flags.DEFINE_string('root', None, 'A folder with train/CLASS/* and test/CLASS/*.', required=True)
_IMAGES = flags.DEFINE_integer('images', 1000, 'Training images, the same number of each of the first five classes.')
_SHOWN = (5, 20, 50)


def train(data: dataset.Dataset, stem: str, optimizer: str, base_learning_rate: float) -> None:
    """Pre-trains one encoder and prints a line after some of the steps."""
    config = folder.get_config()
    config.update(dict(batch_size=64, image_size=32, num_epochs=6, optimizer=optimizer, precision='float32'))
    config.lr_schedule.update(dict(base_learning_rate=base_learning_rate, warmup_epochs=1.0))
    config.network.encoder_class = 'TinyResNet'
    config.network.encoder_config.stem = stem
    experiment = byol_experiment.make(config, num_examples=data.num_examples, num_classes=5, image_shape=(3, 32, 32))
    network = {name: config.network.to_dict()[name] for name in ('encoder_class', 'encoder_config', 'bn_config')}
    backbone = eval_experiment.make_backbone(**network)
    update = compilation.compile_update(experiment.update, compiled=False)
    images = augmentations.center_crop(data.images, 32, 1.0)
    state = experiment.init()

    print(f'\nstem {stem}, {optimizer}, base rate {base_learning_rate}')
    for step in range(experiment.max_steps):
        batch = dataset.train_batch(data, step, seed=1, batch_size=64)
        state, logs = update(
            state, torch.tensor(step), experiment.sample(step), {key: batch[key] for key in ('images', 'labels')}
        )
        if step in (*_SHOWN, experiment.max_steps - 1):
            params, moments = ({'encoder': tree['encoder']} for tree in (state.online_params, state.online_state))
            with torch.no_grad():
                embeddings, _ = backbone.apply(params, moments, images, is_training=False)
            found = embedding_health.measure(embeddings)
            last = params['encoder']['block_group_3']['block_0']
            offset = float((last['batchnorm_1']['offset'] + last['shortcut_batchnorm']['offset']).mean())
            print(
                f'step {step:3d}: loss {float(logs["repr_loss"]):.2f}, all zeros {found.zero_rows:4.0%}, '
                f'offsets before the last ReLU {offset:+.2f}',
                flush=True,
            )


def main(argv: list[str]) -> None:
    del argv
    options = dict(source_size=32, grayscale=False, max_gib=4.0, max_bad_fraction=0.0, num_workers=0, cache_dir='')
    data = dataset.load('train', name='folder', root=_ROOT.value, **options)
    chosen = [(data.labels == label).nonzero()[: _IMAGES.value // 5, 0] for label in range(5)]
    data = data.take(torch.cat(chosen))
    train(data, 'imagenet', 'lars', 2.0)
    train(data, 'imagenet', 'lars', 0.2)
    train(data, 'imagenet', 'adam', 2e-3)
    train(data, 'cifar', 'lars', 2.0)


if __name__ == '__main__':
    app.run(main)

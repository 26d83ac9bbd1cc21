"""Runs the official JAX code of BYOL, unchanged and from a user's checkout, on current JAX.

This module adds what the code needs: names that JAX has since removed, and stand-ins for the packages of
its input pipeline, which is not used.
"""

import copy
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import types
import warnings
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # Must be set before JAX is imported.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from byol_func.bridge import haiku  # noqa: E402
from byol_func.errors import one_of  # noqa: E402

warnings.filterwarnings('ignore', module='jax')  # Deprecation warnings.

_PIPELINE = (
    'tensorflow',
    'tensorflow.compat',
    'tensorflow.compat.v2',
    'tensorflow_datasets',
    'acme',
    'acme.jax',
    'acme.jax.utils',
)


class _StandIn(types.ModuleType):
    """A module that has every attribute, each of which does nothing; this is enough for annotations."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return _StandIn(f'{self.__name__}.{name}')

    __path__: list[str] = []


def restore_old_jax() -> None:
    """Restores the JAX functions that the official code uses, with their meaning of 2020."""
    new_cond = jax.lax.cond

    def cond(pred, *args, **kwargs):
        # cond(pred, true_operand, true_fun, false_operand, false_fun)
        if len(args) == 4 and callable(args[1]) and callable(args[3]):
            true_operand, true_fun, false_operand, false_fun = args
            return new_cond(pred, lambda: true_fun(true_operand), lambda: false_fun(false_operand))
        return new_cond(pred, *args, **kwargs)

    jax.lax.cond = cond
    old = {
        'tree_map': jax.tree.map,
        'host_id': jax.process_index,
        'device_put_sharded': lambda shards, devices: jnp.stack(shards),
    }
    for name, function in old.items():
        try:
            getattr(jax, name)
        except AttributeError:
            setattr(jax, name, function)


def add_checkout(directory: str) -> None:
    """Makes `import byol` find the official package in a checkout of deepmind-research.

    Raises:
      FileNotFoundError: the checkout has no byol/byol_experiment.py.
    """
    root = pathlib.Path(directory).expanduser()
    if not (root / 'byol' / 'byol_experiment.py').is_file():
        raise FileNotFoundError(
            f'--official={directory}: expected a checkout of github.com/google-deepmind/deepmind-research, '
            'with byol/byol_experiment.py in it'
        )
    sys.path.insert(0, str(root))
    absent = [name for name in _PIPELINE if not importlib.util.find_spec(name.split('.')[0])]
    sys.modules.update({name: _StandIn(name) for name in absent})
    try:
        for module in ('byol_experiment', 'eval_experiment', 'utils.checkpointing'):
            importlib.import_module(f'byol.{module}')
    finally:
        for name in absent:  # No longer needed; other code must not mistake them for the real packages.
            del sys.modules[name]


def published_config(num_epochs: int, batch_size: int) -> dict[str, Any]:
    """Returns the official config of a pre-training on ImageNet: 40, 100, 300 or 1000 epochs."""
    from byol.configs import byol

    return byol.get_config(num_epochs, batch_size)


def published_evaluation(batch_size: int) -> dict[str, Any]:
    """Returns the official config of a linear evaluation on ImageNet."""
    from byol.configs import eval as evaluation

    return evaluation.get_config('', batch_size)


def images_of_imagenet() -> int:
    """Returns the size of the training set in the official schedules."""
    from byol.utils import dataset

    return dataset.Split.TRAIN_AND_VALID.num_examples


def check_encoder(name: str) -> None:
    """Checks that the official code has an encoder with the given name.

    Raises:
      UserError: it has no such encoder.
    """
    from byol.utils import networks

    torsos = [
        n for n, value in vars(networks).items() if isinstance(value, type) and issubclass(value, networks.ResNetTorso)
    ]
    one_of('--encoder', name, [n for n in torsos if n != 'ResNetTorso'])


class Official:
    """The official experiment on one device, trained on given batches."""

    def __init__(self, config: dict[str, Any], image_size: int):
        from byol import byol_experiment
        from byol.utils import augmentations

        self._augmentations, self._postprocess = augmentations, augmentations.postprocess
        self.config = config
        self._make = lambda: byol_experiment.ByolExperiment(**config)
        augmentations.postprocess = lambda inputs, rng: inputs  # The views are augmented already.
        self.experiment = self._make()
        views = np.zeros((1, config['batch_size'], image_size, image_size, 3), float_type())
        dummy = {'view1': views, 'view2': views, 'labels': np.zeros((1, config['batch_size']), np.int32)}
        init = jax.pmap(self.experiment._make_initial_state, axis_name='i')
        # Even in float64 both sides start from values that a float32 checkpoint can represent.
        self._init = lambda seed: cast(cast(init(jax.random.PRNGKey(seed)[None], dummy), np.float32), float_type())
        self.state = self._init(config['random_seed'])

        def gradient(state, inputs):
            grads, (_, logs) = jax.grad(self.experiment.loss_fn, has_aux=True)(
                *state[:4], jax.random.PRNGKey(0), inputs
            )
            return jax.lax.pmean(grads, axis_name='i'), logs

        self.gradient = jax.pmap(gradient, axis_name='i')

    def with_seed(self, seed: int) -> 'Official':
        """Returns the same experiment with the initial state of another seed."""
        other = copy.copy(self)
        other.state = self._init(seed)
        return other

    def checkpoint(self) -> bytes:
        """Returns the state in the form that the official Checkpointer writes."""
        from byol.utils import checkpointing

        with tempfile.TemporaryDirectory() as directory:
            writer = checkpointing.Checkpointer(
                use_checkpointing=True, checkpoint_dir=directory, save_checkpoint_interval=1, filename='x.pkl'
            )
            writer.maybe_save_checkpoint(cast(self.state, np.float32), step=0, rng=jax.random.PRNGKey(0), is_final=True)
            return pathlib.Path(directory, 'x.pkl').read_bytes()

    def step(self, step: int, inputs: dict[str, np.ndarray]) -> dict[str, float]:
        """Does one official update and returns its logs."""
        self.state, logs = self.experiment.update_pmap(
            self.state, global_step=np.array([step]), rng=jax.random.PRNGKey(step)[None], inputs=stack(inputs)
        )
        return {name: float(value[0]) for name, value in logs.items()}

    def trees(self, inputs: dict[str, np.ndarray] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Returns every tree of the state with our names and layouts, and the gradients if inputs are given."""
        state = self.state
        momentum = next(s.mu for s in state.opt_state if hasattr(s, 'mu'))
        trees = {**{name: getattr(state, name) for name in state._fields[:4]}, 'momentum': momentum}
        if inputs is not None:
            trees['gradients'] = self.gradient(state, stack(inputs))[0]
        return {name: to_ours(tree) for name, tree in trees.items()}

    def augmented_step(self, batch: dict[str, np.ndarray]):
        """Returns a function, for timing, that does an update including the official augmentations."""
        self._augmentations.postprocess = self._postprocess
        update = self._make().update_pmap
        inputs, state = jax.device_put(stack(batch)), self.state

        def run():
            nonlocal state
            rng = jax.random.PRNGKey(0)[None]
            state, logs = update(state, global_step=np.array([0]), rng=rng, inputs=inputs)
            jax.block_until_ready((state, logs))

        return run

    def plain_step(self, batch: dict[str, np.ndarray]):
        """Returns a function, for timing, that does an update on views that are augmented already."""
        inputs, state = jax.device_put(stack(batch)), self.state

        def run():
            nonlocal state
            rng = jax.random.PRNGKey(0)[None]
            state, logs = self.experiment.update_pmap(state, global_step=np.array([0]), rng=rng, inputs=inputs)
            jax.block_until_ready((state, logs))

        return run


def float_type():
    """Returns the dtype of the comparison."""
    return np.float64 if jax.config.jax_enable_x64 else np.float32


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def stack(inputs):
    """Adds the leading device axis, of length 1."""
    return {name: value[None] for name, value in inputs.items()}


def to_ours(tree) -> dict[str, torch.Tensor]:
    """Returns the leaves of an official tree with our names and in our layouts."""
    leaves = {
        haiku.plain_name(module, leaf): np.array(value[0])
        for module, of_module in tree.items()
        for leaf, value in of_module.items()
    }
    (root,) = {name.split('/')[0] for name in leaves} - set(haiku.HEADS)
    renamed = {haiku.our_name(name, root): value for name, value in leaves.items()}
    return {name: haiku.to_ours(name, value) for name, value in renamed.items()}


@functools.partial(jax.jit, static_argnames=('presets',))
def _augment(images, draws, presets):
    from byol.utils import augmentations as official

    blur_divider, threshold = presets

    def one(image, d):
        image = jnp.where(d['flip'], jnp.fliplr(image), image)
        rgb = tuple(image[..., c] for c in range(3))
        hsv = lambda x, change: official.hsv_to_rgb(*change(*official.rgb_to_hsv(*x)))
        operations = (
            lambda x: tuple(official.adjust_brightness(x, d['brightness'])),
            lambda x: tuple(official.adjust_contrast(x, d['contrast'])),
            lambda x: hsv(x, lambda *p: official.adjust_saturation(*p, d['saturation'])),
            lambda x: hsv(x, lambda *p: official.adjust_hue(*p, d['hue'])),
        )
        for j in range(4):
            done = jax.lax.switch(d['order'][j], operations, rgb)
            rgb = tuple(
                jnp.where(d['jitter'], jnp.clip(new, 0.0, 1.0), old) for new, old in zip(done, rgb, strict=False)
            )
        image = jnp.stack(rgb, axis=-1)
        image = jnp.clip(jnp.where(d['grayscale'], official._to_grayscale(image), image), 0.0, 1.0)
        blurred = official._gaussian_blur_single_image(image, image.shape[0] / blur_divider, 'SAME', d['sigma'])
        image = jnp.where(d['blur'], blurred, image)
        image = jnp.where(d['solarize'], jnp.where(image < threshold, image, 1.0 - image), image)
        return jnp.clip(image, 0.0, 1.0)

    return jax.vmap(one)(images, draws)


def augment(images: np.ndarray, draws: dict[str, np.ndarray], presets: dict[str, Any]) -> np.ndarray:
    """Applies the official operators, in the official order, to each image with our random draws.

    Args:
      images: crops `[B, H, W, 3]` in 0..1.
      draws: the fields of `ViewDraws`.
      presets: the augmentation settings of the view.
    """
    static = presets['gaussian_blur']['blur_divider'], presets['solarize']['threshold']
    return np.array(_augment(images, {k: v for k, v in draws.items() if k != 'crop'}, static))


def versions() -> dict[str, str]:
    """Returns the versions of the libraries on the official side."""
    import haiku as hk
    import optax

    return {'jax': jax.__version__, 'dm-haiku': hk.__version__, 'optax': optax.__version__}

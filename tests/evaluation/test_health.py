"""Numbers of a panel on inputs whose answers are known, and against the step that it looks at."""

import math

import optree
import pytest
import torch

from byol_func import byol_experiment
from byol_func.evaluation import health
from byol_func.experiment import assemble
from byol_func.utils import dataset
from configs import digits


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_orthogonal_embeddings_have_full_rank():
    assert health.effective_rank(3.0 * torch.eye(7)).item() == pytest.approx(7.0)
    orthogonal = torch.linalg.qr(_noise(20, 6)).Q
    assert health.effective_rank(orthogonal).item() == pytest.approx(6.0)
    assert health.effective_rank(orthogonal.T).item() == pytest.approx(6.0)


def test_rank_of_singular_values_is_the_exponential_of_their_entropy():
    left, right = torch.linalg.qr(_noise(9, 3)).Q, torch.linalg.qr(_noise(5, 3)).Q
    embeddings = left * torch.tensor([4.0, 2.0, 2.0]) @ right.T
    # p = 1/2, 1/4, 1/4: an entropy of 1.5 bits.
    assert health.effective_rank(embeddings).item() == pytest.approx(2.0**1.5)


@pytest.mark.parametrize(
    'embeddings',
    [torch.ones(8, 4), torch.outer(torch.arange(8.0), torch.ones(4)), torch.zeros(8, 4)],
    ids=['constant', 'on a line', 'zeros'],
)
def test_embeddings_on_a_line_have_rank_one(embeddings):
    assert health.effective_rank(embeddings).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize('number', [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_have_no_rank(number):
    embeddings = torch.ones(8, 4)
    embeddings[3, 2] = number
    assert health.effective_rank(embeddings).isnan()


def test_spread_of_projections():
    assert health.projection_std(_noise(4000, 16)).item() == pytest.approx(1 / 4, rel=0.01)
    # Lengths do not matter; only directions do.
    assert health.projection_std(torch.outer(torch.arange(1.0, 9.0), torch.ones(4))).item() < 1e-6
    opposite = torch.cat([torch.ones(5, 4), -torch.ones(5, 4)])
    assert health.projection_std(opposite).item() == pytest.approx(1 / 2)


def test_cosine():
    x = _noise(10, 4)
    assert health.cosine(x, 3 * x).item() == pytest.approx(1.0)
    assert health.cosine(x, -x).item() == pytest.approx(-1.0)
    assert health.cosine(torch.eye(4)[:2], torch.eye(4)[2:]).item() == pytest.approx(0.0)


def test_norms_are_those_of_the_modules():
    tree = {
        'encoder': {
            'initial_conv': {'w': torch.full((4,), 1.0)},
            'block_group_0': {'block_0': {'a': {'w': torch.tensor([3.0])}, 'b': {'w': torch.tensor([4.0])}}},
        },
        'projector': {'linear': {'w': torch.ones(2, 2), 'b': torch.zeros(2)}},
    }
    norms = {name: value.item() for name, value in health.module_norms(tree).items()}
    assert norms == pytest.approx(
        {'encoder/initial_conv': 2.0, 'encoder/block_group_0': 5.0, 'projector': 2.0, 'all': math.sqrt(33)}
    )


@pytest.fixture(scope='module')
def step():
    """An experiment on the digits, and everything about its third step."""
    config = digits.get_config()
    config.batch_size, config.network.encoder_class = 16, 'TinyResNet'
    config.network.encoder_config.width_multiplier = 1.0
    config.lr_schedule.warmup_epochs = 0.0
    data, _ = dataset.load_train_and_test(**config.dataset)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.image_shape
    )
    state = experiment.init()
    for i in range(3):
        arguments = (torch.tensor(i), experiment.sample(i), dataset.train_batch(data, i, seed=0, batch_size=16))
        before, (state, logs) = state, experiment.update(state, *arguments)
    return experiment, before, arguments, state, logs


def test_the_panel_tells_the_numbers_of_the_step(step):
    experiment, before, arguments, after, logs = step
    copy = optree.tree_map(torch.clone, before)
    panel = health.panel(experiment, before, *arguments)
    for x, y in zip(optree.tree_leaves(copy), optree.tree_leaves(before), strict=True):
        assert torch.equal(x, y)
    for name in ('loss', 'tau', 'learning_rate'):
        assert torch.equal(panel[name], logs[name]), name
    # Two directions, each 2 - 2 cos.
    assert panel['cosine'].item() == pytest.approx(1 - logs['repr_loss'].item() / 4, abs=1e-5)
    change = optree.tree_map(torch.sub, after.online_params, before.online_params)
    for kind, tree in (('update', change), ('param', before.online_params)):
        for name, norm in health.module_norms(tree).items():
            assert panel[f'{kind}_norm/{name}'].item() == pytest.approx(norm.item(), rel=1e-6), (kind, name)
    assert {'encoder/block_group_3', 'projector', 'predictor', 'classifier', 'all'} <= set(
        name.removeprefix('grad_norm/') for name in panel
    )
    assert panel['effective_rank_limit'] == 8 and 1 < panel['effective_rank'] <= 8
    assert panel['projection_spread'].item() == pytest.approx(8 * panel['projection_std'].item())


def test_a_panel_of_parameters_that_are_not_finite(step):
    """It is no error: whether a run goes on is not for the panel to say."""
    experiment, before, arguments, *_ = step
    broken = before._replace(online_params=optree.tree_map(lambda x: x * math.nan, before.online_params))
    panel = health.panel(experiment, broken, *arguments)
    assert all(panel[name].isnan() for name in ('loss', 'effective_rank', 'projection_spread', 'grad_norm/all'))
    assert health.collapse_sign({name: value.item() for name, value in panel.items()}) is None


def test_gradient_norms(step):
    """Where one number moves, the loss changes by the gradient: the classifier, by differences."""
    experiment, before, arguments, *_ = step
    before = optree.tree_map(torch.clone, before)
    panel = health.panel(experiment, before, *arguments)
    loss_fn = assemble(experiment.parts).loss_fn
    square = 0.0
    for leaf in before.online_params['classifier'].values():
        for i in range(leaf.numel()):  # 8 x 10 weights and 10 biases.
            losses = []
            for shift in (1e-2, -1e-2):
                leaf.view(-1)[i] += shift
                losses.append(loss_fn(*before[:4], *arguments[1:])[1][1]['classif_loss'].item())
                leaf.view(-1)[i] -= shift
            square += ((losses[0] - losses[1]) / 2e-2) ** 2
    assert panel['grad_norm/classifier'].item() == pytest.approx(math.sqrt(square), rel=1e-3)


def test_signs_of_a_collapse():
    healthy = {'projection_spread': 0.8, 'effective_rank': 25.0}
    assert health.collapse_sign(healthy) is None
    sign = health.collapse_sign(healthy | {'projection_spread': 0.01})
    assert sign == ('projection_spread', 0.01, 0.1)
    assert health.collapse_sign(healthy | {'effective_rank': 1.02}).measure == 'effective_rank'
    # Out of it takes more than into it.
    between = healthy | {'projection_spread': 0.15}
    assert health.collapse_sign(between) is None
    assert health.collapse_sign(between, already=True).threshold == 0.2

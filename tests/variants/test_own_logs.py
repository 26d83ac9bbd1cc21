"""What a rule logs besides its loss: `repr_loss_fn` returns (loss, logs)."""

import json

import optree
import pytest
import torch

from byol_func import byol_experiment
from byol_func.console import Progress
from byol_func.modes import config_checks, running
from byol_func.report import curves, plots
from byol_func.tracking import tail
from byol_func.utils import dataset, optimizers
from byol_func.workdir.run import Run
from cli import ROOT
from configs import byol as byol_config
from variant_runs import arguments, data, load_config, make

TERMS = {'variant/invariance', 'variant/variance', 'variant/covariance'}


@pytest.mark.parametrize('num_classes', [0, 4])
def test_they_are_in_the_logs_of_the_step_and_change_no_number(num_classes):
    plain = make(load_config(ROOT / 'configs/variants/asymmetric.py')).parts._replace(num_classes=num_classes)
    loss_fn = plain.repr_loss_fn
    logging = plain._replace(
        repr_loss_fn=lambda *outputs: (loss_fn(*outputs), {'size': outputs[0]['projection_view1'].norm()})
    )
    for grad in (torch.func.grad, optimizers.multi_steps(2)):
        (state, logs), (same, more) = (
            experiment.update(experiment.init(), *arguments(experiment, 0))
            for experiment in (byol_experiment.make_experiment(parts._replace(grad=grad)) for parts in (plain, logging))
        )
        assert more.pop('variant/size') > 0 and more == logs
        assert all(map(torch.equal, optree.tree_leaves(state), optree.tree_leaves(same)))


def test_they_reach_console_metrics_tracking_and_curves(tmp_path, monkeypatch):
    config = load_config(ROOT / 'configs/variants/vicreg.py', num_epochs=2)
    config_checks.check_variant(config, byol_config.get_config())
    shown = []
    monkeypatch.setattr(Progress, 'update', lambda self, count, rate, numbers=None: shown.append(numbers))
    monkeypatch.setattr(dataset, 'load_train_and_test', lambda **kwargs: data())
    running.run_mode('pretrain', Run(config, str(tmp_path), torch.device('cpu'), None, 0.0))
    assert {'loss', 'invariance', 'variance', 'covariance'} <= shown[0].keys()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines[0].keys() >= TERMS
    sent = tail.MetricsTail(tmp_path / 'metrics.jsonl', ['pretrain']).read()
    assert {f'pretrain/{name}' for name in TERMS} <= sent[0].scalars.keys()

    drawn = []
    monkeypatch.setattr(
        plots, 'curves', lambda path, panels, title, values: drawn.extend(panel.title for panel in panels)
    )
    curves.draw_curves(tmp_path / 'curves.png', {'': [curves.read_metrics(tmp_path)['pretrain']]}, 'title')
    assert drawn[-3:] == ['covariance', 'invariance', 'variance']

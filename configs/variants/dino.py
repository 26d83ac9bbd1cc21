"""DINO's loss: cross entropy with a centred and sharpened target, without a predictor.

Equation:  H(softmax((z' - c) / tau_t), softmax(z / tau_s)) in both directions; c <- m c + (1 - m) mean(z').
Paper:     DINO (arXiv 2104.14294), section 3.1; table 2: 75.3 % on ImageNet with a ResNet-50 and multi-crop.
Command:   python launch.py --config=configs/variants/dino.py
Here:      digits, 8 epochs, one seed: 85.9 % linear, 74.1 % k-NN, spread 0.28 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).

The dimensions of the projection serve as the outputs of DINO's head; there is no normalised last layer. The centre and
both temperatures are those of the authors' code.
"""

import torch

from byol_func.runtime import collectives
from byol_func.utils.networks import Network
from configs import variants

VIEWS = ('view1', 'view2')


def variant(parts, *, student_temperature=0.1, teacher_temperature=0.04, center_momentum=0.9):
    """Keeps the centre as a moving average in the target network's state; no gradient flows through it."""
    target = parts.target_forward

    def init(generator):
        params, state = target.init(generator)
        return params, {**state, 'center': torch.zeros(target.output_size)}

    def apply(params, state, inputs, is_training):
        outputs, new_state = target.apply(params, state, inputs, is_training)
        mean = collectives.pmean(torch.cat([outputs[f'projection_{view}'] for view in VIEWS]).mean(dim=0).detach())
        center = center_momentum * state['center'] + (1 - center_momentum) * mean
        return {**outputs, 'center': state['center']}, {**new_state, 'center': center}

    def repr_loss_fn(online_out, target_out):
        student = {v: torch.log_softmax(online_out[f'projection_{v}'] / student_temperature, dim=1) for v in VIEWS}
        centred = {v: target_out[f'projection_{v}'].detach() - target_out['center'] for v in VIEWS}
        teacher = {v: torch.softmax(centred[v] / teacher_temperature, dim=1) for v in VIEWS}
        there, back = teacher['view2'] * student['view1'], teacher['view1'] * student['view2']
        return -(there + back).sum(dim=1).mean() / 2

    return parts._replace(target_forward=Network(init, apply, target.output_size), repr_loss_fn=repr_loss_fn)


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule, without a predictor."""
    return variants.config_of(variant, base, network__predictor_depth=0)

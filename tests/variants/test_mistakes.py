"""Mistakes in the file of an update rule: one line each, and nothing is written."""

import pytest

from byol_func import byol_experiment
from byol_func.errors import UserError
from byol_func.experiment import assemble
from byol_func.modes import config_checks, update_rules
from byol_func.utils import variants
from configs import byol as byol_config
from configs import variants as gallery
from variant_runs import data, load_config, make

HEAD = 'from configs import variants\n'
TAIL = "\ndef get_config(base='digits'):\n    return variants.config_of(variant, base)\n"


def _write(tmp_path, body):
    path = tmp_path / 'mine.py'
    path.write_text(HEAD + body + TAIL)
    return path


@pytest.mark.parametrize(
    'body, message',
    [
        ('def variant(parts):\n    return 1', 'variant() returned int, expected parts._replace'),
        ('def variant(parts):\n    raise KeyError("oops")', "line 3: KeyError: 'oops'"),
        ('def variant(parts):\n    return parts._replace(target=1)', 'line 3: '),
        (
            'def variant(parts):\n    return parts._replace(loss_fn=lambda *args, forwrad: 0)',
            'loss_fn(..., *, forwrad): no such part; did you mean forward?',
        ),
        (
            'def variant(parts):\n    return parts._replace(repr_loss_fn=lambda online, target: online["prediction"])',
            "KeyError: 'prediction'",
        ),
        (
            'def variant(parts):\n'
            '    return parts._replace(repr_loss_fn=lambda o, t: (o["prediction_view1"].sum(), {"a": 1.0}))',
            "repr_loss_fn returned float as its log 'a'; expected a 0-d tensor",
        ),
        (
            'def variant(parts):\n    def loss(o, t):\n        z = o["projection_view1"]\n'
            '        return z.sum(), {"a": z[0]}\n    return parts._replace(repr_loss_fn=loss)',
            "repr_loss_fn returned [8] as its log 'a'; expected a 0-d tensor",
        ),
        (
            'def variant(parts):\n    return parts._replace(update_fn=lambda state, *args: (state[:2], {}))',
            'returned a state of another structure',
        ),
        (
            'def variant(parts):\n    def update_fn(state, *args):\n'
            '        return state._replace(target_params=state.target_state, target_state=state.target_params), {}\n'
            '    return parts._replace(update_fn=update_fn)',
            'returned a state of another structure',
        ),
        (
            'def variant(parts):\n'
            '    def init(seed):\n        return {"w": __import__("torch").zeros(3)}\n'
            '    return parts._replace(init_state=init, update_fn=lambda state, *args: (state, {}))',
            "no online_params['encoder']",
        ),
    ],
)
def test_what_the_function_does(tmp_path, body, message):
    with pytest.raises(UserError) as caught:
        config = load_config(_write(tmp_path, body))
        from byol_func.forward import ENCODER_FIELDS, make_backbone

        network = config.network.to_dict()
        backbone = make_backbone(**{name: network[name] for name in ENCODER_FIELDS}, in_channels=1)
        update_rules.check(config.variant, make(config), data()[0].image_shape, backbone)
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text, message',
    [
        ('x = 1', 'has no function variant'),
        ('variant = 3', 'has no function variant'),
        ('def variant(', 'line 1: '),
        ('raise OSError("disk")', 'line 1: OSError: disk'),
        ('def variant(parts, tau): return parts', 'the argument tau of variant()'),
        ('def variant(parts, *, tau): return parts', 'the argument tau of variant()'),
        ('def variant(parts, *, tau=None): return parts', 'the argument tau of variant()'),
        ('def variant(): return 1', 'takes no parts'),
    ],
)
def test_what_the_file_holds(tmp_path, text, message):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    config = load_config(gallery.__path__[0] + '/constant_tau.py')
    config.variant = str(path)
    with pytest.raises(UserError) as caught:
        config_checks.check_variant(config, byol_config.get_config())
    assert message in str(caught.value) and f'config.variant={str(path)!r}' in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match='no such file; expected one like'):
        variants.load('configs/variants/nothing.py')
    with pytest.raises(UserError, match='no such base'):
        gallery.config_of(lambda parts: parts, 'nothing')


def test_a_digest_heeds_code_and_imports_and_no_words(tmp_path):
    (tmp_path / 'helper.py').write_text('x = 1\n')
    path = _write(tmp_path, 'import helper\ndef variant(parts):\n    return parts\n')
    first = variants.digest(str(path))
    path.write_text('"""Words."""\n' + path.read_text().replace('return parts\n', 'return parts  # A comment.\n'))
    assert variants.digest(str(path)) == first
    (tmp_path / 'helper.py').write_text('x = 2\n')
    second = variants.digest(str(path))
    assert variants.edited(first, second) == [variants.stored_path(tmp_path / 'helper.py')]
    path.write_text(path.read_text() + 'y = 2\n')
    assert len(variants.edited(first, variants.digest(str(path)))) == 2


def test_parts_that_ask_for_each_other():
    parts = make(load_config(gallery.__path__[0] + '/constant_tau.py')).parts
    with pytest.raises(UserError, match='ask for each other'):
        assemble(parts._replace(loss_fn=lambda *args, sample: 0, sample=lambda step, *, loss_fn: 0))
    assert isinstance(parts, byol_experiment.Parts)

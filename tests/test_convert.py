import copy
import json

import pytest
import timm
import torch
from networks import images, merges, trained, vary_norms
from timm.models import BasicBlock, ResNet
from timm.models.densenet import DenseBlock
from torch import nn

from timm_awm import convert
from timm_awm.hub import load_folder, save_for_hub
from timm_awm.models import AwmResNet

# one of each kind of timm's networks that is small enough to run
KINDS = [
    'resnet10t', 'resnet18d', 'resnet50_gn', 'seresnext26d_32x4d', 'ecaresnet26t', 'ecaresnet50d_pruned', 'resnetaa34d',
    'resnetblur18', 'resnetrs50', 'test_resnet', 'densenet121', 'densenetblur121d', 'res2net50_14w_8s', 'res2next50',
    'resnest14d', 'resnest50d_4s2x40d', 'skresnet18', 'skresnext50_32x4d',
]
MODULES = ('resnet', 'densenet', 'res2net', 'resnest', 'sknet')


@pytest.fixture(autouse=True)
def exact(unfused):
    """Fused merges round."""


@pytest.mark.parametrize('name', KINDS)
def test_same_function_and_names(name):
    torch.manual_seed(0)
    model = vary_norms(timm.create_model(name)).eval()
    expected = model(images(2, 64))
    names, parameters = list(model.state_dict()), list(model.parameters())
    converted = convert(model)
    assert converted is model
    assert torch.equal(model(images(2, 64)), expected)
    assert [k for k in model.state_dict() if '.merge.' not in k] == names
    kept = {id(p) for p in model.parameters()}
    assert all(id(p) in kept for p in parameters)
    assert not any(m.training for m in model.modules())
    # where weights came from is not known any more
    assert not {'tag', 'url', 'hf_hub_id', 'source'} & model.pretrained_cfg.keys()
    assert not torch.equal(trained(model)(images(2, 64)), expected)


def test_every_network_of_the_two_classes():
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    for name in names:
        depth = dict(block_config=(2,) * 4) if 'densenet' in name else dict(layers=(2,) * 4)  # is quicker
        with torch.device('meta'):
            model = timm.create_model(name, **({} if 'pruned' in name else depth))
        assert type(model).__name__ in ('ResNet', 'DenseNet')
        before = list(model.state_dict())
        convert(model)
        places = [type(m).__name__ for m in model.modules() if type(m).__name__.startswith('Awm')][1:]
        assert len(merges(model)) == len(places) > 0  # a dense block has one at its end, none in its first layer
        assert [k for k in model.state_dict() if '.merge.' not in k] == before
    assert len(names) >= 109


@pytest.mark.parametrize('name', ['seresnet50', 'densenet121', 'res2net50_14w_8s', 'resnest14d', 'skresnet18'])
def test_as_it_stands_in_training(name):
    """Train mode, drop path, double precision, channels-last, frozen parts, hooks."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **({} if name == 'densenet121' else dict(drop_path_rate=0.5)))
    model = vary_norms(model).double().to(memory_format=torch.channels_last)
    model.get_classifier().requires_grad_(False)
    plain = copy.deepcopy(model)
    calls = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(1))
    convert(model)
    assert all(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    x = images(2, 64).double()
    torch.manual_seed(5)
    expected = plain(x)
    expected.square().mean().backward()
    torch.manual_seed(5)
    result = model(x)
    result.square().mean().backward()
    assert torch.equal(result, expected) and calls
    own = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        assert (own[key].grad is None) == (p.grad is None)
        torch.testing.assert_close(own[key].grad, p.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(dict(model.named_buffers())[[*dict(plain.named_buffers())][0]], [*plain.buffers()][0])


class OwnBlock(DenseBlock):
    pass


class OwnResBlock(BasicBlock):
    pass


@pytest.mark.parametrize('make, message', [
    (lambda: timm.create_model('awm_resnet14_cifar'), 'AwmCifarResNet of AwmBasicBlock gets no merges'),
    (lambda: timm.create_model('convnext_atto'), 'ConvNeXt of other blocks gets no merges'),
    (lambda: timm.create_model('resnet18', features_only=True), 'FeatureListNet of BasicBlock gets no merges'),
    (lambda: nn.DataParallel(timm.create_model('resnet18')), 'DataParallel of BasicBlock gets no merges'),
    (lambda: ResNet(OwnResBlock, (1, 1, 1, 1)), 'ResNet of OwnResBlock gets no merges'),
])
def test_what_cannot_be_converted(make, message):
    model = make()
    before = model.state_dict().keys()
    with pytest.raises(TypeError, match=message):
        convert(model)
    assert model.state_dict().keys() == before


def test_failure_leaves_the_model_as_it_was():
    for model in (timm.create_model('resnet10t'), timm.create_model('densenet121')):
        before, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match='positive whole width, got 0'):
            convert(model, awm_hidden=0)
        assert list(model.state_dict()) == before and [type(m) for m in model.modules()] == kinds
    densenet = timm.create_model('densenet121')
    densenet.features.denseblock2.__class__ = OwnBlock
    with pytest.raises(TypeError, match='OwnBlock gets no merges'):
        convert(densenet)
    assert type(densenet.features.denseblock1) is DenseBlock


# those of which a configuration must be told
ARGUMENTS = {
    'seresnet50': {}, 'densenetblur121d': {}, 'resnet18': {}, 'ecaresnet26t': dict(awm_hidden=5),
    'res2net50_14w_8s': {}, 'resnest14d': {}, 'skresnet18': {},
    'resnet10t': dict(in_chans=1, num_classes=3, global_pool='catavgmax', block_args=dict(attn_layer='se')),
    'resnet18d': dict(in_chans=5, output_stride=16, act_layer='silu', block_reduce_first=2),
}


@pytest.mark.parametrize('name', ARGUMENTS)
def test_export_builds_it_again(name, tmp_path):
    args = dict(ARGUMENTS[name])
    hidden = args.pop('awm_hidden', None)
    torch.manual_seed(0)
    model = trained(convert(vary_norms(timm.create_model(name, **args)), hidden)).eval()
    model = model.to(memory_format=torch.channels_last)
    save_for_hub(model, tmp_path / 'out')
    again = load_folder(tmp_path / 'out').eval()
    assert type(again) is type(model)
    x = images(2, 64, args.get('in_chans', 3))
    assert torch.equal(again(x), model.to(memory_format=torch.contiguous_format)(x))
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == (f'awm_{name}' if name.startswith('resnet18') else 'awm_converted')
    assert 'import timm_awm' in config['pretrained_cfg']['description']
    # those of timm's weights are not its own
    assert not {'tag', 'hf_hub_id', 'url', 'license', 'paper_ids'} & config['pretrained_cfg'].keys()
    assert 'import timm_awm' in (tmp_path / 'out' / 'README.md').read_text()


def test_export_of_the_control_of_a_converted_model(tmp_path):
    plain = timm.create_model('awm_converted', base='resnet10t', awm=False)
    save_for_hub(plain, tmp_path / 'plain')
    assert type(load_folder(tmp_path / 'plain')) is ResNet
    save_for_hub(convert(plain), tmp_path / 'converted')
    assert type(load_folder(tmp_path / 'converted')) is AwmResNet


def test_export_of_what_timm_did_not_build(tmp_path):
    model = convert(ResNet(BasicBlock, (1, 1, 1, 1)))
    with pytest.raises(ValueError, match='not created under the name of an AWM model'):
        save_for_hub(model, tmp_path / 'out')
    awm = timm.create_model('awm_resnet18')
    features = timm.create_model('awm_resnet18', features_only=True)
    for other in (timm.create_model('resnet10t'), timm.create_model('convnext_atto'), features, torch.compile(awm)):
        with pytest.raises(ValueError, match='not created under the name of an AWM model'):
            save_for_hub(other, tmp_path / 'out')


def test_awm_converted_is_its_base_with_merges():
    torch.manual_seed(0)
    model = timm.create_model('awm_converted', base='seresnet50.ra2_in1k', num_classes=5)
    torch.manual_seed(0)
    expected = convert(timm.create_model('seresnet50', num_classes=5))
    assert model.eval()(images(2, 64)).shape == (2, 5)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/seresnet50.ra2_in1k'
    assert model.pretrained_cfg['tag'] == 'ra2_in1k_identity'
    plain = timm.create_model('awm_converted', base='seresnet50', awm=False)
    assert type(plain) is ResNet
    for base in ('densenetblur121d', 'seresnet50'):
        features = timm.create_model('awm_converted', base=base, features_only=True).eval()(images(2, 64))
        plain_features = timm.create_model(base, features_only=True).eval()(images(2, 64))
        assert [f.shape for f in features] == [f.shape for f in plain_features]
    for base in ('awm_resnet50', 'no_such_model'):
        with pytest.raises(ValueError, match=f"plain ResNet or DenseNet of timm, not '{base}'"):
            timm.create_model('awm_converted', base=base)
    with pytest.raises(TypeError, match='This ConvNeXt of other blocks gets no merges'):
        timm.create_model('awm_converted', base='convnext_atto')

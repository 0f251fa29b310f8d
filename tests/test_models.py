import copy
import re

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from networks import SMALL, create, images, merges
from safetensors.torch import save_file
from test_layers import reference_lambda
from timm.layers import BlurPool2d, set_reentrant_ckpt
from timm.models import BasicBlock, DenseNet, ResNet
from timm.optim import create_optimizer_v2
from torch.fx.experimental.optimization import optimize_for_inference
from torch.utils.mkldnn import to_mkldnn

from timm_awm import convert
from timm_awm.layers import ConcatMerge, SumMerge, record_mixing_weights
from timm_awm.models import AwmDenseNet, AwmResNet

IMAGENET = timm.list_models('awm_*', exclude_filters=['*_cifar', 'awm_converted'])


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', IMAGENET)
def test_backbone_and_control_have_the_parameters_of_timms_own_model(name):
    with torch.device('meta'):
        plain = timm.create_model(name.removeprefix('awm_'))
        control = timm.create_model(name, awm=False)
        model = timm.create_model(name)
    shapes = {k: v.shape for k, v in plain.state_dict().items()}
    assert {k: v.shape for k, v in control.state_dict().items()} == shapes
    assert {k: v.shape for k, v in model.state_dict().items() if '.merge.' not in k} == shapes
    assert type(control) is type(plain)
    assert [type(m) for m in control.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize('depth, num_merges', [(14, 6), (20, 9), (32, 15), (44, 21), (56, 27), (110, 54)])
def test_number_of_merges_is_the_papers_table_1(depth, num_merges):
    with torch.device('meta'):
        plain, awm = (timm.create_model(f'awm_resnet{depth}_cifar', awm=on) for on in (False, True))
    assert len(merges(awm)) == num_merges
    if depth == 110:  # Table 3 has 1.7 M and 1.78 M
        assert (round(count(plain) / 1e6, 1), round(count(awm) / 1e6, 2)) == (1.7, 1.8)


@pytest.mark.parametrize('layers, per_block', [(22, 3), (28, 4), (34, 5), (40, 6)])
def test_densenet_merges_stand_before_every_layer_with_two_inputs_and_at_block_ends(layers, per_block):
    with torch.device('meta'):
        model = timm.create_model(f'awm_densenet{layers}_cifar')
    paths = [m.mix.num_paths for m in merges(model)]
    assert sorted(paths) == sorted(3 * (list(range(2, per_block + 1)) + [per_block + 1]))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) + 1 == layers


@pytest.mark.usefixtures('unfused')
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', SMALL + ['awm_densenet121'])
def test_identity_start_equals_timms_own_model_bit_for_bit(name, train):
    model = create(name).train(train)
    plain = timm.create_model(name, awm=False) if 'cifar' in name else timm.create_model(name.removeprefix('awm_'))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.merge.' not in k})
    plain.train(train)
    x = images()
    assert torch.equal(model(x), plain(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize('block', ['layer1.1', 'layer2.0'])
@pytest.mark.parametrize('name, last_norm', [('awm_resnet18', 'bn2'), ('awm_resnet26d', 'bn3')])
def test_trained_resnet_block_is_equation_2(name, last_norm, block):
    model = create(name, away=True).double().eval()
    block = model.get_submodule(block)
    seen = {}
    block.get_submodule(last_norm).register_forward_hook(lambda m, args, out: seen.update(branch=out.clone()))
    x = torch.randn(2, block.conv1.in_channels, 8, 8, dtype=torch.float64)
    out = block(x)
    branch, shortcut = seen['branch'], x if block.downsample is None else block.downsample(x)
    weights = reference_lambda(block.merge.mix, [branch, shortcut]).view(2, 2, 1, 1, 1)
    torch.testing.assert_close(out, torch.relu(2 * (weights[:, 0] * branch + weights[:, 1] * shortcut)))
    assert weights.std() > 0.01


def test_trained_dense_block_weighs_raw_maps():
    model = create('awm_densenet22_cifar', away=True).double().eval()
    block = model.features.denseblock2
    x = torch.randn(2, block.denselayer1.conv1.in_channels, 8, 8, dtype=torch.float64)
    maps = [x]

    def merged(merge):
        weights = len(maps) * reference_lambda(merge.mix, maps)
        return torch.cat([weights[:, i].view(-1, 1, 1, 1) * m for i, m in enumerate(maps)], 1)

    for layer in (block.denselayer1, block.denselayer2, block.denselayer3):
        y = x if layer is block.denselayer1 else merged(layer.merge)
        maps.append(layer.conv2(layer.norm2(layer.conv1(layer.norm1(y)))))
    torch.testing.assert_close(block(x), merged(block.merge))


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'awm_densenet22_cifar'])
@pytest.mark.parametrize('awm', [True, False])
def test_cifar_features(name, awm):
    model = create(name, features_only=True, awm=awm)
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    features = model(torch.randn(1, 3, 32, 32))
    assert [f.shape[2:] for f in features] == [(32, 32), (32, 32), (16, 16), (8, 8)]
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    part = create(name, features_only=True, awm=awm, out_indices=(1, 3))
    assert part.feature_info.reduction() == [1, 4]
    assert all(torch.equal(a, b) for a, b in zip(part(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32))[1::2]))


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet18', 'awm_densenet121'])
@pytest.mark.parametrize('feature_cls', ['getter', 'list'])
def test_features_agree_with_forward_features(name, feature_cls):
    model = create(name, away=True).eval()
    features = timm.create_model(name, features_only=True, feature_cls=feature_cls).eval()
    prefix = 'model.' if feature_cls == 'getter' else ''
    features.load_state_dict({
        prefix + (k if prefix else k.replace('features.', 'features_')): v  # timm's list flattens the DenseNet
        for k, v in model.state_dict().items() if not k.startswith(('fc.', 'classifier.'))})
    x = images()
    torch.testing.assert_close(features(x)[-1], model.forward_features(x))


@pytest.mark.parametrize('indices, taps', [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, -1], [0, 3]), ([1], [1])])
def test_cifar_resnet_intermediates(indices, taps):
    model = create('awm_resnet14_cifar', away=True).eval()
    x = images()
    stages = [model.act1(model.bn1(model.conv1(x)))]
    for stage in (model.layer1, model.layer2, model.layer3):
        stages.append(stage(stages[-1]))
    final, intermediates = model.forward_intermediates(x, indices)
    assert torch.equal(final, stages[-1])
    assert len(intermediates) == len(taps)
    assert all(torch.equal(a, stages[i]) for a, i in zip(intermediates, taps))
    early = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(early, intermediates))
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers(indices) == taps
    assert count(pruned) < count(model)
    assert torch.equal(pruned.forward_features(x), stages[taps[-1]])
    assert pruned.num_features == stages[taps[-1]].shape[1]
    with pytest.raises(AssertionError, match='out of range'):
        model.forward_intermediates(x, [4])


@pytest.mark.usefixtures('unfused')
@pytest.mark.parametrize('name, kwargs', [
    ('awm_resnet18', dict(in_chans=1, num_classes=7, drop_rate=0.1, drop_path_rate=0.5, drop_block_rate=0.1)),
    ('awm_resnet18', dict(output_stride=8, global_pool='catavgmax')),
    ('awm_resnet26d', dict(output_stride=16, block_args=dict(attn_layer='se'), aa_layer=BlurPool2d)),
    ('awm_resnet14_cifar', dict(in_chans=1, num_classes=7, drop_path_rate=0.5, drop_block_rate=0.1)),
    ('awm_resnet14_cifar', dict(output_stride=8, global_pool='max', num_classes=0)),
    ('awm_densenet121', dict(in_chans=1, num_classes=7, drop_rate=0.1, proj_drop_rate=0.1, memory_efficient=True)),
    ('awm_densenet22_cifar', dict(in_chans=4, global_pool='avgmax', memory_efficient=True)),
])
def test_arguments_do_what_they_do_in_the_plain_model(name, kwargs):
    model, control = create(name, **kwargs), create(name, awm=False, **kwargs)
    x = images(chans=kwargs.get('in_chans', 3))
    outputs = []
    for m in (model.train(), control.train()):
        torch.manual_seed(2)  # of drop path and dropout
        outputs.append(m(x))
    assert torch.equal(*outputs)
    assert model.feature_info == control.feature_info
    assert merges(model) and not merges(control)


@pytest.mark.parametrize('awm_class, plain_class, args', [
    (AwmResNet, ResNet, dict(block=BasicBlock, layers=(1, 2, 1, 1))),
    (AwmDenseNet, DenseNet, dict(block_config=(2, 2))),
])
def test_a_class_makes_what_convert_makes(awm_class, plain_class, args):
    made, converted = (
        {k: v.shape for k, v in model.state_dict().items()}
        for model in (awm_class(**args, awm_hidden=5), convert(plain_class(**args), 5)))
    assert made == converted and any('.merge.' in k for k in made)


@pytest.mark.parametrize('name', SMALL)
def test_awm_that_only_looks_like_a_bool_is_refused(name):
    with pytest.raises(ValueError, match="either True or False, got 'false'.*--model-kwargs awm=False"):
        create(name, awm='false')  # what timm's parser makes of --model-kwargs awm=false


@pytest.mark.parametrize('awm', [True, False])
@pytest.mark.parametrize(
    'name, norm', [('awm_resnet14_cifar', 'bn2'), ('awm_resnet18', 'bn2'), ('awm_resnet26', 'bn3')])
def test_last_norm_is_not_zero_unless_asked(name, norm, awm):
    def last(**kwargs):
        return getattr(create(name, awm=awm, **kwargs).layer1[0], norm).weight

    assert torch.equal(last(), torch.ones_like(last()))
    assert not last(zero_init_last=True).any()


@pytest.mark.parametrize('name', SMALL)
def test_torchscript(name):
    model = create(name, away=True).double().eval()
    scripted = torch.jit.script(model)
    x = images().double()
    with torch.inference_mode():
        torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet26d'])
def test_export_with_dynamic_batch(name):
    model = create(name, away=True).eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert not any('autocast' in str(node.target) for node in program.graph.nodes)  # none was on
    exported = program.module()
    x = images(batch=5)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet26d'])
def test_onnx(name, tmp_path):
    model = create(name, away=True).eval()
    x = images()
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_merges_survive_timms_feature_graph(name):
    features = create(name, features_only=True, feature_cls='fx')
    optimizer = create_optimizer_v2(features, opt='alternating', lr=.1)
    optimizer.set_epoch(0)
    with record_mixing_weights(features) as lambdas:
        features(images())
    assert lambdas and all(torch.equal(v, torch.full_like(v, 1 / v.shape[1])) for v in lambdas.values())


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet26d'])
def test_symbolic_trace(name):
    """Also of what torch.fx has rewritten, when wrapped functions are wrapped no more."""
    model = create(name, away=True).eval()
    traced = torch.fx.symbolic_trace(model)
    rewritten = torch.fx.Transformer(traced).transform()
    x = images(batch=3)
    with torch.no_grad():
        for other in traced, rewritten, torch.fx.symbolic_trace(rewritten), optimize_for_inference(model):
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(traced).double()(x.double()), model.double()(x.double()))


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar'])
def test_compiles_without_graph_breaks(name):
    """The numbers are those of the eager network, where it is fused."""
    model = create(name, away=True).double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    x = images(dtype=torch.float64)
    outputs = [m(x) for m in (model, compiled)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for p, q in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_resnet26d'])
def test_onednns_own_layout(name):
    model = create(name, away=True).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(to_mkldnn(model)(x.to_mkldnn()).to_dense(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', SMALL)
def test_channels_last_is_kept(name):
    model = create(name, away=True).to(memory_format=torch.channels_last).eval()
    x = images().to(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), create(name, away=True).eval()(images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model = create(name, away=True).eval()
    x = images()
    expected = model(x)
    with torch.autocast('cpu', dtype):
        out = model(x)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() / expected.norm() < 0.1
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet26d'])
def test_activation_checkpointing_keeps_less_and_has_the_same_gradients(name):
    grads, kept = [], []

    def keep(x):
        kept[-1] += x.numel()
        return x

    for checkpointing in (False, True):
        model = create(name, away=True).double()
        model.set_grad_checkpointing(checkpointing)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.9 * kept[0]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('reentrant', [False, True])
def test_dense_merges_learn_under_checkpointing_while_the_backbone_is_frozen(reentrant, request):
    set_reentrant_ckpt(reentrant)
    request.addfinalizer(lambda: set_reentrant_ckpt(False))
    grads = []
    for checkpointing in (False, True):
        model = create('awm_densenet22_cifar', away=True).double()
        for name, p in model.named_parameters():
            p.requires_grad_('.merge.' in name)
        model.set_grad_checkpointing(checkpointing)
        model(images(dtype=torch.float64)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet18', 'awm_densenet121'])
def test_layer_decay_gives_a_merge_the_rate_of_its_block(name):
    model = create(name)
    scales = {}
    for group in create_optimizer_v2(model, opt='sgd', lr=1., layer_decay=0.5).param_groups:
        scales.update({id(p): group['lr_scale'] for p in group['params']})
    assert len(scales) == len(list(model.parameters()))
    for path, merge in model.named_modules():
        if isinstance(merge, (SumMerge, ConcatMerge)):
            block = model.get_submodule(path.rpartition('.')[0])
            inner = [m for m in block.modules() if isinstance(m, nn.Conv2d)][-1]
            assert {scales[id(p)] for p in merge.parameters()} == {scales[id(inner.weight)]}
    assert len(set(scales.values())) > 4


def refused(model, state_dict, message):
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state_dict)


def test_checkpoints_that_do_not_fit():
    model = create('awm_resnet14_cifar')
    other = create('awm_resnet14_cifar', seed=1)
    refused(model, create('awm_resnet18').state_dict(), 'another architecture')
    refused(model, create('awm_resnet14_cifar', num_classes=7).state_dict(), 'have another shape.*fc.bias')
    plain = create('awm_resnet14_cifar', awm=False, seed=1)
    refused(model, plain.state_dict(), 'plain network.*pretrained_cfg_overlay=dict.file=..., num_classes=10')
    damaged = other.state_dict()
    del damaged['layer2.1.merge.mix.weight1']
    refused(model, damaged, '1 are missing .layer2.1.merge.*damaged')
    refused(model, dict(state_dict=other.state_dict(), epoch=3), 'timm.models.load_checkpoint')
    refused(model, {f'module.{k}': v for k, v in other.state_dict().items()}, 'timm.models.load_checkpoint')
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images()), other(images()))


@pytest.mark.usefixtures('unfused')
def test_a_plain_checkpoint_of_ones_own_keeps_its_classifier_as_the_error_says(tmp_path):
    plain = create('awm_resnet14_cifar', awm=False, seed=1, num_classes=3).eval()
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    with pytest.raises(RuntimeError) as refusal:
        create('awm_resnet14_cifar', num_classes=3).load_state_dict(plain.state_dict())
    advice = re.search(r'create_model\(\.\.\., (.*?\))\)', str(refusal.value))[1].replace('file=...', 'file=FILE')
    args = eval(f'dict({advice})', dict(FILE=str(tmp_path / 'plain.safetensors')))
    model = create('awm_resnet14_cifar', num_classes=3, **args).eval()
    assert torch.equal(model(images()), plain(images()))
    fewer = create('awm_resnet14_cifar', num_classes=2, **args).eval()  # with a classifier of its own
    assert torch.equal(fewer.forward_features(images()), plain.forward_features(images()))


@pytest.mark.usefixtures('unfused')
@pytest.mark.parametrize('awm', [True, False])
def test_torchvisions_densenet_checkpoint_loads(awm, tmp_path):
    plain = timm.create_model('densenet121').eval()
    names = {k: re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', k) for k in plain.state_dict()}
    assert 'features.denseblock1.denselayer1.norm.1.weight' in names.values()
    tensors = {k: v for k, v in plain.state_dict().items() if not k.endswith('num_batches_tracked')}
    torch.save({names[k]: v for k, v in tensors.items()}, tmp_path / 'torchvision.pth')
    overlay = dict(file=str(tmp_path / 'torchvision.pth'))
    model = create('awm_densenet121', awm=awm, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(images()), plain(images()))


def test_damaged_checkpoint_is_not_taken_for_a_plain_one(tmp_path):
    damaged = create('awm_resnet14_cifar', away=True).state_dict()
    del damaged['layer1.0.merge.mix.weight2']
    save_file(damaged, tmp_path / 'damaged.safetensors')
    for num_classes in (10, 3):  # timm loads without strict where the classes differ
        with pytest.raises(RuntimeError, match='lacks 1 of the .* tensors'):
            create('awm_resnet14_cifar', pretrained=True, num_classes=num_classes,
                   pretrained_cfg_overlay=dict(file=str(tmp_path / 'damaged.safetensors')))


@pytest.mark.parametrize('name', SMALL)
def test_a_seed_gives_the_plain_control_the_same_weights_and_the_same_random_numbers_after_them(name):
    ours = create(name)
    order = torch.randperm(1000)
    plain = create(name, awm=False)
    assert torch.equal(torch.randperm(1000), order)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in plain.state_dict().items())

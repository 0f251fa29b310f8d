import copy
import gc
import pickle

import onnxruntime
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from networks import trained
from timm.utils import ModelEmaV3
from torch import Tensor

from timm_awm.layers import (
    ConcatMerge,
    MixingWeights,
    SumMerge,
    merge_parameters,
    record_mixing_weights,
)
from timm_awm.layers.mixing import channel_mean, scaled_mixing_weights


def reference_lambda(mix: MixingWeights, maps: list) -> Tensor:
    """Equations 3 and 4 and the normalisation, word by word, in float64."""
    z = torch.cat([x.double().mean(dim=(2, 3)) for x in maps], dim=1)
    sigma = torch.sigmoid(torch.relu(z @ mix.weight1.double().T) @ mix.weight2.double().T)
    return sigma / sigma.sum(1, keepdim=True)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [torch.randn(3, c, 5, 7) for c in (8, 4, 4, 6)]


def test_sum_merge_is_equation_2(maps):
    x, branch = torch.randn(2, 3, 8, 5, 7)
    merge = trained(SumMerge(8, hidden_features=5))
    weights = reference_lambda(merge.mix, [branch, x])
    expected = 2 * (weights[:, 0].view(-1, 1, 1, 1) * branch + weights[:, 1].view(-1, 1, 1, 1) * x)
    torch.testing.assert_close(merge(branch, x), expected.float())
    assert weights.std() > 0.01  # the weights do differ between images


def test_concat_merge_weighs_each_map(maps):
    merge = trained(ConcatMerge([8, 4, 4, 6], hidden_features=5))
    weights = reference_lambda(merge.mix, maps)
    expected = torch.cat([4 * weights[:, i].view(-1, 1, 1, 1) * x for i, x in enumerate(maps)], dim=1)
    torch.testing.assert_close(merge(maps), expected.float())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identity_start_is_the_plain_operation_bit_for_bit(maps, dtype):
    maps = [x.to(dtype) for x in maps]
    assert torch.equal(ConcatMerge([8, 4, 4, 6])(maps), torch.cat(maps, 1))
    assert torch.equal(SumMerge(8)(maps[0], maps[0] + 1), maps[0] + (maps[0] + 1))


@pytest.mark.parametrize('n', range(2, 71))
def test_equal_logits_scale_by_exactly_one(n):
    scales = scaled_mixing_weights(torch.full((2, n), -3.7))
    assert torch.equal(scales, torch.ones(2, n))


def test_mixing_weights_are_finite_for_extreme_logits():
    logits = torch.tensor([[1000., 1000.], [-1000., -1000.], [1000., -1000.], [-1000., 1000.], [-1000., -999.]])
    logits.requires_grad_()
    weights = scaled_mixing_weights(logits) / 2
    e = torch.tensor(1.).exp()
    torch.testing.assert_close(
        weights, torch.tensor([[.5, .5], [.5, .5], [1., 0.], [0., 1.], [1 / (1 + e), e / (1 + e)]]))
    (weights * torch.tensor([1., 2.])).sum().backward()
    assert logits.grad.isfinite().all()


def test_mixing_weights_are_finite_in_onnx_too(tmp_path):
    mix = MixingWeights(2, 2, 1)
    with torch.no_grad():
        mix.weight1.fill_(1)
        mix.weight2.copy_(torch.tensor([[-100.], [-99.]]))
    z = torch.tensor([[1., 0], [.01, 0]])
    torch.onnx.export(mix, (z,), tmp_path / 'mix.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'mix.onnx')
    scales, = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    torch.testing.assert_close(torch.from_numpy(scales), mix(z).detach())


def test_large_float16_maps_stay_finite():
    x = torch.full((1, 4, 32, 32), 30000., dtype=torch.float16)
    torch.testing.assert_close(channel_mean(x), torch.full((1, 4), 30000.))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scripted', [False, True])
def test_weights_are_float32_under_autocast(dtype, scripted):
    torch.manual_seed(0)
    mix = trained(MixingWeights(16, 2, 8))
    run = torch.jit.script(mix) if scripted else mix
    z = torch.randn(4, 16)
    with torch.autocast('cpu', dtype):
        scales = run(z)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, mix(z), rtol=1e-6, atol=1e-6)


def test_low_precision_maps_are_rounded_once():
    """By the plain formula: a merge whose λ are recorded is not fused."""
    torch.manual_seed(0)
    branch, x = torch.randn(2, 4, 8, 5, 5).bfloat16()
    merge, concat = trained(SumMerge(8)), trained(ConcatMerge([8, 8]))
    for m, weigh in ((merge, lambda a, b: a * branch.float() + b * x.float()),
                     (concat, lambda a, b: torch.cat([a * branch.float(), b * x.float()], 1))):
        with record_mixing_weights(m) as lambdas:
            out = m(branch, x) if m is merge else m([branch, x])
        a, b = (2 * lambdas['mix']).view(4, 2, 1, 1, 1).unbind(1)
        exact = weigh(a, b)
        assert ((out.float() - exact).abs() <= 2 ** -8 * exact.abs() + 1e-7).all()  # half a unit in the last place


def test_maps_that_do_not_fit_are_refused():
    x = torch.randn(2, 6, 3, 3)
    with pytest.raises(ValueError, match='Got 4 maps for a merge of 2 paths'):
        ConcatMerge([12, 12])([x] * 4)  # as many channels in all
    for call in (lambda: SumMerge(8)(x, x), lambda: ConcatMerge([8, 8])([x, x])):
        with pytest.raises(ValueError, match='12 channels together, but the merge was made for 16: SumMerge'):
            call()
    for other in (torch.randn(2, 6, 4, 3), torch.randn(1, 6, 3, 3)):
        with pytest.raises(RuntimeError, match='must match'):
            ConcatMerge([6, 6])([x, other])


def test_reset_parameters_returns_to_the_identity():
    mix = trained(MixingWeights(16, 2, 8))
    mix.reset_parameters()
    assert torch.equal(mix(torch.randn(4, 16)), torch.ones(4, 2))
    assert 0.2 < mix.weight1.abs().max() <= 16 ** -.5  # as torch.nn.Linear: uniform up to 1 / sqrt(features)


@pytest.mark.parametrize('make, message', [
    (lambda: MixingWeights(8, 1, 4), 'at least two paths'),
    (lambda: SumMerge(8, hidden_features=0), 'positive whole width'),
    (lambda: SumMerge(8, hidden_features=1.5), 'positive whole width'),
])
def test_impossible_merges_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Net(nn.Module):
    """A network of somebody else's with merges of both kinds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.merge = SumMerge(4)
        self.cat = ConcatMerge([4, 4, 3])

    def forward(self, x):
        branch = self.conv(x)
        y = self.merge(branch, F.relu(branch))
        return self.cat([y, branch, x]).mean((2, 3))


def recorded(model, x):
    with record_mixing_weights(model) as lambdas:
        out = model(x)
    return out, lambdas


def wrapped(kind, net, tmp_path):
    if kind == 'ddp':
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        return nn.parallel.DistributedDataParallel(net)
    if kind == 'ema':
        return ModelEmaV3(net)
    if kind == 'compiled':
        compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
        compiled(torch.randn(2, 3, 8, 8))  # compiled before anybody asks
        return compiled
    return net


@pytest.mark.parametrize('kind', ['itself', 'ddp', 'ema', 'compiled'])
def test_record_mixing_weights(kind, tmp_path):
    torch.manual_seed(0)
    net = trained(Net())
    x = torch.randn(2, 3, 8, 8)
    try:
        model = wrapped(kind, net, tmp_path)
        before = model(x)
        out, lambdas = recorded(model, x)
        assert list(lambdas) == ['merge', 'cat']
        branch = net.conv(x)
        torch.testing.assert_close(lambdas['merge'], reference_lambda(net.merge.mix, [branch, F.relu(branch)]).float())
        assert lambdas['cat'].shape == (2, 3)
        torch.testing.assert_close(lambdas['cat'].sum(1), torch.ones(2))
        torch.testing.assert_close(out, before)
        assert not any(m._forward_hooks for m in model.modules())  # nothing is left behind
    finally:
        if kind == 'ddp':
            torch.distributed.destroy_process_group()


def test_recording_a_plain_model_says_why_not():
    with pytest.raises(ValueError, match='no AWM merge.*awm=False'), record_mixing_weights(nn.Conv2d(3, 4, 1)):
        pass


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_merge_parameters_knows_copies_and_forgets_the_dead(duplicate):
    def known(parameter):
        return any(p is parameter for p in merge_parameters())

    net = duplicate(Net())
    assert known(net.merge.mix.weight1) and known(net.cat.mix.weight2)
    assert not known(net.conv.weight)
    net.to(torch.float64)
    assert known(net.merge.mix.weight1)
    parameter = net.merge.mix.weight1
    del net
    gc.collect()
    assert not known(parameter)


def test_a_merge_prints_its_channels_and_its_width():
    text = str(SumMerge(64))
    assert 'channels=64' in text and 'hidden_features=16' in text

import copy
import io
import json
import re
import sys
import warnings

import datasets
import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from PIL import Image

import timm_awm
from timm_awm import analysis
from timm_awm.analysis import names, ranking
from timm_awm.hub import save_for_hub
from timm_awm.layers import ConcatMerge, MixingWeights, SumMerge
from timm_awm_cli.main import main

RESNET, DENSENET = 'awm_resnet14_cifar', 'awm_densenet22_cifar'
COLORS = dict(blue=(40, 60, 200), green=(40, 190, 60), red=(210, 50, 40))  # in the order of their labels


def trained(name, seed=0, **kwargs):
    """A model whose merges and statistics are not those of the start."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, MixingWeights):
            torch.nn.init.normal_(module.weight2, std=2.)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=.5)
            torch.nn.init.uniform_(module.running_var, .5, 1.5)
    return model


def batches(count=12, size=5, classes=10, seed=1):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=g) + 2 * torch.randn(count, 3, 1, 1, generator=g)
    labels = torch.randint(classes, (count,), generator=g)
    return list(zip(images.split(size), labels.split(size)))


def mix_of(model, merge):
    return model.get_submodule(f'{merge}.mix')


@pytest.mark.parametrize('name, paths', [(RESNET, [2] * 6), (DENSENET, [2, 3, 4] * 3)])
def test_observed_lambdas_are_those_by_hand(name, paths):
    model, data = trained(name), batches()
    seen = analysis.observe(model, data)
    assert [value.shape for value in seen.lambdas.values()] == [(12, n) for n in paths]
    assert torch.equal(seen.labels, torch.cat([labels for _, labels in data]))

    maps = {}
    for merge, module in model.named_modules():
        if isinstance(module, (SumMerge, ConcatMerge)):
            module.register_forward_hook(
                lambda module, args, out, name=merge: maps.update(
                    {name: list(args[0]) if isinstance(module, ConcatMerge) else args}))
    with torch.no_grad():
        logits = model(torch.cat([images for images, _ in data]))
    assert torch.equal(seen.predictions, logits.argmax(1)) and list(maps) == list(seen.lambdas)
    for merge, of_merge in maps.items():
        z = np.concatenate([x.double().numpy().mean((2, 3)) for x in of_merge], axis=1)
        w1, w2 = (w.detach().double().numpy() for w in (mix_of(model, merge).weight1, mix_of(model, merge).weight2))
        sigmoid = 1 / (1 + np.exp(-np.maximum(z @ w1.T, 0) @ w2.T))
        by_hand = sigmoid / sigmoid.sum(1, keepdims=True)
        assert np.abs(seen.lambdas[merge].numpy() - by_hand).max() < 1e-5
    only_lambdas = analysis.collect_mixing_weights(model, [images for images, _ in data])
    torch.testing.assert_close(only_lambdas, seen.lambdas)


def test_nothing_to_look_at():
    model = trained(RESNET)
    for function, *more in ((analysis.observe,), (analysis.ablate, analysis.observe(model, batches()).lambdas)):
        with pytest.raises(ValueError, match='There are no images'):
            function(model, [], *more)


@pytest.mark.parametrize('name', [RESNET, DENSENET])
def test_ablation_is_that_of_weights_set_to_zero(name):
    model = trained(name)
    images = torch.cat([x for x, _ in batches(48, 48)])
    with torch.no_grad():
        model.get_classifier().bias -= model(images).mean(0)  # or it would take all images for one class
        labels = model(images).argmax(1)  # so that whatever is lost shows
    data = list(zip(images.split(30), labels.split(30)))
    lambdas = analysis.observe(model, data).lambdas
    result = analysis.ablate(model, data, lambdas)

    def accuracy_without(*merges):
        changed = copy.deepcopy(model)
        for merge in merges:
            torch.nn.init.zeros_(mix_of(changed, merge).weight2)
        with torch.no_grad():
            return 100 * (changed(images).argmax(1) == labels).double().mean().item()

    merges = list(lambdas)
    alike = copy.deepcopy(model)
    for merge in merges:
        mean = lambdas[merge].mean(0)
        mix_of(alike, merge).forward = lambda z, mean=mean: len(mean) * mean.expand(len(z), -1)
    with torch.no_grad():
        constant = 100 * (alike(images).argmax(1) == labels).double().mean().item()
    assert result.constant == pytest.approx(constant) and result.constant < result.top1 == 100
    assert result.all == pytest.approx(accuracy_without(*merges)) and result.all < 100
    assert result.merges == pytest.approx({merge: accuracy_without(merge) for merge in merges})
    assert len(set(result.merges.values())) > 2  # it matters which


def grouped(images=40, features=3, classes=4, spread=1., seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    return rng.normal(size=(images, features)) + spread * rng.normal(size=(classes, features))[labels], labels


def test_between_class_share_is_that_of_classes_of_unequal_size():
    values, _ = grouped()
    labels = np.repeat([7, 1, 4, 2], [25, 9, 4, 2])
    values += labels[:, None]
    means = np.stack([values[labels == c].mean(0) for c in labels])
    share = ((means - values.mean(0)) ** 2).sum() / ((values - values.mean(0)) ** 2).sum()
    assert analysis.between_class_share(values, labels) == pytest.approx(share, rel=1e-12)
    assert analysis.between_class_share(labels[:, None] ** 2., labels) == pytest.approx(1)
    assert analysis.between_class_share(np.full((40, 2), .1, np.float32), labels) is None


def test_ranking():
    lambdas = dict(a=torch.tensor([[.2, .8], [.6, .4], [.5, .5]]), b=torch.tensor([[.9, .1], [.1, .9], [.1, .9]]))
    order, sums = analysis.rank_images(lambdas)
    assert order.tolist() == [2, 1, 0] and sums == pytest.approx([1.1, .7, .6])
    assert analysis.as_features(lambdas) == pytest.approx(np.array([[.2, .9], [.6, .1], [.5, .1]]))
    with pytest.raises(ValueError, match='more than two paths'):
        analysis.rank_images(dict(a=torch.ones(3, 2) / 2, b=torch.ones(3, 3) / 3))


def test_cumulative_match_is_that_of_mahalanobis_distances():
    """Where LDA keeps one dimension less than there are classes, its distances to class means rank as those do."""
    values, labels = grouped(600, 8, 4, .5)
    values *= np.arange(1, 9)
    train, test = values[:400], values[400:]
    match = analysis.cumulative_match(train, labels[:400], test, labels[400:])
    means = np.stack([train[labels[:400] == c].mean(0) for c in range(4)])
    inverse = np.linalg.inv(np.cov((train - means[labels[:400]]).T))
    deviation = test[:, None] - means
    distances = np.einsum('nci,ij,ncj->nc', deviation, inverse, deviation)
    place = np.argsort(np.argsort(distances, axis=1), axis=1)[np.arange(200), labels[400:]]
    assert match == pytest.approx([100 * (place < k).mean() for k in (1, 2, 3, 4)])
    assert 30 < match[0] < match[1] < 100


def test_cumulative_match_is_not_moved_by_rounding():
    """A feature that is constant but for rounding would, scaled to the variance of the others, tell the classes."""
    values, labels = grouped(200, 2, 3, 0)
    hidden = np.c_[values, 1 + 1e-9 * labels]
    assert analysis.cumulative_match(hidden, labels, hidden, labels)[0] < 60
    with pytest.raises(ValueError, match='no training images of class 3'):
        analysis.cumulative_match(hidden, labels, hidden, labels + 1)


def test_pixels_are_reduced_to_their_principal_components():
    """If images have rank 3, three incremental components are all: distances stay."""
    torch.manual_seed(0)
    images = (torch.randn(34, 3) @ torch.randn(3, 48) + 1).view(34, 3, 4, 4)
    train, test = images[:22].split(10), images[22:].split(8)  # 10, 10 and 2, which are too few to be fitted
    reduced = analysis.reduce_pixels(*([(x, None) for x in part] for part in (train, test)), components=3)
    mean = images[:20].flatten(1).mean(0)
    for got, expected in zip(reduced, (images[:22], images[22:])):
        centered = (expected.flatten(1) - mean).numpy()
        assert got.shape == (len(expected), 3) and got @ got.T == pytest.approx(centered @ centered.T, abs=1e-3)


def test_profiles_of_several_models():
    shallow = {f'layer{i}.0.merge': torch.tensor([[.2, .8], [.4, .6]]) for i in (1, 2, 3)}
    other = {name: 1 - value for name, value in shallow.items()}
    deep = {**shallow, 'layer4.0.merge': torch.tensor([[.5, .5], [.9, .1]])}
    ax, = analysis.plot_profiles(dict(one=shallow, other=other)).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ['layer1.0', 'layer2.0', 'layer3.0']
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [pytest.approx([.3] * 3), pytest.approx([.7] * 3)]
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ['one', 'other']
    figure = analysis.plot_profiles(dict(deep=deep, one=shallow))
    figure.draw_without_rendering()
    ax, = figure.axes
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([.3, .3, .3, .7])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(.2), pytest.approx(.9))
    labels = {tick.get_text() for tick in ax.get_xticklabels()}
    assert {'1', '4'} <= labels and not any('layer' in text for text in labels)  # the models have not the same merges


def test_ablations_are_drawn_as_what_is_lost():
    ablation = analysis.Ablation(90., 80., 70., {'layer1.0.merge': 88., 'layer1.1.merge': 90.5})
    ax, = analysis.plot_ablations(dict(net=ablation)).axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[-2, .5], [-10, -10], [-20, -20]]


def drawn(figure):
    """The texts of a figure, which can be drawn without a warning and within its edges."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figure.savefig(io.BytesIO())
    texts = [text for text in figure.findobj(Text) if re.search('[a-z]', text.get_text())]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text  # not cut off
    return ' '.join(' '.join(text.get_text().replace(r'\$', '$') for text in texts).split())


@pytest.mark.parametrize('name', [
    'price_$5_to_$10', '_run$caf\udce9' + r'\frac{', 'goldfish, Carassius auratus, ' * 5, 'x' * 100])
def test_texts_of_people_are_shown_as_they_are(name):
    lambdas = {f'layer{i}.0.merge': torch.rand(5, 2) for i in range(3)}
    paths = analysis.profile_merges({f'denselayer{i}': torch.rand(5, i + 1) for i in range(1, 4)})
    ablation = analysis.Ablation(90., 80., 70., {'layer1.0.merge': 88.})
    image = np.zeros((8, 8, 3)), f'{name}\n1.000'
    shown = [
        drawn(analysis.plot_profiles({name: lambdas, 'other': lambdas})),
        drawn(analysis.plot_paths({'mean': paths, f'mean of {name}': paths}, name)),
        drawn(analysis.plot_ablations({name: ablation})),
        drawn(analysis.plot_cumulative_matches({name: np.array([1., 2.])})),
        drawn(analysis.plot_contact_sheet({f'{name}: lowest': [image]}))]
    for text in shown:
        assert ''.join(name.replace('\udce9', '?').split()) in ''.join(text.split())


def test_networks_that_have_hardly_moved_show_no_signal():
    noise = 1e-5 * torch.rand(5, 6)
    lambdas = {f'layer{i}.0.merge': torch.stack([.5 + noise[:, i], .5 - noise[:, i]], 1) for i in range(6)}
    figure = analysis.plot_profiles(dict(net=lambdas))
    low, high = figure.axes[0].get_ylim()
    assert 'hardly moved' in drawn(figure) and high - low == pytest.approx(.05)
    assert not figure.axes[0].yaxis.get_offset_text().get_text()
    profiles = analysis.profile_merges(lambdas)
    figure = analysis.plot_paths(dict(mean=profiles), 'net', profiles)
    scales = [image.get_clim() for ax in figure.axes for image in ax.images]
    assert 'hardly moved' in drawn(figure) and scales == [pytest.approx((.95, 1.05)), (0, .05)]
    moved = analysis.plot_paths(dict(mean=analysis.profile_merges(dict(a=torch.tensor([[.9, .05, .05]])))), 'net')
    ax, bar = moved.axes
    assert bar.get_ylim() == pytest.approx((0, 2.7)) and ax.images[0].get_clim() == pytest.approx((-.7, 2.7))
    assert 'hardly moved' not in drawn(moved)


def test_models_of_every_name(tmp_path, monkeypatch):
    folders = [tmp_path / 'net', tmp_path / 'other' / 'net']
    for folder in folders:
        save_for_hub(timm.create_model(RESNET), folder)
    asked = []
    monkeypatch.setattr(names, 'snapshot_download', lambda *args, **kwargs: asked.append((args, kwargs)) or folders[0])
    monkeypatch.chdir(folders[0])
    given = ['.', 'local-dir:../other/net', 'hf-hub:me/net@refs/pr/1', 'hf-hub:me/net', 'awm_resnet50']
    assert names.resolve_models(given, tmp_path) == {
        'net': folders[0], 'net-2': folders[1], 'net@refs-pr-1': folders[0], 'net-3': folders[0],
        'awm_resnet50': 'awm_resnet50'}
    assert [(args, kwargs['revision']) for args, kwargs in asked] == [(('me/net',), 'refs/pr/1'), (('me/net',), None)]
    with pytest.raises(ValueError, match=f'models in it, name one: {folders[0]}'):
        names.resolve_models([str(tmp_path)], tmp_path)


@pytest.mark.parametrize('name', ['awm_resnet5', RESNET, 'no/such/folder', 'local-dir:nowhere'])
def test_models_that_there_are_not(name, tmp_path):
    with pytest.raises(ValueError, match=f'no model {name}, .* A model is'):
        names.resolve_models([name], tmp_path)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Folders of images, and of models; one is a run of train.py."""
    root = tmp_path_factory.mktemp('world')
    rng = np.random.default_rng(0)
    for split, count in dict(train=15, validation=7).items():
        for color, rgb in COLORS.items():
            folder = root / 'data' / split / color
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(rgb, 40, (32, 32, 3)), 0, 255).astype('uint8')
                Image.fromarray(pixels).save(folder / f'{i:02}.png')
    for name, model in dict(
            {RESNET: trained(RESNET, num_classes=3)}, two=trained(RESNET, num_classes=2),
            start=timm.create_model(RESNET), plain=timm.create_model(RESNET, awm=False)).items():
        save_for_hub(model, root / name)
    run = root / DENSENET
    run.mkdir()
    torch.save(dict(epoch=1, state_dict=trained(DENSENET, num_classes=3).state_dict()), run / 'last.pth.tar')
    (run / 'args.yaml').write_text(f'{{model: {DENSENET}, num_classes: 3, val_split: validation}}')
    (run / 'summary.csv').write_text('epoch,eval_top1,eval_top5\n1,50,100\n')
    return root


def analyze(world, output, *args, models=(RESNET,)):
    found = [name if ':' in name else world / name for name in models]
    data = '--data-dir', world / 'data', '--device', 'cpu', '-j', '0', '-b', '16'
    return main([str(arg) for arg in ('analyze', *found, *data, '--output', output, *args)])


@pytest.fixture(scope='module')
def analysed(world):
    assert analyze(world, world / 'out', '--train-split', 'train', models=(RESNET, DENSENET)) == 0
    return world / 'out'


def by_hand(world, name):
    """λ, labels and predictions of the validation images, read without timm."""
    model = trained(name, num_classes=3)
    files = sorted((world / 'data' / 'validation').glob('*/*.png'))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    images = torch.stack([
        (torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 - mean) / std for file in files])
    with torch.no_grad(), timm_awm.record_mixing_weights(model) as lambdas:
        predictions = model(images).argmax(1).numpy()
    labels = np.array([list(COLORS).index(file.parent.name) for file in files])
    return {merge: value.numpy() for merge, value in lambdas.items()}, labels, predictions


def test_what_the_command_leaves(analysed):
    files = sorted(str(path.relative_to(analysed)) for path in analysed.rglob('*') if path.is_file())
    assert files == sorted([
        'summary.json', 'profile.png', 'ablation.png', 'cumulative-match.png',
        *(f'{RESNET}/{name}' for name in ('lambda.npz', 'lambda.json', 'ranking.png')),
        *(f'{DENSENET}/{name}' for name in ('lambda.npz', 'lambda.json', 'profile.png'))])


@pytest.mark.parametrize('name', [RESNET, DENSENET])
def test_numbers_of_the_command(world, analysed, name):
    lambdas, labels, predictions = by_hand(world, name)
    saved = np.load(analysed / name / 'lambda.npz')
    assert saved['label'].tolist() == labels.tolist() and saved['prediction'].tolist() == predictions.tolist()
    assert saved['index'].tolist() == list(range(21)) and set(saved) == {*lambdas, 'label', 'prediction', 'index'}
    for merge, value in lambdas.items():
        assert saved[merge] == pytest.approx(value, abs=1e-5)

    merge = list(lambdas)[-1]
    groups = json.loads((analysed / name / 'lambda.json').read_text())['groups']
    assert [(key, group['images']) for key, group in groups.items()] == [('all', 21), ('0', 7), ('1', 7), ('2', 7)]
    for key, group in groups.items():
        of_group = saved[merge][[key in ('all', str(c)) for c in labels]].astype(float)
        assert group['merges'][merge]['mean'] == pytest.approx(of_group.mean(0), abs=1e-4)
        assert group['merges'][merge]['std'] == pytest.approx(of_group.std(0), abs=1e-4)

    summary = json.loads((analysed / 'summary.json').read_text())['models'][name]
    assert (summary['images'], summary['classes'], summary['merges']) == (21, 3, len(lambdas))
    top1 = pytest.approx(100 * (labels == predictions).mean())
    assert summary['top1'] == top1 and summary['ablation']['top1'] == top1
    assert summary['between_class_share_by_chance'] == 2 / 20
    assert 0.3 < summary['between_class_share'] < 1 and list(summary['between_class_shares']) == list(lambdas)
    match = summary['cumulative_match']
    assert len(match['mixing_weights']) == 3 and match['mixing_weights'][2] == 100
    assert match['pixels'] == [100, 100, 100]  # the colours tell
    if name == DENSENET:
        assert 'lowest' not in summary
        return
    sums = sum(value[:, 0].astype(float) for value in lambdas.values())
    order = np.argsort(sums).tolist()
    assert [entry['index'] for entry in summary['lowest']] == order[:10]  # of 21 images
    assert [entry['index'] for entry in summary['highest']] == order[:-11:-1]
    assert [entry['label'] for entry in summary['lowest']] == [list(COLORS)[labels[i]] for i in order[:10]]
    assert [entry['sum'] for entry in summary['highest']] == pytest.approx(sums[order[:-11:-1]].tolist())


def test_images_drawn_at_random(world, analysed, tmp_path, monkeypatch):
    (world / RESNET / 'lambda.json').unlink(missing_ok=True)
    shown = {}
    monkeypatch.setattr(
        ranking, 'plot_contact_sheet', lambda groups: shown.update(groups) or analysis.plot_contact_sheet(groups))
    assert analyze(world, tmp_path / 'out', '--num-images', 8, '--no-ablation') == 0
    whole, drawn = (np.load(folder / RESNET / 'lambda.npz') for folder in (analysed, tmp_path / 'out'))
    index = drawn['index']
    assert len(set(index.tolist())) == 8 and index.max() > 10  # not the first ones, which are of one class
    assert drawn['label'].tolist() == whole['label'][index].tolist()
    for merge in set(whole) - {'label', 'prediction', 'index'}:
        assert drawn[merge] == pytest.approx(whole[merge][index], abs=1e-5)
    assert not (world / RESNET / 'lambda.json').exists()  # a sample is not worth it

    summary, = json.loads((tmp_path / 'out' / 'summary.json').read_text())['models'].values()
    assert {entry['index'] for entry in summary['lowest'] + summary['highest']} == set(index.tolist())
    files = sorted((world / 'data' / 'validation').glob('*/*.png'))
    for group, listed in zip(shown.values(), (summary['lowest'], summary['highest'])):
        for (image, caption), entry in zip(group, listed):
            assert np.abs(255 * image - np.asarray(Image.open(files[entry['index']]))).max() < 0.01
            assert caption == f'{entry["label"]}\n{entry["sum"]:.3f}'
    assert 'ablation' not in summary and not (tmp_path / 'out' / 'ablation.png').exists()


def test_images_without_classes(world, tmp_path):
    save_for_hub(trained(RESNET, in_chans=1, num_classes=4), tmp_path / 'gray.t3')
    (tmp_path / 'flat').mkdir()
    for i, file in enumerate((world / 'data' / 'train').glob('*/*.png')):
        (tmp_path / 'flat' / f'{i}.png').write_bytes(file.read_bytes())
    source = f'local-dir:{tmp_path / "gray.t3"}'
    assert analyze(world, tmp_path / 'out', '--data-dir', tmp_path / 'flat', models=[source]) == 0
    reference = (tmp_path / 'gray.t3' / 'lambda.json').read_text()  # for who gets the model
    assert reference == (tmp_path / 'out' / 'gray.t3' / 'lambda.json').read_text()
    assert json.loads(reference)['data'] == 'flat, validation' and list(json.loads(reference)['groups']) == ['all']
    assert analyze(world, tmp_path / 'other', '--no-ablation', models=[source]) == 0
    assert (tmp_path / 'gray.t3' / 'lambda.json').read_text() == reference  # that of other data does not replace it
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())['models']['gray.t3']
    assert set(summary) == {'images', 'merges', 'lowest', 'highest'} and summary['lowest'][0]['label'] is None


@pytest.mark.parametrize('model, args, message', [
    ('plain', [], 'plain has no AWM merges'),
    ('start', [], 'start has no AWM merges, or all are at the identity start'),
    ('two', [], 'The model has 2 classes, and the data have others'),
    (RESNET, ['--device', 'nothing'], "Device 'nothing' cannot be used here"),
    (RESNET, ['--dataset', 'torch/nothing'], "The split 'validation' cannot be read (AssertionError: Unknown torch"),
    (RESNET, ['--data-dir', 'nowhere'], 'There is no folder nowhere'),
    (RESNET, ['--data-dir', ''], 'No data are named'),
    (RESNET, ['--split', 'test'], "The split 'test' cannot be read (FileNotFoundError"),  # timm would read all
])
def test_errors_leave_nothing(world, tmp_path, capsys, model, args, message):
    assert analyze(world, tmp_path / 'out', *args, models=[model]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    ([], 'The columns are: img, label.'), (['--input-key', 'img', '--train-split', 'train'], "one of ['validation']")])
def test_columns_of_a_data_set_are_named(world, tmp_path, capsys, args, message):
    folder = tmp_path / 'data'
    folder.mkdir()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=['cat']))
    table = datasets.Dataset.from_dict(dict(img=[Image.new('RGB', (32, 32))], label=[0]), features)
    table.to_parquet(str(folder / 'validation.parquet'))
    data = '--dataset', f'hfds/{folder}', '--data-dir', tmp_path / 'cache'
    assert analyze(world, tmp_path / 'out', *data, *args) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('missing, extra', [('matplotlib.figure', 'analysis'), ('datasets', 'data')])
def test_the_missing_extra_is_named(world, tmp_path, capsys, monkeypatch, missing, extra):
    imported = 'timm_awm.analysis', 'timm.data.readers.reader_hfds'
    for name in [name for name in sys.modules if name.startswith(imported)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(timm_awm, 'analysis')
    monkeypatch.setitem(sys.modules, missing, None)
    assert analyze(world, tmp_path / 'out', '--dataset', 'hfds/nothing') == 1
    assert f'pip install ".[{extra}]"' in capsys.readouterr().err

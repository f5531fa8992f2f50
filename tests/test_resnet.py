"""The ResNet encoder beyond the golden files of test_parity.py: odd sides, variants, batch norm."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SIZES, Bottleneck, Pix2Seq, Pix2SeqConfig, ResNet, build, count_parameters


@pytest.fixture
def resnet_config(tiny_config):
    return replace(tiny_config, encoder="resnet", resnet_width=0.125)


def batch_norms(model):
    return [part for part in model.encoder.resnet.modules() if hasattr(part, "running_mean")]


def scramble(model):
    """Batch norm as after training: no scale is zero, no statistics are trivial."""
    torch.manual_seed(1)
    for norm in batch_norms(model):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.1)
    return model


@pytest.mark.parametrize("size, parameters", [
    ("resnet50", 36_587_768),
    ("resnet50_c4", 84_697_592),
])
def test_named_sizes_have_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        assert count_parameters(Pix2Seq(SIZES[size])) == parameters


@pytest.mark.parametrize("variant, stages, stride", [
    ("standard", 4, 32),
    ("c4", 3, 16),
    ("c3", 2, 8),
    ("dc5", 4, 16),
])
def test_each_variant_has_its_stages_and_stride_also_where_sides_are_odd(
        resnet_config, variant, stages, stride):
    image_size = (67, 33)
    model = Pix2Seq(replace(resnet_config, resnet_variant=variant, image_size=image_size)).eval()
    grid = tuple(math.ceil(side / stride) for side in image_size)
    images = torch.rand(2, 3, *image_size)
    with torch.no_grad():
        context, maps = model.encode(images), model.encoder.resnet(images)
    assert model.encoder.grid == grid
    assert context.shape == (2, math.prod(grid), 32)
    assert [x.shape[1] for x in maps] == [32 << i for i in range(stages)]
    assert tuple(maps[-1].shape[2:]) == grid


@pytest.mark.parametrize("sides", [(8, 8), (7, 8), (8, 7), (7, 7), (1, 2)])
def test_pooling_pads_as_tensorflow_does(sides):
    resnet = ResNet(Pix2SeqConfig(resnet_variant="c4", resnet_width=0.125))
    resnet.stem = nn.ModuleList([nn.Identity()])
    resnet.stages = nn.ModuleList([nn.Identity()])
    x = torch.randn(1, 2, *sides)
    # 'SAME': the odd pixel goes to the end.
    (y0, y1), (x0, x1) = (
        (total // 2, total - total // 2)
        for total in (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in sides))
    expected = F.max_pool2d(F.pad(F.relu(x), (x0, x1, y0, y1)), 3, 2)
    assert torch.equal(resnet(x)[0], expected), f"{resnet(x)[0]}\n{expected}"


def test_a_new_block_passes_its_input_on():
    x = torch.rand(2, 32, 5, 5)
    assert torch.equal(Bottleneck(32, 8)(x), x)


def test_new_convolutions_have_the_variance_of_one_over_their_inputs():
    torch.manual_seed(0)
    config = replace(SIZES["resnet50"], image_size=(64, 64), enc_layers=1, dec_layers=1)
    resnet = Pix2Seq(config).encoder.resnet
    for conv in (resnet.stem[0].conv, resnet.stages[2][1].convs[1].conv):
        std, expected = conv.weight.std().item(), conv.weight[0].numel() ** -0.5
        assert std == pytest.approx(expected, rel=0.03)
        assert conv.weight.abs().max() < 2.3 * expected


def test_training_moves_the_statistics_of_batch_norm(resnet_config):
    model = Pix2Seq(resnet_config).train()
    stem, images = model.encoder.resnet.stem[0], torch.rand(4, 3, 32, 32)
    model.encode(images)
    mean = stem.conv(images).mean((0, 2, 3))
    decayed = 0.1 * mean                                # decay 0.9, from zero
    assert torch.allclose(stem.norm.running_mean, decayed, atol=1e-6)


def test_frozen_batch_norm_stays_as_loaded_and_the_rest_learns(resnet_config):
    model = scramble(Pix2Seq(replace(resnet_config, freeze_bn=True)))
    images = torch.rand(2, 3, 32, 32)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    expected = model.eval().encode(images)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    got = model.train().encode(images)
    assert torch.allclose(got, expected, atol=1e-6), "training normalises by the batch"
    got.square().sum().backward()
    optimizer.step()
    moved = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    norms = {name for name in moved if "resnet" in name and ".norm." in name}
    assert not norms and "encoder.resnet.stem.0.conv.weight" in moved, moved


@pytest.mark.parametrize("freeze", [False, True])
def test_statistics_shared_by_processes_keep_names_weights_and_freezing(resnet_config, freeze):
    model = scramble(Pix2Seq(replace(resnet_config, freeze_bn=freeze)))
    images = torch.rand(2, 3, 32, 32)
    names, trained = list(model.state_dict()), count_parameters(model)
    expected = model.eval().encode(images)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == names and count_parameters(model) == trained
    assert torch.allclose(model.eval().encode(images), expected, atol=1e-6)
    norms = batch_norms(model.train())
    assert len(norms) == 53 and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert all(norm.training != freeze for norm in norms)


def test_channels_last_computes_the_same(resnet_config):
    config = replace(resnet_config, image_size=(48, 32), freeze_bn=True)
    images, tokens, results = torch.rand(2, 3, 48, 32), torch.randint(0, 210, (2, 9)), []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = scramble(Pix2Seq(config)).train().to(memory_format=layout)
        logits = model(images.to(memory_format=layout), tokens)
        logits.square().mean().backward()
        results.append((logits, model.encoder.resnet.stem[0].conv.weight.grad))
    (logits_a, grad_a), (logits_b, grad_b) = results
    assert torch.allclose(logits_a, logits_b, atol=1e-5)
    assert torch.allclose(grad_a, grad_b, atol=1e-5)


@pytest.mark.parametrize("change, words", [
    (dict(resnet_variant="c5"), "standard, c4, dc5, c3"),
    (dict(resnet_depth=18), "50, 101, 152"),
])
def test_an_unknown_resnet_is_refused(resnet_config, change, words):
    with pytest.raises(ValueError, match=words):
        build(replace(resnet_config, **change))

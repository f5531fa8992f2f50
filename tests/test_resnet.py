"""The ResNet encoder beyond what the golden files of test_parity.py fix: odd sides, all variants, batch norm."""
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SIZES, Bottleneck, Pix2Seq, ResNet, count_parameters, resnet_cell


@pytest.fixture
def resnet_config(tiny_config):
    return replace(tiny_config, encoder="resnet", resnet_width=0.125)


def scramble(model):
    """Batch norm as after training: no scale is zero, no statistics are trivial."""
    torch.manual_seed(1)
    for norm in model.encoder.resnet.norms():
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.1)
    return model


@pytest.mark.parametrize("size, parameters", [("resnet50", 36_587_768), ("resnet50_c4", 84_697_592)])
def test_named_sizes_have_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        assert count_parameters(Pix2Seq(SIZES[size])) == parameters


@pytest.mark.parametrize("variant, stages, cell", [("standard", 4, 32), ("c4", 3, 16), ("c3", 2, 8), ("dc5", 4, 16)])
def test_each_variant_has_its_stages_and_cells_also_where_sides_are_odd(resnet_config, variant, stages, cell):
    image_size = (67, 33)
    model = Pix2Seq(replace(resnet_config, resnet_variant=variant, image_size=image_size)).eval()
    grid = tuple(-(-side // cell) for side in image_size)
    with torch.no_grad():
        images = torch.rand(2, 3, *image_size)
        context, maps = model.encode(images, features=True)
        assert torch.equal(context, model.encode(images))
    assert resnet_cell(variant) == cell and model.encoder.grid == grid and context.shape == (2, grid[0] * grid[1], 32)
    assert [m.shape[1] for m in maps] == [32 << i for i in range(stages)] and tuple(maps[-1].shape[2:]) == grid


def test_a_vit_has_no_feature_maps(tiny_model):
    assert tiny_model.encode(torch.rand(1, 3, 32, 32), features=True)[1] == []


@pytest.mark.parametrize("sides", [(8, 8), (7, 8), (8, 7), (7, 7), (1, 2)])
def test_pooling_pads_as_tensorflow_does(sides):
    resnet, seen = ResNet("c4", 50, 0.125), []
    resnet.stem = nn.ModuleList([nn.Identity()])
    resnet.stages = nn.ModuleList([nn.Identity()])
    x = torch.randn(1, 2, *sides)
    total = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in sides]              # 'SAME': the odd pixel goes to the end
    (y0, y1), (x0, x1) = [(t // 2, t - t // 2) for t in total]
    expected = F.max_pool2d(F.pad(F.relu(x), (x0, x1, y0, y1)), 3, 2)
    assert torch.equal(resnet(x)[0], expected), f"{resnet(x)[0]}\n{expected}"


def test_a_new_block_passes_its_input_on():
    x = torch.rand(2, 32, 5, 5)
    assert torch.equal(Bottleneck(32, 8)(x), x)


def test_new_convolutions_have_the_variance_of_one_over_their_inputs():
    torch.manual_seed(0)
    model = Pix2Seq(replace(SIZES["resnet50"], image_size=(64, 64), enc_layers=1, dec_layers=1))
    for conv in (model.encoder.resnet.stem[0].conv, model.encoder.resnet.stages[2][1].convs[1].conv):
        std, expected = conv.weight.std().item(), conv.weight[0].numel() ** -0.5
        assert std == pytest.approx(expected, rel=0.03) and conv.weight.abs().max() < 2.3 * expected


def test_training_moves_the_statistics_of_batch_norm(resnet_config):
    model = Pix2Seq(resnet_config).train()
    norm = model.encoder.resnet.stem[0].norm
    images = torch.rand(4, 3, 32, 32)
    model.encode(images)
    mean = model.encoder.resnet.stem[0].conv(images).mean((0, 2, 3))
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)            # decay 0.9, from zero


def test_frozen_batch_norm_stays_as_loaded_and_the_rest_learns(resnet_config):
    model = scramble(Pix2Seq(replace(resnet_config, freeze_bn=True)))
    images = torch.rand(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model.eval().encode(images)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    got = model.train().encode(images)
    assert torch.allclose(got, expected, atol=1e-6), "training normalises by the batch"
    got.square().sum().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(".norm.running" in k or "resnet" in k and ".norm." in k for k in moved), moved
    assert "encoder.resnet.stem.0.conv.weight" in moved


@pytest.mark.parametrize("freeze", [False, True])
def test_statistics_shared_by_processes_keep_names_weights_and_freezing(resnet_config, freeze):
    model = scramble(Pix2Seq(replace(resnet_config, freeze_bn=freeze)))
    images = torch.rand(2, 3, 32, 32)
    names, expected, trained = list(model.state_dict()), model.eval().encode(images), count_parameters(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == names and torch.allclose(model.eval().encode(images), expected, atol=1e-6)
    norms = model.train().encoder.resnet.norms()
    assert len(norms) == 53 and all(isinstance(n, nn.SyncBatchNorm) and n.training != freeze for n in norms)
    assert count_parameters(model) == trained


def test_channels_last_computes_the_same(resnet_config):
    images, tokens, results = torch.rand(2, 3, 48, 32), torch.randint(0, 210, (2, 9)), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = scramble(Pix2Seq(replace(resnet_config, image_size=(48, 32), freeze_bn=True))).train().to(memory_format=memory_format)
        logits = model(images.to(memory_format=memory_format), tokens)
        logits.square().mean().backward()
        results.append((logits, model.encoder.resnet.stem[0].conv.weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5) and torch.allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("change, words", [(dict(resnet_variant="c5"), "standard, c4, c3, dc5"), (dict(resnet_depth=18), "50, 101, 152")])
def test_an_unknown_resnet_is_refused(resnet_config, change, words):
    with pytest.raises(ValueError, match=words):
        Pix2Seq(replace(resnet_config, **change))

"""Pix2Seq: decoding, sampling, sizes; checkpoints of ours; the device."""
import copy
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import generate_without_cache
from test_parity import FOLDER, Golden, pix2seq_config

import model as m
import train
from model import (
    SIZES,
    Device,
    Pix2Seq,
    count_parameters,
    filter_logits,
    load_reference_weights,
    sample_token,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size, parameters", [("vit_b", 115_169_976), ("vit_l", 341_161_912)])
def test_named_sizes_have_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        assert count_parameters(Pix2Seq(SIZES[size])) == parameters


# --------------------------------------------------------------------------------------------------
# initialisation

def fans(network):
    """{name of a weight: fan_in + fan_out} as the reference, whose attention weights are of shape
    D x heads x size and heads x size x D, and whose RIN cuts patches with a convolution."""
    expected = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            expected[name] = sum(module.weight.shape)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            outputs, inputs, height, width = module.weight.shape
            expected[name] = height * width * (outputs + inputs)
    for name, module in network.named_modules():
        if isinstance(module, m.Attention):
            heads, width = module.heads, len(module.q.weight)
            size = width // heads
            expected[f"{name}.q"] = module.q.in_features * (heads + size)
            expected[f"{name}.kv"] = module.kv.in_features * (heads + size)
            expected[f"{name}.out"] = heads * (size + module.out.out_features)
    if isinstance(network, m.RIN):
        area = network.patch.in_features // network.config.channels
        expected["patch"] = area * (network.config.channels + network.patch.out_features)
    return expected


SMALL_RIN = train.PRESETS["gen_shapes_rin"].config.model
SMALL_UNET = train.PRESETS["gen_shapes"].config.model


@pytest.mark.parametrize("config", [
    SIZES["vit_b"],
    replace(SIZES["resnet50"], enc_layers=2, dec_layers=2),
    replace(SMALL_RIN, conv_kernel=3),
    replace(SMALL_RIN, frames=4, cond_frames=2, frame_stride=2, num_classes=0),
    replace(SMALL_UNET, transformer_layers=2, transformer_dim=64, context_dim=48),
], ids=["vit_b", "resnet50", "rin", "video_rin", "unet"])
def test_every_weight_is_drawn_with_the_deviation_of_the_reference(config):
    torch.manual_seed(0)
    network = m.build(config)
    expected, seen = fans(network), 0
    for name, module in network.named_modules():
        if name not in expected:
            continue
        zero = name.endswith(("conv_1", "pointwise_conv")) or name == "conv_out"
        std = 0.0 if zero else (2 / expected[name]) ** 0.5
        weight = module.weight.double()
        # An estimate from n numbers is off by its own deviation, less than std / sqrt(n).
        assert weight.std().item() == pytest.approx(std, rel=4 / weight.numel() ** 0.5), name
        assert weight.abs().max() <= std * 3 ** 0.5 * 1.000001, name    # uniform
        assert module.bias is None or (module.bias == 0).all(), name
        seen += 1
    assert seen > 20
    # Tables of learned numbers: truncated normal at two deviations of 0.02, which leaves 0.88.
    tables = {"decoder.embed", "latent_position.residual", "decoder.position.learned"}
    for name, table in network.named_parameters():
        if name in tables:
            assert table.std().item() == pytest.approx(0.02 * 0.8796, rel=0.05), name
            assert table.abs().max() <= 0.04


def test_attention_deviations_are_the_published_ones():
    """The numbers of the reference's own networks, to three digits."""
    torch.manual_seed(0)
    vit = Pix2Seq(replace(SIZES["vit_b"], enc_layers=1, dec_layers=1))
    rin = m.build(replace(SMALL_RIN, latent_dim=128, interface_dim=96))
    for weight, std in [
        (vit.encoder.layers[0].self_att.q.weight, 0.00585),
        (vit.encoder.layers[0].self_att.kv.weight, 0.00585),
        (vit.encoder.layers[0].self_att.out.weight, 0.01415),
        (vit.decoder.layers[0].cross_att.q.weight, 0.0090),
        (vit.decoder.layers[0].cross_att.out.weight, 0.0152),
        (rin.blocks[0].process[0].self_att.q.weight, 0.0208),
        (rin.blocks[0].process[0].self_att.out.weight, 0.0559),
        (rin.patch.weight, 0.0356),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)


# --------------------------------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize("options", [
    dict(temperature=0),
    dict(top_p=0.4),
    dict(top_k=5, temperature=1.3),
    dict(samples=3),
    dict(suppress=3),
])
def test_cached_decoding_equals_uncached_token_for_token(tiny_model, options):
    context = tiny_model.encode(torch.rand(2, 3, 32, 32, generator=seeded(0)))
    prompts = torch.randint(0, 210, (2, 3, 4), generator=seeded(1))
    cached, uncached = (
        write(context, prompts, 30, return_logprobs=slice(100, 110), generator=seeded(2), **options)
        for write in (tiny_model.generate, partial(generate_without_cache, tiny_model)))
    assert (cached.tokens == uncached.tokens).all()
    assert torch.allclose(cached.logprobs, uncached.logprobs, atol=1e-5)
    assert torch.allclose(cached.probs, uncached.probs, atol=1e-5)


def test_many_prompts_per_image_equal_one_at_a_time(tiny_model):
    context = tiny_model.encode(torch.rand(2, 3, 32, 32))
    prompts = torch.randint(0, 210, (2, 3, 4))
    together = tiny_model.generate(context, prompts, 10, temperature=0).tokens
    for b in range(2):
        for g in range(3):
            image, prompt = context[b:b + 1], prompts[b:b + 1, g]
            alone = tiny_model.generate(image, prompt, 10, temperature=0).tokens
            assert (alone[0, 0] == together[b, g]).all()


def test_an_image_is_seen_the_same_in_any_batch(tiny_model):
    images, tokens = torch.rand(4, 3, 32, 32), torch.randint(0, 210, (4, 9))
    with torch.no_grad():
        together, alone = tiny_model(images, tokens), tiny_model(images[2:3], tokens[2:3])
    assert torch.allclose(together[2], alone[0], atol=1e-5)


def test_a_token_does_not_see_the_ones_after_it(tiny_model):
    image, tokens = torch.rand(1, 3, 32, 32), torch.randint(0, 210, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 210
    with torch.no_grad():
        a, b = tiny_model(image, tokens), tiny_model(image, changed)
    assert torch.equal(a[0, :8], b[0, :8]) and not torch.allclose(a[0, 8:], b[0, 8:])


def test_writing_stops_when_every_sequence_has_ended(tiny_model):
    context = tiny_model.encode(torch.rand(3, 3, 32, 32))
    prompts, calls = torch.full((3, 1), 10), []
    tiny_model.decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        tiny_model.decoder.bias[0] = 100.0             # the end is certain from the first token on
    out = tiny_model.generate(context, prompts, 60, end=0)
    assert len(calls) == 16 and (out.tokens == 0).all() and out.tokens.shape == (3, 1, 60)
    calls.clear()
    tiny_model.generate(context, prompts, 60)
    assert len(calls) == 60


def test_after_the_end_there_is_only_padding(tiny_model):
    context, prompts = tiny_model.encode(torch.rand(8, 3, 32, 32)), torch.full((8, 1), 10)
    out = tiny_model.generate(context, prompts, 60, temperature=3.0, end=7, generator=seeded(0))
    ended = [row for row in out.tokens[:, 0].tolist() if 7 in row]
    assert ended, "no sequence ended, the test saw nothing"
    for row in ended:
        assert set(row[row.index(7) + 1:]) <= {0}


@pytest.mark.parametrize("samples", [1, 3])
def test_sequences_that_have_ended_leave_the_batch_and_change_no_other(tiny_model, samples):
    context = tiny_model.encode(torch.rand(2, 3, 32, 32, generator=seeded(0)))
    prompts, rows = torch.randint(0, 210, (2, 4, 4), generator=seeded(1)), []
    with torch.no_grad():
        tiny_model.decoder.bias[7] += 2.5              # some end soon, some late
    options = dict(length=60, samples=samples, top_p=0.95)
    whole = tiny_model.generate(context, prompts, generator=seeded(2), **options)
    tiny_model.decoder.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    cut = tiny_model.generate(context, prompts, end=7, generator=seeded(2), **options)
    assert rows[:2] == [8, 8 * samples], "samples of a prompt read it together"
    assert 0 < rows[-1] < rows[1] and sorted(rows[1:], reverse=True) == rows[1:], rows
    for before, after, prob in zip(
            whole.tokens.flatten(0, 1).tolist(), cut.tokens.flatten(0, 1).tolist(),
            cut.probs.flatten(0, 1).tolist()):
        end = before.index(7) + 1 if 7 in before else 60
        assert after == before[:end] + [0] * (60 - end)
        assert min(prob[:end]) > 0 and not any(prob[end:])


def test_shapes_of_a_cache_change_every_64_tokens(tiny_config):
    model, shapes = Pix2Seq(replace(tiny_config, max_seq_len=200)).eval(), []
    layer = model.decoder.layers[0]
    layer.self_att.register_forward_hook(lambda _, args, out: shapes.append(args[1].shape[3]))
    context = model.encode(torch.rand(1, 3, 32, 32))
    model.generate(context, torch.full((1, 5), 10), 130)
    assert shapes == [5] + [64] * 60 + [128] * 64 + [192] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_kernels_writes_the_same_tokens(tiny_config, monkeypatch):
    model = Device("cuda", "float32", "off").place(Pix2Seq(tiny_config)).eval()
    context = model.encode(torch.rand(2, 3, 32, 32, device="cuda"))
    prompts = torch.full((2, 3, 5), 10, device="cuda")

    def write():
        generator = torch.Generator("cuda").manual_seed(0)
        return model.generate(context, prompts, 50, samples=2, end=7, generator=generator)

    recorded = write()
    monkeypatch.setattr(Device, "replayed", staticmethod(lambda work: work))
    plain = write()
    assert torch.equal(recorded.tokens, plain.tokens)
    torch.testing.assert_close(recorded.probs, plain.probs)


def test_weights_cast_for_good_predict_what_weights_cast_each_time_do(tiny_model):
    device, images = Device("cpu", "bfloat16", "off"), torch.rand(2, 3, 32, 32)
    tokens = torch.full((2, 5), 10)
    with torch.no_grad(), device.autocast():
        expected = tiny_model(images, tokens)
        model = device.cast(copy.deepcopy(tiny_model))
        found = model(images, tokens)
    assert model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.encoder.layers[0].mlp.norm.weight.dtype == torch.float32
    assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_a_suppressed_token_is_shown_as_another_but_read_as_written(tiny_model):
    context, prompt = tiny_model.encode(torch.rand(1, 3, 32, 32)), torch.full((1, 1), 10)
    plain = tiny_model.generate(context, prompt, 20, temperature=0).tokens[0, 0]
    first = plain[0].item()
    out = tiny_model.generate(context, prompt, 20, temperature=0, suppress=first).tokens[0, 0]
    assert (out != first).all() and ((plain == out) == (plain != first)).all()


def test_same_generator_same_tokens(tiny_model):
    context, prompt = tiny_model.encode(torch.rand(1, 3, 32, 32)), torch.full((1, 1), 10)
    first, again, other = (
        tiny_model.generate(context, prompt, 40, generator=seeded(seed)).tokens
        for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_attention_maps_are_distributions_beside_the_logits_and_leave_no_hook(tiny_model):
    images, tokens = torch.rand(1, 3, 32, 32), torch.randint(0, 210, (1, 5))
    logits, maps = m.attention_maps(tiny_model, tiny_model.encode(images), tokens)
    assert torch.allclose(logits, tiny_model(images, tokens)[0], atol=1e-6)
    assert maps.shape == (5, 16) and torch.allclose(maps.sum(1), torch.ones(5))
    assert not any(layer.cross_att._forward_hooks for layer in tiny_model.decoder.layers)


@pytest.mark.parametrize("layers, tokens, width", [
    ("(1)1(1)1", 5 * 3, 40),           # ends with latents, which the decoder attends to
    ("(1)1(1)", 5 * 8, 32),            # ends with local layers: to the tokens of 5 groups
])
def test_a_fit_encodes_for_the_decoder_and_learns(tiny_config, layers, tokens, width):
    c = replace(
        tiny_config, encoder="fit", image_size=(32, 64), patch_size=8, fit_layers=layers,
        fit_latents=3, fit_latent_dim=40)
    model = Pix2Seq(c)
    images, written = torch.rand(2, 3, 32, 64), torch.randint(0, 210, (2, 6))
    assert model.encode(images).shape == (2, tokens, width)
    model(images, written).square().mean().backward()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    context, prompts = model.eval().encode(images), written[:, :1]
    assert torch.equal(*(
        write(context, prompts, 8, temperature=0).tokens
        for write in (model.generate, partial(generate_without_cache, model))))


def test_images_that_a_fit_cannot_cut_are_refused(tiny_config):
    with pytest.raises(ValueError, match="image_size 40 is not a multiple of 16"):
        Pix2Seq(replace(tiny_config, encoder="fit", image_size=(40, 64), patch_size=8))


def test_sizes_are_printed_for_every_network(capsys):
    m.print_sizes()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [row[0] for row in rows] == ["size", *SIZES, *m.NETWORKS]
    (vit,) = (row[1:] for row in rows if row[0] == "vit_b")
    assert vit == [f"{m.count_parameters(Pix2Seq(SIZES['vit_b'])):,}", "422.5"]
    assert [len(row) for row in rows if row[0] in ("RIN", "fit_b")] == [3, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_large_vocabulary_is_computed_in_parts(tiny_model, smoothing):
    decoder, rows = tiny_model.decoder, []
    x, targets = torch.randn(2, 3, 7, 32, generator=seeded(0)), torch.randint(210, (2, 3, 7))
    weights = torch.rand(2, 3, 7)

    def losses_and_gradients(most):
        leaf = x.clone().requires_grad_()
        losses = m.output_losses(decoder, leaf, targets, smoothing, most)
        inputs = leaf, decoder.embed, decoder.bias
        return losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)

    whole = losses_and_gradients(most=1 << 24)
    assert torch.equal(whole[0], m.token_losses(decoder.scores(x), targets, smoothing))
    scores = decoder.scores
    decoder.scores = lambda x: rows.append(len(x)) or scores(x)
    parts = losses_and_gradients(most=5 * 210 + 9)
    assert sorted(rows) == [2, 2] + [5] * 16, "42 tokens, forward and in the backward pass"
    for a, b in zip(parts, whole):
        assert (a - b).abs().max() < 2e-6


def test_a_network_gives_its_losses_in_place_of_logits(tiny_model):
    images, tokens = torch.rand(2, 3, 32, 32), torch.randint(210, (2, 3, 9))
    losses = tiny_model(images, tokens, tokens.flip(-1), 0.1)
    assert torch.equal(losses, m.token_losses(tiny_model(images, tokens), tokens.flip(-1), 0.1))


@pytest.mark.parametrize("known, size, dtype", [
    ({"amx_bf16": True}, 3e7, torch.bfloat16),
    ({"avx512_bf16": True, "amx_bf16": False}, 3e7, torch.bfloat16),
    ({"amx_bf16": True}, 1e7, torch.float32),
    ({"amx_bf16": False}, 3e7, torch.float32),
])
def test_a_cpu_computes_large_networks_in_bfloat16_if_it_can(monkeypatch, known, size, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    device, model = m.Device("cpu"), nn.Module()
    model.table = nn.Parameter(torch.empty(int(size), device="meta"))
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **options: self)
    device.place(model)
    assert device.dtype == dtype and m.Device("cpu", "float32").place(model) is model
    chosen = m.Device("cpu", "float32")
    chosen.place(model)
    assert chosen.dtype == torch.float32


@pytest.mark.parametrize("config", [
    SIZES["vit_tiny"], train.PRESETS["pan_shapes"].config.model, SMALL_RIN])
def test_layers_are_compiled_one_by_one_if_asked(monkeypatch, config):
    compiled, network = [], m.build(config)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    m.Device("cpu", compile="off").compile(network)
    assert not compiled
    m.Device("cpu", compile="on").compile(network)
    layers = [part for part in network.modules() if isinstance(part, m.Layer)]
    assert {*layers} <= {*compiled} and len(compiled) == len({*compiled})
    assert all(isinstance(part, (m.Layer, m.UNet)) for part in compiled)


def test_sampling_follows_the_softmax():
    probs = torch.tensor([0.5, 0.3, 0.2])
    uniform = torch.rand(20_000, generator=seeded(0))
    tokens = sample_token(probs.log().expand(20_000, 3), uniform)
    drawn = torch.bincount(tokens, minlength=3) / 20_000
    assert (drawn - probs).abs().max() < 0.015


def test_top_p_keeps_the_first_and_never_exceeds_p():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.05, 0.03, 0.02]])
    kept = (filter_logits(probs.log(), top_p=0.85) > -torch.inf).tolist()
    assert kept == [[True, True, False, False], [True, False, False, False]]


def test_a_prompt_that_leaves_no_room_is_refused(tiny_model):
    context = tiny_model.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="max_seq_len 64"):
        tiny_model.generate(context, torch.full((1, 6), 10), 60)


# --------------------------------------------------------------------------------------------------
# configurations, training

@pytest.mark.parametrize("change, words", [
    (dict(image_size=(7, 32)), "smaller than patch_size 8"),
    (dict(encoder="vgg"), "encoder is 'vgg', expected one of vit, resnet"),
    (dict(projection="mpl"), "linear, linear_p, mlp"),
    (dict(pos_encoding="rope"), "sin_cos, learned"),
    (dict(enc_heads=5), r"32 is not a multiple of 5 \(heads\)"),
])
def test_an_impossible_configuration_is_refused(tiny_config, change, words):
    with pytest.raises(ValueError, match=words):
        m.build(replace(tiny_config, **change))


def test_reference_weights_that_do_not_fit_are_named_and_change_nothing():
    g = Golden(os.path.join(FOLDER, "ar_vit.npz"))
    model = Pix2Seq(pix2seq_config(g.config))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    broken = dict(g.weights)
    del broken["model/proj/bias"]
    broken["model/extra/kernel"] = broken["model/proj/kernel"]
    broken["model/encoder/stem_ln/gamma"] = broken["model/encoder/stem_ln/gamma"][:5]
    with pytest.raises(ValueError) as e:
        load_reference_weights(model, broken)
    for words in (
            "missing: proj.bias",
            "left over: model/extra/kernel",
            "wrong shape: model/encoder/stem_ln/gamma gives (5,)"):
        assert words in str(e.value), str(e.value)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_checkpointing_changes_no_gradient(tiny_config):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Pix2Seq(replace(tiny_config, dropout=0.1, drop_path=0.1)).train()
        m.set_checkpointing(model, checkpointing)
        torch.manual_seed(1)
        logits = model(torch.rand(2, 3, 32, 32), torch.randint(0, 210, (2, 9)))
        logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = m.DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(y.mean() - 1) < 0.03
    assert (y.flatten(1).std(1) == 0).all()


def test_the_loss_is_the_weighted_sum_over_tokens(tiny_model):
    c = SimpleNamespace(optim=SimpleNamespace(label_smoothing=0.1))
    inputs, targets = torch.randint(0, 210, (2, 2, 3, 5))
    batch = SimpleNamespace(
        images=torch.rand(2, 3, 32, 32), inputs=inputs, targets=targets,
        weights=torch.rand(2, 3, 5))
    loss = m.token_loss(tiny_model, batch, c)
    logits = tiny_model(batch.images, inputs).log_softmax(-1)
    of_target = logits.gather(-1, targets[..., None])[..., 0]
    expected = -(0.9 * of_target + 0.1 * logits.mean(-1))
    assert loss.item() == pytest.approx((expected * batch.weights).sum().item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# checkpoints

def content(model):
    config = {"model": {"pair": (1, 2)}}
    return {"network": "Pix2Seq", "config": config, "model": model.state_dict()}


def test_a_checkpoint_comes_back_as_it_was_saved(tiny_model, tmp_path):
    path = str(tmp_path / "a.pt")
    m.save(path, content(tiny_model) | {"best": -torch.inf})
    loaded = m.load(path)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert loaded["best"] == -torch.inf and loaded["config"] == {"model": {"pair": (1, 2)}}
    other = Pix2Seq(tiny_model.config)
    m.load_weights(other, loaded["model"])
    for name, w in other.state_dict().items():
        assert torch.equal(w, tiny_model.state_dict()[name]), name


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(tiny_model, tmp_path):
    path = str(tmp_path / "a.pt")
    m.save(path, content(tiny_model))
    with pytest.raises(Exception, match="pickle"):
        m.save(path, content(tiny_model) | {"step": lambda: 0})
    assert os.listdir(tmp_path) == ["a.pt"] and m.load(path)["network"] == "Pix2Seq"


def test_a_file_that_is_not_a_whole_checkpoint_is_named(tiny_model, tmp_path):
    path = str(tmp_path / "a.pt")
    m.save(path, content(tiny_model))
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(ValueError, match="a.pt: damaged, truncated"):
        m.load(path)
    with open(path, "wb"):
        pass
    with pytest.raises(ValueError, match="a.pt: damaged, truncated"):
        m.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="a.pt: not a checkpoint of this code"):
        m.load(path)
    torch.save(content(tiny_model), path)
    with pytest.raises(ValueError, match="a.pt: has format 1, expected 2: to be trained anew"):
        m.load(path)
    with pytest.raises(ValueError, match="none.pt: no such file"):
        m.load(str(tmp_path / "none.pt"))


def test_a_file_from_a_stranger_runs_no_code(tmp_path):
    path, mark = str(tmp_path / "a.pt"), str(tmp_path / "mark")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (mark,)

    torch.save({"network": "Pix2Seq", "config": Evil(), "model": {}}, path)
    with pytest.raises(ValueError, match="a.pt"):
        m.load(path)
    assert not os.path.exists(mark)


# --------------------------------------------------------------------------------------------------
# device

@pytest.mark.parametrize("wrong, words", [
    (dict(name="gpu"), "unknown device 'gpu', expected one of auto, cuda, mps, cpu"),
    (dict(dtype="float64"),
     "unknown dtype 'float64', expected one of auto, float32, bfloat16, float16"),
    (dict(compile="yes"), "unknown compile 'yes', expected one of auto, on, off"),
])
def test_an_unknown_device_dtype_or_compile_lists_the_choices(wrong, words):
    with pytest.raises(ValueError, match=words):
        Device(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_this_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="device cuda:1 is not available"):
        Device("cuda:1")


def test_one_process_on_a_cpu_passes_everything_on():
    device, model = Device("cpu"), nn.Linear(3, 2)
    assert (device.rank, device.world, device.first, device.fused) == (0, 1, True, True)
    assert (device.type, device.name, device.dtype) == ("cpu", "cpu", torch.float32)
    assert device.place(model) is model and device.wrap(model) is model and not device.compiled
    assert device.gather([1, 2]) == [[1, 2]]
    sums = device.sum({"a": torch.tensor(1.5), "b": torch.tensor(2.0)})
    assert {key: value.item() for key, value in sums.items()} == {"a": 1.5, "b": 2.0}
    with device.sync_only(model, last=False), device.autocast():
        assert model(torch.rand(1, 3)).dtype == torch.float32
    assert device.memory_gb() > 0.01
    device.wait()
    device.close()


def test_bfloat16_is_that_of_matrix_products():
    device, model = Device("cpu", dtype="bfloat16"), nn.Linear(3, 2)
    with device.autocast():
        assert model(torch.rand(1, 3)).dtype == torch.bfloat16


def test_a_step_moves_the_weights_and_forgets_the_gradients():
    device, model = Device("cpu"), nn.Linear(3, 2)
    before = model.weight.detach().clone()
    model(torch.rand(1, 3)).sum().backward()
    device.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not torch.equal(model.weight, before) and model.weight.grad is None


def test_random_numbers_of_a_device_are_its_own():
    device = Device("cpu")
    a, b = (torch.rand(3, generator=device.generator(4)) for _ in range(2))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with device.fork_rng(4):
        c = torch.rand(3)
    assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(torch.rand(3), expected)


def test_processes_meet_every_five_seconds_to_agree_on_stopping(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(m.time, "time", lambda: clock[0])
    device, meetings = Device("cpu"), []
    device.world, device.sum = 2, lambda values: meetings.append(step) or values

    def stops(steps, seconds):
        nonlocal step
        for _ in range(steps):
            step, clock[0] = step + 1, clock[0] + seconds
            if device.stopping(step):
                return step

    step = -1
    stops(300, seconds=0.125)
    assert meetings == [0, 1, *range(41, 300, 40)]
    stops(100, seconds=4.0)
    assert meetings[-10:] == list(range(390, 400)), "slow steps end one by one"
    device.asked, asked = True, step
    assert stops(5, seconds=4.0) == asked + 1
    device.asked, device.first = False, False
    assert stops(9, seconds=0.1) is None and device.interval == 1, "the first one says how many"


def test_a_signal_asks_to_stop():
    device = Device("cpu")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        device.catch_signals()
        assert not device.stopping(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert device.stopping(3)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

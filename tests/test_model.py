from dataclasses import replace

import pytest
import torch

import model as m
from model import SIZES, Pix2Seq, count_parameters, filter_logits, load_reference_weights, sample_token


@pytest.mark.parametrize("size, parameters", [("vit_b", 115_169_976), ("vit_l", 341_161_912)])
def test_named_sizes_have_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        assert count_parameters(Pix2Seq(SIZES[size])) == parameters


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_p=0.4), dict(top_k=5, temperature=1.3), dict(samples=3), dict(forbid=3)])
def test_cached_decoding_equals_uncached_token_for_token(tiny_model, options):
    context = tiny_model.encode(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    prompts = torch.randint(0, 210, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    runs = [tiny_model.generate(context, prompts, 30, cache=cache, keep=slice(100, 110), generator=torch.Generator().manual_seed(2), **options)
            for cache in (True, False)]
    assert (runs[0].tokens == runs[1].tokens).all()
    assert torch.allclose(runs[0].logprobs, runs[1].logprobs, atol=1e-5) and torch.allclose(runs[0].probs, runs[1].probs, atol=1e-5)


def test_many_prompts_an_image_equal_one_at_a_time(tiny_model):
    context = tiny_model.encode(torch.rand(2, 3, 32, 32))
    prompts = torch.randint(0, 210, (2, 3, 4))
    together = tiny_model.generate(context, prompts, 10, temperature=0).tokens
    for b in range(2):
        for g in range(3):
            alone = tiny_model.generate(context[b:b + 1], prompts[b:b + 1, g], 10, temperature=0).tokens
            assert (alone[0, 0] == together[b, g]).all()


def test_an_image_is_seen_the_same_in_any_batch(tiny_model):
    images, tokens = torch.rand(4, 3, 32, 32), torch.randint(0, 210, (4, 9))
    with torch.no_grad():
        assert torch.allclose(tiny_model(images, tokens)[2], tiny_model(images[2:3], tokens[2:3])[0], atol=1e-5)


def test_a_token_does_not_see_the_ones_after_it(tiny_model):
    image, tokens = torch.rand(1, 3, 32, 32), torch.randint(0, 210, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 210
    with torch.no_grad():
        a, b = tiny_model(image, tokens), tiny_model(image, changed)
    assert torch.equal(a[0, :8], b[0, :8]) and not torch.allclose(a[0, 8:], b[0, 8:])


def test_writing_stops_when_every_sequence_has_ended(tiny_model):
    context = tiny_model.encode(torch.rand(3, 3, 32, 32))
    calls = []
    tiny_model.decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        tiny_model.decoder.bias[0] = 100.0             # the end is certain from the first token on
    out = tiny_model.generate(context, torch.full((3, 1), 10), 60, end=0)
    assert len(calls) == 16 and (out.tokens == 0).all() and out.tokens.shape == (3, 1, 60)
    calls.clear()
    tiny_model.generate(context, torch.full((3, 1), 10), 60)
    assert len(calls) == 60


def test_after_the_end_there_is_only_padding(tiny_model):
    context = tiny_model.encode(torch.rand(8, 3, 32, 32))
    out = tiny_model.generate(context, torch.full((8, 1), 10), 60, temperature=3.0, end=7, generator=torch.Generator().manual_seed(0))
    ended = 0
    for row in out.tokens[:, 0].tolist():
        if 7 in row:
            ended += 1
            assert set(row[row.index(7) + 1:]) <= {0}
    assert ended > 0, "no sequence ended, the test saw nothing"


def test_a_forbidden_token_is_shown_as_another_but_read_as_written(tiny_model):
    context = tiny_model.encode(torch.rand(1, 3, 32, 32))
    plain = tiny_model.generate(context, torch.full((1, 1), 10), 20, temperature=0)
    first = plain.tokens[0, 0, 0].item()
    out = tiny_model.generate(context, torch.full((1, 1), 10), 20, temperature=0, forbid=first)
    same = plain.tokens[0, 0] == out.tokens[0, 0]
    assert (out.tokens != first).all() and (same == (plain.tokens[0, 0] != first)).all()


def test_same_generator_same_tokens(tiny_model):
    context = tiny_model.encode(torch.rand(1, 3, 32, 32))
    draw = lambda seed: tiny_model.generate(context, torch.full((1, 1), 10), 40, generator=torch.Generator().manual_seed(seed)).tokens
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_sampling_follows_the_softmax():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    drawn = torch.bincount(sample_token(logits, generator=torch.Generator().manual_seed(0)), minlength=3) / 20_000
    assert (drawn - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.015


def test_nucleus_keeps_the_first_and_never_exceeds_p():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.05, 0.03, 0.02]])
    kept = (filter_logits(probs.log(), top_p=0.85) > -torch.inf).tolist()
    assert kept == [[True, True, False, False], [True, False, False, False]]


def test_a_prompt_that_leaves_no_room_is_refused(tiny_model):
    with pytest.raises(ValueError, match="max_seq_len 64"):
        tiny_model.generate(tiny_model.encode(torch.rand(1, 3, 32, 32)), torch.full((1, 6), 10), 60)


@pytest.mark.parametrize("change, words", [
    (dict(image_size=(7, 32)), "smaller than patch_size 8"), (dict(encoder="vgg"), "expected one of vit"),
    (dict(projection="mpl"), "'linear_p'"), (dict(pos_encoding="rope"), "sin_cos"), (dict(enc_heads=5), "5 heads")])
def test_an_impossible_configuration_is_refused(tiny_config, change, words):
    with pytest.raises(ValueError, match=words):
        Pix2Seq(replace(tiny_config, **change))


def test_reference_weights_that_do_not_fit_are_named_and_change_nothing():
    from test_parity import Golden, pix2seq_config
    g = Golden(__file__.replace("test_model.py", "golden/ar_vit.npz"))
    model = Pix2Seq(pix2seq_config(g.config))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    broken = dict(g.weights)
    del broken["model/proj/bias"]
    broken["model/extra/kernel"] = broken["model/proj/kernel"]
    broken["model/encoder/stem_ln/gamma"] = broken["model/encoder/stem_ln/gamma"][:5]
    with pytest.raises(ValueError) as e:
        load_reference_weights(model, broken)
    for words in ("missing: proj.bias", "left over: model/extra/kernel", "wrong shape: model/encoder/stem_ln/gamma gives (5,)"):
        assert words in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpointing_changes_no_gradient(tiny_config):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Pix2Seq(replace(tiny_config, checkpointing=checkpointing, dropout=0.1, drop_path=0.1)).train()
        torch.manual_seed(1)
        model(torch.rand(2, 3, 32, 32), torch.randint(0, 210, (2, 9))).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = m.DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(y.mean() - 1) < 0.03
    assert (y.flatten(1).std(1) == 0).all()

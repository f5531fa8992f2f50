"""Encoders that start from weights of timm and torchvision: their forward passes are written here
from the documented layouts, as neither package is a requirement."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run

import model as m
from tokenizer import UserError

VIT = m.Pix2SeqConfig(
    image_size=(32, 48), patch_size=8, enc_layers=2, enc_dim=24, enc_mlp=40, enc_heads=3,
    pos_encoding="learned", cls_token=True, patch_norm=False, dec_layers=1, dec_dim=16, dec_mlp=16,
    dec_heads=2, vocab_size=300, max_seq_len=16)


def random(*shape):
    return torch.randn(shape, generator=random.generator) * 0.2


@pytest.fixture(autouse=True)
def seeded():
    random.generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)


def vit_weights(c, names, patches, scale=False):
    """A ViT's weights; names: of timm or of torchvision."""
    d, timm = c.enc_dim, names == "timm"
    weights = {
        "cls_token" if timm else "class_token": random(1, 1, d),
        "pos_embed" if timm else "encoder.pos_embedding": random(1, 1 + patches, d),
    }

    def add(name, *shape, bias=True):
        weights[f"{name}weight"] = random(*shape)
        if bias:
            weights[f"{name}bias"] = random(shape[0])

    add("patch_embed.proj." if timm else "conv_proj.", d, 3, c.patch_size, c.patch_size)
    for n in range(c.enc_layers):
        at = f"blocks.{n}." if timm else f"encoder.layers.encoder_layer_{n}."
        for name, *shape in (
                ("norm1." if timm else "ln_1.", d),
                ("attn.qkv." if timm else "self_attention.in_proj_", 3 * d, d),
                ("attn.proj." if timm else "self_attention.out_proj.", d, d),
                ("norm2." if timm else "ln_2.", d),
                ("mlp.fc1." if timm else "mlp.0.", c.enc_mlp, d),
                ("mlp.fc2." if timm else "mlp.3.", d, c.enc_mlp)):
            add(at + name, *shape)
        if scale:
            weights |= {f"{at}ls1.gamma": random(d), f"{at}ls2.gamma": random(d)}
    add("norm." if timm else "encoder.ln.", d)
    add("head." if timm else "heads.head.", 10, d)
    return weights


def vit_forward(weights, images, c, colors):
    """What a ViT of timm or torchvision makes of images in [0, 1], up to the last norm."""
    d, heads = c.enc_dim, c.enc_heads
    names = {
        "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj.":
        "patch_embed.proj.", "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2":
        "norm2", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "encoder.ln": "norm"}
    w = {}
    for name, value in weights.items():
        for theirs, timm in names.items():
            name = name.replace(theirs, timm)
        w[name] = value

    def dense(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    mean, std = (torch.tensor(row).view(3, 1, 1) for row in m.COLORS[colors])
    x = (images - mean) / std
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], c.patch_size)
    x = x.flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for n in range(c.enc_layers):
        at = f"blocks.{n}"
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in dense(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, -1))
        y = (q @ k.mT / (d // heads) ** 0.5).softmax(-1) @ v
        y = dense(y.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + y * w.get(f"{at}.ls1.gamma", 1)
        y = F.gelu(dense(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = x + dense(y, f"{at}.mlp.fc2") * w.get(f"{at}.ls2.gamma", 1)
    return norm(x, "norm")


@pytest.mark.parametrize("names, colors, scale", [
    ("timm", "imagenet", False), ("timm", "half", True), ("torchvision", "imagenet", False)])
def test_a_vit_computes_what_it_did_elsewhere(tmp_path, names, colors, scale):
    path = f"{tmp_path}/vit.pth"
    c = replace(VIT, image_size=(32, 32))              # their grids are square
    weights = vit_weights(c, names, 16, scale)
    torch.save({"model": weights} if scale else weights, path)
    network, images = m.build(c).eval(), torch.rand(2, 3, 32, 32)
    notes = m.load_backbone(path, network, colors)
    assert [note for note in notes if "head." in note] == notes[:1], notes
    found, _ = network.encoder(images)
    torch.testing.assert_close(found, vit_forward(weights, images, c, colors), rtol=1e-4, atol=1e-5)


def test_names_and_layouts_of_other_releases_are_read(tmp_path):
    """A wrapper's prefix, a nested file, a class and a distillation token, older names of an MLP,
    and patches without a bias."""
    c = replace(VIT, image_size=(32, 32))
    path, images = f"{tmp_path}/vit.pth", torch.rand(1, 3, 32, 32)
    weights = vit_weights(c, "torchvision", 16)
    weights["conv_proj.bias"].zero_()
    network = m.build(c).eval()
    torch.save(weights, path)
    m.load_backbone(path, network, "imagenet")
    expected, _ = network.encoder(images)
    del weights["conv_proj.bias"]
    weights["encoder.pos_embedding"] = torch.cat(
        [weights["encoder.pos_embedding"][:, :1], random(1, 1, 24),
         weights["encoder.pos_embedding"][:, 1:]], 1)
    old = {
        f"module.{name}".replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): w
        for name, w in weights.items()}
    torch.save({"state_dict": old}, path)
    network = m.build(c).eval()
    m.load_backbone(path, network, "imagenet")
    assert torch.equal(network.encoder(images)[0], expected)


def test_positions_of_another_grid_are_interpolated_and_what_does_not_fit_is_said(tmp_path):
    weights = vit_weights(VIT, "timm", 16) | {"mask_token": random(1, 24)}
    path = f"{tmp_path}/vit.pth"
    torch.save(weights, path)
    network = m.build(VIT)
    before = network.decoder.embed.clone()
    notes = m.load_backbone(path, network, "imagenet")
    assert "encoder.position.code: grid of (4, 4), the model has (4, 6)" in notes
    assert "left out: ['head.bias', 'head.weight', 'mask_token']" in notes
    assert "not in the file: []" in notes and torch.equal(network.decoder.embed, before)
    fixed = m.build(replace(VIT, pos_encoding="sin_cos", patch_norm=True, cls_token=False))
    notes = m.load_backbone(path, fixed, "imagenet")
    assert "encoder.cls" in notes[0] and "encoder.position.code" in notes[0]
    assert "encoder.patch_norm.weight" in notes[1]
    torch.save({"a": torch.zeros(1), "epoch": 3, "more": {"b": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"vit.pth: no weights that fit .*, such as \['a'\]"):
        m.load_backbone(path, network, "imagenet")


def test_safetensors_are_read_without_their_package(tmp_path):
    weights = vit_weights(VIT, "timm", 24)
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    weights["pos_embed"] = weights["pos_embed"].bfloat16()
    weights["count"] = torch.tensor([3, -4])
    weights["none"] = torch.zeros(0, 3)
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        start = len(content)
        content += w.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": kinds[w.dtype], "shape": list(w.shape), "data_offsets": [start, len(content)]}
    text = json.dumps(header).encode()
    path = tmp_path / "vit.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    found = m.read_weights(str(path))
    assert found.keys() == weights.keys()
    for name, w in weights.items():
        assert found[name].dtype == w.dtype and torch.equal(found[name], w), name
    for broken in (b"", text, path.read_bytes()[:-9]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="vit.safetensors: neither weights of torch nor"):
            m.read_weights(str(path))
    (tmp_path / "text.pth").write_text("step 1\n")
    with pytest.raises(UserError, match="text.pth: neither weights") as refused:
        m.read_weights(f"{tmp_path}/text.pth")
    assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="gone.pth: .*No such file"):
        m.read_weights(f"{tmp_path}/gone.pth")


def resnet_weights():
    """A ResNet-50's, as torchvision has them."""
    weights = {}

    def add(conv, norm, outputs, inputs, kernel):
        weights[f"{conv}.weight"] = random(outputs, inputs, kernel, kernel) / inputs ** 0.5 / kernel
        for name, value in (
                ("weight", 1 + random(outputs)), ("bias", random(outputs)),
                ("running_mean", random(outputs)), ("running_var", 1 + random(outputs).square()),
                ("num_batches_tracked", torch.tensor(7))):
            weights[f"{norm}.{name}"] = value

    add("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for n in range(blocks):
            at = f"layer{stage + 1}.{n}"
            add(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            add(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            add(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if inputs != 4 * width:
                add(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
                inputs = 4 * width
    return weights | {"fc.weight": random(5, 2048), "fc.bias": random(5)}


def resnet_forward(w, images, colors):
    def conv(x, conv, norm, stride=1, padding=0):
        x = F.conv2d(x, w[f"{conv}.weight"], stride=stride, padding=padding)
        parts = (w[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    mean, std = (torch.tensor(row).view(3, 1, 1) for row in m.COLORS[colors])
    x = F.relu(conv((images - mean) / std, "conv1", "bn1", 2, 3))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for n in range(blocks):
            at = f"layer{stage + 1}.{n}"
            stride = 2 if stage and not n else 1
            y = F.relu(conv(x, f"{at}.conv1", f"{at}.bn1"))
            y = F.relu(conv(y, f"{at}.conv2", f"{at}.bn2", stride, 1))
            y = conv(y, f"{at}.conv3", f"{at}.bn3")
            if n == 0:
                x = conv(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = F.relu(x + y)
    return x


def test_a_resnet_computes_what_it_did_elsewhere(tmp_path, monkeypatch):
    """Exactly, but where the first convolution reads padding, which is grey there and black here;
    and with sides whose half is odd, else max pooling pads the other end (as the reference)."""
    c = replace(VIT, encoder="resnet", image_size=(69, 101))
    weights = resnet_weights()
    path = f"{tmp_path}/resnet.pth"
    torch.save(weights, path)
    network, images = m.build(c).eval(), torch.rand(1, 3, *c.image_size)
    notes = m.load_backbone(path, network, "imagenet")
    assert notes[0] == "left out: ['fc.bias', 'fc.weight']" and "encoder.patch.weight" in notes[1]
    stem = network.encoder.resnet.stem[0]
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in m.COLORS["imagenet"])
    x = F.conv2d((images - mean) / std, weights["conv1.weight"], stride=2, padding=3)
    x = F.batch_norm(x, *(weights[f"bn1.{k}"] for k in (
        "running_mean", "running_var", "weight", "bias")))
    inner = slice(2, -2)
    torch.testing.assert_close(
        stem(images)[..., inner, inner], x[..., inner, inner], rtol=1e-4, atol=1e-4)
    assert (stem(images) - x).abs().max() > 0.01
    monkeypatch.setitem(m.COLORS, "black", ((0.0, 0.0, 0.0), (0.2, 0.3, 0.4)))
    m.load_backbone(path, network, "black")
    found, expected = network.encoder.resnet(images)[-1], resnet_forward(weights, images, "black")
    assert found.shape == expected.shape and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_training_starts_from_a_backbone_and_says_what_did_not_fit(tmp_path):
    c = replace(VIT, image_size=(64, 64))
    torch.save(vit_weights(c, "timm", 64), tmp_path / "vit.pth")
    sizes = [f"--{name}={value}" for name, value in dict(
        backbone=tmp_path / "vit.pth", patch_norm=False, pos_encoding="learned", cls_token=True,
        enc_layers=2, enc_dim=24, enc_mlp=40, enc_heads=3, steps=2, batch_size=2, lr=1e-9,
        weight_decay=0, val_count=2, save_every=1, optimizer="adamw", pictures=0,
        out=tmp_path / "run").items()]
    done = run("train.py", *sizes)
    assert "vit.pth: left out: ['head.bias', 'head.weight']" in done.stdout
    found = m.load(f"{tmp_path}/run/last.pt")["model"]["encoder.layers.1.mlp.fc1.weight"]
    stored = m.read_weights(f"{tmp_path}/vit.pth")["blocks.1.mlp.fc1.weight"]
    np.testing.assert_allclose(found, stored, atol=1e-6)
    again = run("train.py", *sizes, "--steps=3").stdout
    assert "going on from step 2" in again and "left out" not in again

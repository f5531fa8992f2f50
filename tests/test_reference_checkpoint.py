"""Weights from elsewhere: released checkpoints read, understood, fitted to another size, and written as ours."""
import inspect
import json
import os
import re
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval
import model as m
import sample
import train
from model import Pix2Seq, adapt_weights, infer_config, load_reference_weights, load_weights, read_reference_checkpoint, reference_checkpoint
from test_parity import FOLDER, Golden, pix2seq_config, rin_config
from tokenizer import Vocab

# What the shapes of each golden file do not tell.
UNTOLD = {"ar_vit": {}, "ar_vit_cls_learned": {"max_seq_len": 24}, "ar_resnet50": {}, "ar_resnet50_c4": {"projection": "linear"}}
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def golden(name):
    return Golden(os.path.join(FOLDER, f"{name}.npz"))


def write_fake(folder, weights, step=7):
    """The files of a checkpoint, the weights in one that numpy can read, as `fake_tensorflow` does."""
    arrays = {name + VALUE: w for name, w in weights.items()}
    arrays |= {f"{name}/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}": np.zeros(1) for name in weights for slot in "mv"}
    arrays |= {f"{name}{VALUE}": np.ones(1) for name in ("global_step", "save_counter", "optimizer/learning_rate")}
    arrays |= {"_CHECKPOINTABLE_OBJECT_GRAPH": np.zeros(1)}
    with open(folder / f"ckpt-{step}.data-00000-of-00001", "wb") as f:
        np.savez(f, **arrays)
    (folder / f"ckpt-{step}.index").write_bytes(b"index")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "/elsewhere/ckpt-{step}"\nall_model_checkpoint_paths: "ckpt-1"\n')
    return folder / f"ckpt-{step}"


@pytest.fixture
def fake_tensorflow(monkeypatch):
    class Reader:
        def __init__(self, prefix):
            self.arrays = dict(np.load(prefix + ".data-00000-of-00001"))
        def get_variable_to_shape_map(self):
            return {key: list(w.shape) for key, w in self.arrays.items()}
        def get_tensor(self, key):
            return self.arrays[key]
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(train=SimpleNamespace(load_checkpoint=Reader)))


# ---------------------------------------------------------------------------------------------------------------
# reading

def test_only_the_weights_of_the_model_are_read(tmp_path, fake_tensorflow):
    weights = golden("ar_vit").weights
    prefix = write_fake(tmp_path, weights)
    for path in (tmp_path, prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001"):
        found = read_reference_checkpoint(str(path))
        assert set(found) == set(weights) and all(np.array_equal(found[k], weights[k]) for k in weights)


@pytest.mark.parametrize("file", ["checkpoint", "ckpt-7.index", "ckpt-7.data-00000-of-00001"])
def test_a_missing_file_is_named(tmp_path, fake_tensorflow, file):
    write_fake(tmp_path, {"model/a": np.zeros(3)})
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(file)):
        read_reference_checkpoint(str(tmp_path))


def test_a_missing_part_of_several_is_named(tmp_path, fake_tensorflow):
    prefix = write_fake(tmp_path, {"model/a": np.zeros(3)})
    os.rename(f"{prefix}.data-00000-of-00001", f"{prefix}.data-00000-of-00002")
    with pytest.raises(FileNotFoundError, match="ckpt-7.data-00001-of-00002"):
        read_reference_checkpoint(str(prefix))


def test_a_truncated_file_is_named(tmp_path, fake_tensorflow):
    prefix = write_fake(tmp_path, {"model/a": np.zeros(300)})
    os.truncate(f"{prefix}.data-00000-of-00001", 500)
    with pytest.raises(ValueError, match="ckpt-7.*damaged or truncated"):
        read_reference_checkpoint(str(prefix))


def test_a_checkpoint_of_something_else_is_refused(tmp_path, fake_tensorflow):
    with pytest.raises(ValueError, match="no weights under model/"):
        read_reference_checkpoint(str(write_fake(tmp_path, {"net/a": np.zeros(3)})))


def test_without_tensorflow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="pip install tensorflow-cpu"):
        read_reference_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", UNTOLD)
def test_tensorflow_checkpoint_gives_the_logits_and_tokens_of_the_reference(tmp_path, name):
    tf = pytest.importorskip("tensorflow")
    g = golden(name)
    root, variables = tf.train.Checkpoint(), []
    for key, w in g.weights.items():
        node, parts = root, key.removeprefix("model/").split("/")
        for part in parts[:-1]:
            if not hasattr(node, part):
                setattr(node, part, tf.train.Checkpoint())
            node = getattr(node, part)
        variables.append(tf.Variable(w.astype(np.float32)))
        setattr(node, parts[-1].replace(".S", "/"), variables[-1])             # TensorFlow writes a slash in a name as .S
    optimizer = tf.compat.v1.train.AdamOptimizer(0.0)
    optimizer.apply_gradients([(tf.ones_like(v), v) for v in variables])       # makes the slots, changes nothing
    step = tf.Variable(1000, dtype=tf.int64)
    saved = tf.train.Checkpoint(model=root, optimizer=optimizer, global_step=step)
    tf.train.CheckpointManager(saved, str(tmp_path), 1).save(1000)
    weights = read_reference_checkpoint(str(tmp_path))
    assert any("OPTIMIZER_SLOT" in key for key, _ in tf.train.list_variables(str(tmp_path))) and set(weights) == set(g.weights)
    model = Pix2Seq(infer_config(weights, (64, 96), **UNTOLD[name])).eval()
    load_reference_weights(model, weights)
    images = g["in:image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        g.check("out:logits", model(images, g["in:seq"]))
        written = model.generate(model.encode(images), g["in:prompt"], g["out:greedy_tokens"].shape[1], temperature=0)
    g.check("out:greedy_tokens", written.tokens[:, 0])


# ---------------------------------------------------------------------------------------------------------------
# understanding

@pytest.mark.parametrize("name", UNTOLD)
def test_shapes_tell_the_configuration(name):
    g = golden(name)
    assert infer_config(g.weights, (64, 96), **UNTOLD[name]) == pix2seq_config(g.config)


@pytest.mark.parametrize("name, words", [("ar_vit", "--image_size"), ("ar_vit_cls_learned", "--max_seq_len"), ("ar_resnet50_c4", "--projection")])
def test_what_shapes_do_not_tell_is_asked_for(name, words):
    with pytest.raises(ValueError, match=words):
        infer_config(golden(name).weights)


def test_learned_positions_on_a_square_tell_the_image_size():
    weights = golden("ar_vit_cls_learned").weights
    weights = {k: w[:16] if "vis_pos" in k else w for k, w in weights.items()}
    assert infer_config(weights, max_seq_len=24).image_size == (64, 64)


def test_variants_of_the_resnet_are_told_apart():
    weights = golden("ar_resnet50").weights
    variant = lambda w, **known: infer_config(w, (64, 96), **known).resnet_variant
    keep = lambda stages: {k: w for k, w in weights.items() if not any(f"block_groups/{i}/" in k for i in range(stages, 4))}
    assert [variant(keep(n)) for n in (2, 3, 4)] == ["c3", "c4", "standard"] and variant(weights, resnet_variant="dc5") == "dc5"
    with pytest.raises(ValueError, match="resnet_variant is c4, not dc5"):
        variant(keep(3), resnet_variant="dc5")
    with pytest.raises(ValueError, match=r"stages of \(3, 4, 5, 3\) blocks"):
        variant({k: w for k, w in weights.items() if "block_groups/2/layers/5" not in k})


def test_what_is_told_is_not_overruled():
    with pytest.raises(ValueError, match="vocab_size is 200, not 3000"):
        infer_config(golden("ar_vit").weights, (64, 96), vocab_size=3000)


def test_weights_of_another_kind_of_model_are_refused():
    with pytest.raises(ValueError, match="not the weights of a Pix2Seq model"):
        infer_config({"model/denoiser/x": np.zeros(3)})


# ---------------------------------------------------------------------------------------------------------------
# another size

@pytest.fixture
def learned(tiny_config):
    """Two models of learned positions; the second is larger in every way that weights can be fitted to."""
    torch.manual_seed(0)
    small = replace(tiny_config, pos_encoding="learned", projection="linear_p")
    return Pix2Seq(small), Pix2Seq(replace(small, image_size=(48, 64), max_seq_len=80, vocab_size=250))


def test_weights_of_the_same_size_are_loaded_as_they_are(learned, tiny_config):
    torch.manual_seed(9)
    other = Pix2Seq(learned[0].config)
    weights, notes = adapt_weights(learned[0].state_dict(), other)
    load_weights(other, weights)
    assert notes == [] and all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), learned[0].state_dict().values()))


def test_another_size_is_refused_by_name_and_changes_nothing(learned):
    before = {k: v.clone() for k, v in learned[1].state_dict().items()}
    with pytest.raises(ValueError) as e:
        adapt_weights(learned[0].state_dict(), learned[1])
    for words in ("--adapt", "encoder.position.code: grid of 4 x 4, the model has 6 x 8", "proj_position.code", "decoder.position.code: sequences of 64",
                  "decoder.embed: vocabulary of 210, the model has 250", "decoder.bias"):
        assert words in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in learned[1].state_dict().items())


@pytest.mark.parametrize("grows", [True, False])
def test_common_rows_are_kept_and_new_ones_stay_new(learned, grows):
    source, target = learned if grows else learned[::-1]
    fresh = {k: v.clone() for k, v in target.state_dict().items()}
    weights, notes = adapt_weights(source.state_dict(), target, adapt=True, grid=source.encoder.grid)
    load_weights(target, weights)
    assert len(notes) == 6 and len({note.split(":")[0] for note in notes}) == 6, notes     # embed counts under both its names
    for name, common in (("decoder.position.code", 64), ("decoder.embed", 210), ("decoder.bias", 210)):
        rows = target.state_dict()[name]
        assert torch.equal(rows[:common], source.state_dict()[name][:common]) and torch.equal(rows[common:], fresh[name][common:])


def test_image_positions_are_interpolated_on_their_grid(learned):
    source, target = learned
    y, x = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(4) + 0.5, indexing="ij")
    with torch.no_grad():
        source.encoder.position.code.copy_((y * 10 / 4 + x / 4).flatten()[:, None].expand(16, 32))     # 10 * row + column, as fractions
    code = adapt_weights(source.state_dict(), target, adapt=True)[0]["encoder.position.code"].view(6, 8, 32)
    y, x = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(8) + 0.5) / 8, indexing="ij")
    inside = (slice(2, 4), slice(3, 5))                # where the kernel stays on the grid
    assert torch.allclose(code[inside], (10 * y + x)[inside][..., None].expand(2, 2, 32), atol=1e-4), code[inside][..., 0]


def test_a_grid_that_is_not_square_must_be_told(learned):
    source = Pix2Seq(replace(learned[0].config, image_size=(16, 64)))
    with pytest.raises(ValueError, match="encoder.position.code: the grid of its 16 positions"):
        adapt_weights(source.state_dict(), learned[1], adapt=True, grid=(3, 5))
    with pytest.raises(ValueError, match="grid of 2 x 8, the model has 4 x 4"):
        adapt_weights(source.state_dict(), learned[0], grid=(2, 8))            # of the same number of positions
    weights = {k: v[:15] if "position" in k else v for k, v in source.state_dict().items()}
    with pytest.raises(ValueError, match="encoder.position.code: the grid of its 15 positions is not known"):
        adapt_weights(weights, learned[1], adapt=True)


def test_ranges_of_the_vocabulary_move(tiny_config):
    old, new = Vocab(100, 110, 210, 220), Vocab(199, 130, 340, 345)
    source, target = (Pix2Seq(replace(tiny_config, vocab_size=v.size)) for v in (old, new))
    fresh = target.decoder.embed.detach().clone()
    with pytest.raises(ValueError, match=r"decoder.embed: vocabulary of 220, the model has 345; .* \(100, 110, 210\), the model has \(199, 130, 340\)"):
        adapt_weights(source.state_dict(), target, vocabs=(old, new))
    load_weights(target, adapt_weights(source.state_dict(), target, adapt=True, vocabs=(old, new))[0])
    a, b = source.decoder.embed, target.decoder.embed
    assert torch.equal(a[:110], b[:110]) and torch.equal(b[110:130], fresh[110:130])       # specials and classes; classes that are new
    assert torch.allclose(b[130:329:2], a[110:210], atol=1e-6)                 # every other coordinate is an old one
    assert torch.allclose(b[131:329:2], (a[110:209] + a[111:210]) / 2, atol=1e-6)
    assert torch.equal(b[329:340], fresh[329:340]) and torch.equal(a[210:215], b[340:345])
    assert torch.allclose(target.decoder.bias[130:329:2], source.decoder.bias[110:210], atol=1e-6)


def test_another_layout_of_the_same_size_is_refused(tiny_model):
    vocabs = Vocab(100, 110, 210, 210), Vocab(90, 120, 210, 210)
    with pytest.raises(ValueError, match="coord_shift"):
        adapt_weights(tiny_model.state_dict(), tiny_model, vocabs=vocabs)
    assert adapt_weights(tiny_model.state_dict(), tiny_model, vocabs=vocabs[:1] * 2)[1] == []


def test_another_network_is_refused_whatever_is_adapted(learned, tiny_config):
    wider = Pix2Seq(replace(learned[1].config, dec_dim=48))
    weights, _ = adapt_weights(learned[0].state_dict(), wider, adapt=True)
    with pytest.raises(ValueError, match=r"wrong shape: decoder.embed gives \(210, 32\)"):
        load_weights(wider, weights)
    with pytest.raises(ValueError, match="left over: decoder.unembed"):
        load_weights(learned[0], Pix2Seq(replace(learned[0].config, shared_embedding=False)).state_dict())


def test_reference_weights_are_adapted_too():
    g = golden("ar_vit_cls_learned")
    model = Pix2Seq(replace(pix2seq_config(g.config), image_size=(96, 96), vocab_size=300))
    with pytest.raises(ValueError, match="--adapt"):
        load_reference_weights(model, g.weights, grid=(4, 6))
    notes = load_reference_weights(model, g.weights, adapt=True, grid=(4, 6))
    assert len(notes) == 5 and "encoder.position.code: grid of 4 x 6, the model has 6 x 6" in notes
    assert np.array_equal(model.decoder.unembed[:200].detach().numpy(), g.weights["model/decoder/ar_decoder.Soutp_token_embedding"])


# ---------------------------------------------------------------------------------------------------------------
# writing

LAYOUT = dict(bins=60, coord_shift=130, text_shift=190)


@pytest.mark.parametrize("name", ["ar_vit", "ar_resnet50_c4"])
def test_a_converted_checkpoint_predicts_as_one_of_ours(tmp_path, fake_tensorflow, name):
    g = golden(name)
    write_fake(tmp_path, g.weights)
    truth = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}, {"id": 29, "name": "dog"}]}
    (tmp_path / "instances.json").write_text(json.dumps(truth))
    target = str(tmp_path / "ours.pt")
    joints = {"categories": [{"id": 3, "name": "cat", "keypoints": ["ear"], "supercategory": "pet"}]}
    (tmp_path / "keypoints.json").write_text(json.dumps(joints))
    files = [str(tmp_path / "instances.json"), str(tmp_path / "keypoints.json")]
    torch.save(reference_checkpoint(str(tmp_path), files, image_size=(64, 96), **LAYOUT, **UNTOLD[name]), target)
    model, c = sample.load_model(target, "cpu")
    assert c.categories == [{"id": 3, "name": "cat", "keypoints": ["ear"], "label": 3}, {"id": 29, "name": "dog", "label": 29}]
    images = g["in:image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        g.check("out:logits", model(images, g["in:seq"]))
        labels, boxes, scores = sample.detect(model, model.encode(images), c, torch.Generator().manual_seed(0))
    assert boxes.shape == (2, 4, 4) and labels.max() < 30 and scores.isfinite().all()
    os.mkdir(tmp_path / "val2017")
    os.mkdir(tmp_path / "annotations")
    os.rename(tmp_path / "instances.json", tmp_path / "annotations/instances_val2017.json")
    c.data_dir = str(tmp_path)
    assert len(data.make_source(c, "val")) == 0


def test_a_converted_run_has_every_field_that_predicting_reads_as_a_run_has_it(tmp_path, fake_tensorflow):
    write_fake(tmp_path, golden("ar_vit").weights)
    torch.save(reference_checkpoint(str(tmp_path), image_size=(64, 96), **LAYOUT), str(tmp_path / "ours.pt"))
    run = torch.load(tmp_path / "ours.pt", weights_only=True)["config"]
    source = "".join(inspect.getsource(part) for part in (sample, eval, data.make_source))
    of_others = {"categories", "max_things", "data_seed", "val_count", "image_channels", "sample_steps", "sampler", "guidance", "td", "eval_samples"}
    read = set(re.findall(r"\bc\.(\w+)", source)) - of_others       # fields of drawn data and of generation
    known = {f.name: getattr(train.Config(), f.name) for f in fields(train.Config)}
    assert read - set(run) == set() and set(run) - set(known) == set()
    assert {k for k in m.CONVERTED_RUN if m.CONVERTED_RUN[k] != known[k]} == {"data", "bad_boxes"}


def test_classes_without_names_are_numbered(tmp_path, fake_tensorflow):
    write_fake(tmp_path, golden("ar_vit").weights)
    torch.save(reference_checkpoint(str(tmp_path), image_size=(64, 96), **LAYOUT), str(tmp_path / "ours.pt"))
    _, c = sample.load_model(str(tmp_path / "ours.pt"), "cpu")
    assert [k["name"] for k in c.categories] == [str(i) for i in range(1, 30)]


def test_a_vocabulary_that_is_not_the_checkpoints_is_refused(tmp_path, fake_tensorflow):
    write_fake(tmp_path, golden("ar_vit").weights)
    with pytest.raises(ValueError, match="200 tokens does not hold 1000 bins"):
        torch.save(reference_checkpoint(str(tmp_path), image_size=(64, 96)), str(tmp_path / "ours.pt"))


def test_converting_from_the_command_line(tmp_path, fake_tensorflow, monkeypatch, capsys):
    write_fake(tmp_path, golden("ar_vit").weights)
    command = ["model.py", "--convert", str(tmp_path), str(tmp_path / "ours.pt"), "--bins=60", "--coord_shift=130", "--text_shift=190"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="give it, --image_size"):
        m.main()
    monkeypatch.setattr(sys, "argv", command + ["--image_size=64,96"])
    m.main()
    assert "sample.py photo.jpg --ckpt=" in capsys.readouterr().out and os.path.exists(tmp_path / "ours.pt")


def test_a_run_that_generates_starts_from_the_averaged_weights_of_the_reference(tmp_path, fake_tensorflow):
    g = golden("rin_image")
    averaged = {name.replace("model/", "model/denoiser_ema/"): w for name, w in g.weights.items()}
    last = {name.replace("model/", "model/denoiser/"): w + 1 for name, w in g.weights.items()}
    write_fake(tmp_path, averaged | last)
    config = rin_config(g.config, g["in:cond"])
    run, expected = SimpleNamespace(generates=True, model=m.RIN(config), say=print), m.RIN(config)
    load_reference_weights(expected, g.weights)
    train.Run.start_from(run, SimpleNamespace(init_from=str(tmp_path)))
    assert all(torch.equal(w, expected.state_dict()[name]) for name, w in run.model.state_dict().items())

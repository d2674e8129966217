"""`unveil finetune` and `unveil predict`: what is trained, on what, how it is scored, and what is refused."""

import copy
import csv
import dataclasses
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm.data
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from small import build, clips_for, small
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from unveil import cli, finetuning
from unveil import recognition_job as job_module
from unveil.checkpoint import BEST, LAST, WEIGHTS, About, load_model, save_weights
from unveil.data import Samples, open_source
from unveil.features import encoder_features
from unveil.finetuning import SMALL, Recognition, preset_of
from unveil.layers import Block
from unveil.metrics import accuracy, confusion, knn_predictions
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import layer_decay_groups
from unveil.recipe import section_from_dict, to_dict
from unveil.recognizer import (
    Recognizer,
    blend,
    load_recognizer,
    resample_positions,
    score,
    tensors_for,
    to_targets,
)
from unveil.sources import Listed
from unveil.targets import Truth, chosen_truth, truth_of
from unveil.tasks.embed import Embed, embed
from unveil.tasks.finetune import Finetune, finetune, split, training_of
from unveil.tasks.predict import Predict, predict
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe
from unveil.tokens import sincos_positions

DIGIT = {"size": "Nano/2", "channels": 1, "height": 8}
ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
DIGITS = tuple("0123456789")


def recognition(
    task: Any = "single", pool: Any = "mean", outputs: tuple[str, ...] = DIGITS, **numbers: Any
) -> Recognition:
    scales = {"offset": (0.0,) * len(outputs), "scale": (1.0,) * len(outputs)} if task == "regression" else {}
    training = dataclasses.replace(SMALL, **numbers)
    return Recognition(task=task, outputs=outputs, pool=pool, training=training, **scales)


def save(run: Path, name: str = "diffmae", **arguments: Any) -> Path:
    """A run whose weights were drawn."""
    model = build(small(name, **{**DIGIT, **arguments}))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return run


def tuned(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Two epochs of two steps on 360 digits, tested on themselves, unless the options say otherwise."""
    given = {"data": "digits:test", "test_data": "digits:test", "epochs": 2, "batch_size": 180, "device": "cpu"}
    return finetune(Finetune(run=run, out=out, **{**given, **options}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save(tmp_path / "run")


# Presets


@pytest.mark.parametrize(
    "size, num_samples, preset",
    [("B/16", 1_300_000, "B"), ("L/16", 1_300_000, "L"), ("H/14", 50_000, "H"), ("S/16", 50_000, "B"),
     ("B/16", 3_000, "small"), ("Micro/4", 50_000, "small"), ("Nano/2", 1_300_000, "small")],
)  # fmt: skip
def test_the_preset_goes_by_size_and_data(size: str, num_samples: int, preset: str) -> None:
    assert preset_of(size, num_samples) == preset


@pytest.mark.parametrize(
    "preset, epochs, blr, layer_decay, drop_path",
    [("B", 100, 5e-4, 0.65, 0.1), ("L", 50, 1e-3, 0.75, 0.2), ("H", 50, 1e-3, 0.75, 0.3)],
)
def test_the_published_presets(preset: str, epochs: int, blr: float, layer_decay: float, drop_path: float) -> None:
    """MAE's FINETUNE.md."""
    p = finetuning.PRESETS[preset]
    assert (p.epochs, p.base_lr, p.layer_decay, p.drop_path) == (epochs, blr, layer_decay, drop_path)
    assert (p.batch_size, p.warmup_epochs, p.min_lr, p.beta2, p.weight_decay) == (1024, 5, 1e-6, 0.999, 0.05)
    assert (p.mixup, p.cutmix, p.label_smoothing, p.erase, p.randaugment_ops) == (0.8, 1.0, 0.1, 0.25, 2)
    assert (p.randaugment_magnitude, p.ema_decays, p.crop_scale, p.flip) == (9, (), 0.08, True)


def test_a_head_round_trips() -> None:
    for made in (recognition(), recognition("regression", outputs=("a", "b"))):
        assert section_from_dict(Recognition, json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize(
    "values, message",
    [
        ({"drop_path": 1.0}, "drop_path=1.0; it must be at least 0 and below 1"),
        ({"layer_decay": 0.0}, "layer_decay=0.0; it must be above 0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"cutmix": math.nan}, "cutmix=nan"),
        ({"erase": 2.0}, "erase=2.0; it is a probability"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"randaugment_ops": 15}, "randaugment_ops=15"),
        ({"randaugment_magnitude": 11}, "randaugment_magnitude=11"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_numbers_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SMALL, **values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"outputs": ("a",)}, "needs at least 2"),
        ({"outputs": (), "task": "multi"}, "needs at least 1"),
        ({"offset": (0.0,)}, "has 1 offsets and 0 scales; it has 0 of each"),
        ({"pool": "max"}, "pool='max'"),
        ({"task": "sort"}, "task='sort'"),
    ],
)
def test_a_head_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(recognition(), **values)


# The network


@pytest.mark.parametrize("name", ["mae", "diffmae", "umd", "umd_flow", "dit", "dit_umd", "mae_umd", "maskdit"])
def test_the_head_reads_the_features_that_were_pretrained(name: str) -> None:
    """By class tokens the pooled vector is that of the probes, for an encoder that knew noise at t = 0; by patches it lacks
    their norm, which comes after the mean instead."""
    recipe = small(name)
    model = build(recipe)
    clips = clips_for(recipe, 3)
    for pool in ("class", "mean"):
        if pool == "class" and not recipe.encoder.num_class_tokens:
            with pytest.raises(ValueError, match="no class token"):
                Recognizer(recipe, recognition(pool=pool))
            continue
        told = recognition(pool=pool)
        network = Recognizer(recipe, told).eval()
        network.load_state_dict({**network.state_dict(), **tensors_for(model, recipe, told)})
        pooled = network.pooled(clips)
        if pool == "class":
            torch.testing.assert_close(pooled, encoder_features(model, "class")(clips, torch.arange(3)))
        else:
            encoder, R = copy.deepcopy(network), recipe.encoder.num_class_tokens
            encoder.fc_norm = torch.nn.Identity()
            blocks = encoder.pooled(clips)
            norm = model.encoder.norm if model.decoder is not None else model.head.norm
            per_token = encoder.encode(clips)[:, R:]
            torch.testing.assert_close(norm(per_token), model.encode(clips)[:, R:])
            torch.testing.assert_close(
                pooled, F.layer_norm(blocks, blocks.shape[1:], eps=1e-6)
            ) if name != "umd_flow" else None
        assert network(clips).shape == (3, 10)


def test_only_the_head_is_new(run: Path) -> None:
    model, _ = load_model(run)
    network = Recognizer(model.recipe, recognition())
    fresh = network.state_dict().keys() - tensors_for(model, model.recipe, recognition()).keys()
    assert fresh == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    fresh = network.state_dict().keys() - tensors_for(model, model.recipe, recognition(pool="class")).keys()
    assert fresh == {"head.weight", "head.bias"}
    assert network.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)  # MAE's: the first prediction is even
    assert not network.head.bias.any()


@pytest.mark.parametrize("name", ["mae", "umd", "umd_flow", "umd_finetune"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    recipe = small(name)
    network = Recognizer(recipe, recognition())
    network.load_state_dict({**network.state_dict(), **tensors_for(build(recipe), recipe, recognition())})
    torch.nn.init.normal_(network.head.weight)
    F.cross_entropy(network(clips_for(recipe, 4)), torch.arange(4)).backward()
    silent = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"encoder.cls_token"}, silent  # which the patches' mean of a one-block path may ignore
    assert "condition.time.fc1.weight" not in silent


def test_learned_positions_are_resampled_as_timm_does() -> None:
    recipe = small("umd")
    other = dataclasses.replace(recipe, clip=dataclasses.replace(recipe.clip, height=24, width=32))
    model = build(recipe)
    kept = tensors_for(model, other, recognition())["encoder.positions.pos_embed"]
    old = model.encoder.positions.pos_embed.detach()
    expected = resample_abs_pos_embed(old[None], [6, 8], [4, 4], num_prefix_tokens=0)[0]
    torch.testing.assert_close(kept, expected)
    network = Recognizer(other, recognition())
    network.load_state_dict({**network.state_dict(), **tensors_for(model, other, recognition())})
    assert network(clips_for(other, 2)).shape == (2, 10)


def test_positions_are_resampled_in_time() -> None:
    """A table that is linear in time and the same everywhere stays linear."""
    table = torch.arange(4.0)[:, None, None, None].expand(4, 2, 2, 3).reshape(-1, 3)
    twice = resample_positions(table, (4, 2, 2), (8, 2, 2)).reshape(8, 2, 2, 3)
    torch.testing.assert_close(twice[:, 0, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    assert (twice == twice[:, :1, :1, :1]).all()


def test_drop_path_grows_as_timms_and_sleeps_in_evaluation() -> None:
    network = Recognizer(small("mae", depth=5), recognition(drop_path=0.4))
    twin = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=4, drop_path_rate=0.4)
    ours = [getattr(block.drop, "p", 0.0) for block in network.encoder.blocks]
    theirs = [getattr(block.drop_path1, "drop_prob", 0.0) for block in twin.blocks]
    assert ours == pytest.approx(theirs)
    assert ours == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block = Block(32, 4, drop_path=0.5)
    plain = Block(32, 4)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2000, 3, 32)
    torch.testing.assert_close(block.eval()(x), plain(x))
    torch.manual_seed(0)
    block.train()
    skipped = (block(x) == x).flatten(1).all(1).float().mean()
    assert skipped == pytest.approx(0.25, abs=0.03)  # both branches
    kept = block.drop(x)  # a row is dropped, or as much larger as others are dropped
    assert ((kept == 0) | (kept == 2 * x)).all()


def test_layers_are_grouped_as_timm_groups_them() -> None:
    network = Recognizer(small("mae", depth=5), recognition())
    twin = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=4, num_classes=10, global_pool="avg"
    )
    names = {id(p): n.removeprefix("encoder.") for n, p in network.named_parameters()}
    theirs_named = {id(p): n for n, p in twin.named_parameters()}

    def by_name(groups: Any, names: dict[int, str]) -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (round(group["lr_scale"], 12), group["weight_decay"])
            for group in groups
            for p in group["params"]
        }

    ours = by_name(layer_decay_groups(network, 5, 0.05, 0.65), names)
    groups = timm.optim.param_groups_layer_decay(twin, 0.05, twin.no_weight_decay(), layer_decay=0.65)
    theirs = by_name(groups, theirs_named)
    theirs.pop("pos_embed")  # ours are fixed
    assert ours == theirs
    assert ours["head.weight"] == (1.0, 0.05)
    assert ours["cls_token"] == (round(0.65**6, 12), 0.0)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in twin.parameters()) - 17 * 32


def test_what_tells_the_time_learns_as_slowly_as_the_patches() -> None:
    network = Recognizer(small("umd"), recognition())
    scale = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in layer_decay_groups(network, 3, 0.05, 0.5)
        for p in g["params"]
    }
    named = {n: scale[id(p)] for n, p in network.named_parameters()}
    assert len(scale) == len(named)
    assert named["condition.time.fc1.weight"] == named["encoder.patch_embed.proj.weight"] == (0.5**4, 0.05)
    assert named["encoder.positions.pos_embed"] == (0.5**4, 0.0)
    assert named["encoder.blocks.2.modulation.weight"] == (0.5, 0.05)


# Blending


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pictures_and_labels_are_blended_alike(kind: str) -> None:
    clips = torch.rand(6, 3, 2, 8, 8)
    targets = F.one_hot(torch.arange(6)).float()
    shares = set()
    for i in range(20):
        mixed, soft = blend(clips, targets, dataclasses.replace(SMALL, **{kind: 1.0}), i)
        share = soft[1, 1].item()
        shares.add(round(share, 6))
        torch.testing.assert_close(soft, share * targets + (1 - share) * targets.roll(1, 0))
        if kind == "mixup":
            torch.testing.assert_close(mixed, share * clips + (1 - share) * clips.roll(1, 0))
        else:
            kept = (mixed == clips).all(1)
            assert ((mixed == clips) | (mixed == clips.roll(1, 0))).all()
            assert kept.float().mean().item() == pytest.approx(share, abs=1e-6)
            assert (kept == kept[:1, :1]).all()  # the same part in every clip and frame
    assert len(shares) > 5


def test_a_coin_decides_between_the_two() -> None:
    clips, targets = torch.rand(2, 1, 1, 16, 16), torch.eye(2)
    training = dataclasses.replace(SMALL, mixup=0.8, cutmix=1.0)
    pasted = 0
    for i in range(200):
        mixed, _ = blend(clips, targets, training, i)
        pasted += int(((mixed == clips) | (mixed == clips.roll(1, 0))).all())
    assert 70 < pasted < 130
    state = torch.random.get_rng_state()
    again = [blend(clips, targets, training, 7)[0] for _ in range(2)]
    assert again[0].equal(again[1])
    assert state.equal(torch.random.get_rng_state())


def test_nothing_is_blended_unless_asked() -> None:
    clips, targets = torch.rand(2, 1, 1, 4, 4), torch.eye(2)
    assert blend(clips, targets, SMALL, 0)[0] is clips
    assert blend(clips[:1], targets[:1], dataclasses.replace(SMALL, mixup=1.0), 0)[0].equal(clips[:1])


def test_smoothed_targets_are_timms() -> None:
    """timm smooths before it blends, cross entropy after: the same."""
    labels, share, K, smoothing = torch.tensor([1, 4, 0, 2]), 0.3, 5, 0.1
    soft = share * F.one_hot(labels, K).float() + (1 - share) * F.one_hot(labels.flip(0), K).float()
    theirs = timm.data.mixup.mixup_target(labels, K, lam=share, smoothing=smoothing)
    logits = torch.randn(4, K)
    expected = -(theirs * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, soft, label_smoothing=smoothing), expected)


def test_erasing_and_changes_depend_on_the_sample_alone() -> None:
    recipe = small("mae", height=16, channels=1)
    training = dataclasses.replace(SMALL, erase=1.0, randaugment_ops=2, crop_scale=0.3)
    source = open_source("digits:test", 1)
    first, second = (Samples(source, recipe.clip, 0, training) for _ in range(2))
    plain = Samples(source, recipe.clip, 0, dataclasses.replace(training, erase=0.0))
    changed = 0
    for i in range(20):
        a, b, c = first[0, i, i].clip, second[0, i, i].clip, plain[0, i, i].clip
        assert a is not None
        assert b is not None
        assert c is not None
        assert a.equal(b)
        changed += not a.equal(c)
        assert c.min() >= 0
        assert c.max() <= 1
        assert not a.equal(first[1, i, i].clip)  # type: ignore[arg-type]
    assert changed == 20
    calm = Samples(source, recipe.clip, 0, dataclasses.replace(training, erase=0.0, randaugment_ops=0))
    same = sum(bool(torch.equal(plain[0, i, i].clip, calm[0, i, i].clip)) for i in range(20))  # type: ignore[arg-type]
    assert same < 10


# Truth


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Six grey pictures, their brightness rising, in a table."""
    folder = tmp_path / "table"
    (folder / "pictures").mkdir(parents=True)
    rows = [["path", "label", "marks", "dark", "value"]]
    for i in range(6):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / "pictures" / f"{i}.png")
        rows.append(
            [f"pictures/{i}.png", ["cat", "dog"][i % 2], ["a|b", "b", "", "a", "a | b", "b"][i], int(i < 3), i / 2]
        )
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "labels.csv"


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_table_holds_classes_labels_and_numbers(listed: Path) -> None:
    source = open_source(str(listed), 1)
    assert isinstance(source, Listed)
    assert (len(source), source.classes, [source.label(i) for i in range(3)]) == (6, ("cat", "dog"), [0, 1, 0])
    assert source.read(2).values.unique().tolist() == [80]
    assert source.where(2) == "pictures/2.png"
    classes = truth_of(source, "single", ("label",))
    assert (classes.values.tolist(), classes.outputs) == ([0, 1] * 3, ("cat", "dog"))
    marks = truth_of(source, "multi", ("marks",))
    assert marks.outputs == ("a", "b")
    assert marks.values.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0], [1, 1], [0, 1]]
    dark = truth_of(source, "multi", ("dark",))
    assert (dark.outputs, dark.values[:, 0].tolist()) == (("dark",), [1, 1, 1, 0, 0, 0])
    numbers = truth_of(source, "regression", ("value", "dark"))
    assert numbers.values[:, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert numbers.known.all()


def test_a_parquet_table_is_read_too(listed: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = listed.with_suffix(".parquet")
    pq.write_table(pa.table({"path": [f"pictures/{i}.png" for i in range(3)], "label": [7, None, 10]}), table)
    source = open_source(str(table), 1)
    assert source.classes == ("7", "10")  # numbers in their order
    assert [source.label(i) for i in range(3)] == [0, None, 1]


def test_the_training_data_decide_what_a_column_of_labels_is(listed: Path) -> None:
    """0 and 1 in a test table are the labels "0" and "1" if the training table has others beside them."""
    source = open_source(str(listed), 1)
    told = truth_of(source, "multi", ("dark",), ("0", "1", "2"))
    assert told.outputs == ("0", "1", "2")
    assert told.values.tolist() == [[0, 1, 0]] * 3 + [[1, 0, 0]] * 3


def test_lists_are_no_labels(listed: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = listed.with_suffix(".parquet")
    pq.write_table(pa.table({"path": ["pictures/0.png"], "marks": [["a", "b"]]}), table)
    with pytest.raises(ValueError, match=r"has \['a', 'b'\] in marks\. Write labels as text with | between"):
        truth_of(open_source(str(table), 1), "multi", ("marks",))


def test_small_numbers_are_standardised_too() -> None:
    truth = Truth(torch.tensor([[1e-7, 5.0], [3e-7, 5.0]]), torch.ones(2, dtype=torch.bool), ("a", "b"), (0, 0), (1, 1))
    chosen = chosen_truth(truth, [0, 1])
    assert chosen.scale == pytest.approx((1e-7, 1.0))
    assert chosen.offset == pytest.approx((2e-7, 5.0))


def test_an_empty_cell_is_no_label(listed: Path) -> None:
    rewrite(listed, "1.png,dog", "1.png,")
    rewrite(listed, "0,1.5", "0,")
    source = open_source(str(listed), 1)
    assert truth_of(source, "single", ("label",)).known.tolist() == [True, False, True, True, True, True]
    assert truth_of(source, "regression", ("value",)).known.tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("3.png", "no.png", "lists 1 of 6 files that do not exist, the first in row 4: 'pictures/no.png'"),
        ("path,", "file,", "has no column 'path', only file, label, marks, dark, value"),
        ("pictures/3.png", "", "has no path in its row 4 of 6"),
        ("2.png,cat,", "2.png,cat,red,", "has 5 columns, but row 3 has 6 values"),
        ("marks,dark", "marks,marks", "has several columns 'marks'"),
    ],
)
def test_a_table_refuses(listed: Path, old: str, new: str, message: str) -> None:
    rewrite(listed, old, new)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(str(listed), 1)


@pytest.mark.parametrize(
    "task, columns, old, new, message",
    [
        ("multi", ("nothing",), "", "", "has no column 'nothing', only path, label, marks, dark, value"),
        ("multi", ("dark", "value"), "", "", "has labels other than 0 and 1 in dark, value, as 0.5"),
        ("regression", ("value",), "1.5", "much", "has 'much' in the column 'value', row 4, which is no number"),
        ("regression", ("value",), "1.5", "inf", "has 'inf' in the column 'value', row 4"),
        (
            "regression",
            ("value",),
            "1.5",
            "1e101",
            "has '1e101' in the column 'value', row 4, which is no number",
        ),
        ("single", ("marks",), "", "", "--label-columns marks with --task single"),
    ],
)
def test_truth_refuses(listed: Path, task: Any, columns: tuple[str, ...], old: str, new: str, message: str) -> None:
    if old:
        rewrite(listed, old, new)
    with pytest.raises(ValueError, match=re.escape(message)):
        truth_of(open_source(str(listed), 1), task, columns)


def test_a_test_set_may_lack_a_class_but_not_bring_one(tmp_path: Path, run: Path) -> None:
    for folder, classes in (("train", "abc"), ("test", "ac"), ("strange", "ad")):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((8, 8), 40 * i + ord(name), np.uint8)).save(
                    tmp_path / folder / name / f"{i}.png"
                )
    given = {"data": str(tmp_path / "train"), "batch_size": 6}
    result = tuned(run, tmp_path / "out", test_data=str(tmp_path / "test"), **given)
    assert result["outputs"] == ["a", "b", "c"]
    assert result["per_class_accuracy"]["b"] is None
    assert np.sum(result["confusion"], 1).tolist() == [4, 0, 4]
    with pytest.raises(ValueError, match="has the class 'd', which the training data lacks: it has a, b, c"):
        tuned(run, tmp_path / "other", test_data=str(tmp_path / "strange"), **given)
    assert not (tmp_path / "other").exists()


# Scores


def test_scores_of_classes() -> None:
    outputs = torch.eye(7)[[0, 1, 2, 3, 4, 5, 6, 0]] + torch.linspace(0.1, 0, 7)
    truth = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    numbers = score(recognition(outputs=DIGITS[:7]), outputs, truth)
    assert numbers["accuracy"] == numbers["score"] == pytest.approx(100 * 7 / 8)
    assert numbers["top5"] == pytest.approx(100 * 7 / 8)
    assert numbers["mean_class_accuracy"] == pytest.approx(100 * 6.5 / 7)


def test_scores_of_labels_and_numbers() -> None:
    truth = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
    outputs = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.55, 0.1], [0.4, 0.7, 0.1]])
    numbers = score(recognition("multi", outputs=("a", "b", "c")), outputs, truth)
    # a: 0.9 and 0.4 are its, ranked first and second; b: 0.7 its, 0.6 not, 0.55 its: (1 + 2/3) / 2; c never occurs
    assert numbers["mean_average_precision"] == pytest.approx(100 * (1 + 5 / 6) / 2)
    assert numbers["labels_right"] == pytest.approx(100 * 7 / 9)
    numbers = score(
        recognition("regression", outputs=("y",)), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    )
    assert (numbers["r2"], numbers["mean_absolute_error"]) == (pytest.approx(0.5), pytest.approx(0.5))


# Runs


@pytest.mark.usefixtures("curves")
def test_a_run_leaves_weights_numbers_and_a_page(tmp_path: Path, run: Path) -> None:
    result = tuned(run, tmp_path / "out", epochs=3, ema_decays=(0.5,))
    out = tmp_path / "out"
    assert {WEIGHTS, LAST, BEST, "report.html", "evaluation.json", "contact_sheet.png"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "evaluation.json").read_text())["last"] == result["last"]
    assert np.sum(result["confusion"]) == 360
    assert result["last"]["accuracy"] == pytest.approx(100 * np.trace(result["confusion"]) / 360, abs=1e-4)
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3
    assert "Each class" in page
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tested = [r for r in records if "test/score" in r]
    assert [r["step"] for r in tested] == [2, 4, 6]
    assert result["best"]["score"] == max(r["test/score"] for r in tested)
    best, about = load_recognizer(out / BEST)
    assert (about.step, about.ema_decay) == (result["best"]["step"], 0.5)
    assert load_recognizer(out)[1].ema_decay == 0.5
    assert load_recognizer(out / LAST)[1].ema_decay is None
    assert best.recognition.outputs == DIGITS


def test_all_weights_move_and_the_optimiser_stepped(tmp_path: Path, run: Path) -> None:
    tuned(run, tmp_path / "out", epochs=1, batch_size=360)  # one step
    old = load_model(run)[0].state_dict()
    new = load_recognizer(tmp_path / "out")[0].state_dict()
    moved = {name for name, value in new.items() if name not in old or not value.equal(old[name])}
    assert {"head.weight", "head.bias"} <= moved
    result = tuned(run, tmp_path / "more")
    assert result["steps_now"] == 4
    new = load_recognizer(tmp_path / "more")[0].state_dict()
    same = {name for name, value in new.items() if name in old and value.equal(old[name])}
    assert not same


def terminate_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    calls = iter(range(10**6))
    real = job_module.blend

    def act(*arguments: Any) -> Any:
        if next(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(job_module, "blend", act)


@pytest.mark.parametrize("name", ["diffmae", "umd"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Bit for bit, with everything random at work, in the middle of an epoch."""
    run = save(tmp_path / "run", name)
    given = {
        "epochs": 3, "batch_size": 90, "mixup": 0.8, "cutmix": 1.0, "erase": 0.5, "drop_path": 0.3, "ema_decays": (0.9,),
        "randaugment_ops": 2, "accumulate": 2,
    }  # fmt: skip
    whole = tuned(run, tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        terminate_at(patch, 2 * 5)
        stopped = tuned(run, tmp_path / "out", **given)
    assert (stopped["finished"], stopped["step"]) == (False, 6)
    resumed = tuned(run, tmp_path / "out", **given)
    assert (resumed["finished"], resumed["steps_now"]) == (True, 6)
    for file in (WEIGHTS, LAST, BEST):
        ours, theirs = (safetensors.torch.load_file(tmp_path / where / file) for where in ("out", "whole"))
        assert all(value.equal(theirs[n]) for n, value in ours.items()), file
    for name in ("last", "best", "confusion"):
        assert resumed[name] == whole[name]
    again = tuned(run, tmp_path / "out", **given)
    assert (again["steps_now"], again["last"]) == (0, whole["last"])


def test_an_interruption_during_an_evaluation_is_saved(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(run, tmp_path / "whole", epochs=3)
    real = job_module.told

    def act(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "told", act)
        stopped = tuned(run, tmp_path / "out", epochs=3)
    assert (stopped["finished"], stopped["step"]) == (False, 2)
    resumed = tuned(run, tmp_path / "out", epochs=3)
    assert (resumed["steps_now"], resumed["last"]) == (4, whole["last"])


def test_no_numbers_are_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recognizer, "tell", lambda self, output: output * math.nan)
    with pytest.raises(ValueError, match="What the network tells became infinite or no numbers"):
        tuned(run, tmp_path / "out")
    assert not (tmp_path / "out" / BEST).exists()


def test_each_layer_learns_at_its_own_rate(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, cosine to min_lr, and each layer's share of it, in what AdamW is given."""
    seen: list[set[float]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        seen.append({group["lr"] for group in self.param_groups})
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tuned(run, tmp_path / "out", epochs=4, blr=0.256, batch_size=180, warmup_epochs=1.0, layer_decay=0.5)
    lr, low = 0.256 * 180 / 256, 1e-6
    assert len(seen) == 8
    for i, rates in enumerate(seen):
        wanted = lr * (i + 1) / 2 if i < 2 else low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (i - 2) / 6))
        assert sorted(rates) == pytest.approx([wanted * 0.5**layer for layer in (4, 3, 2, 1, 0)])


def test_the_running_average_is_what_is_tested(tmp_path: Path, run: Path) -> None:
    result = tuned(run, tmp_path / "out", ema_decays=(0.999,), blr=0.05, epochs=6)
    accuracies = {}
    for file in (WEIGHTS, LAST):
        network, _ = load_recognizer(tmp_path / "out" / file)
        samples = Samples(open_source("digits:test", 1), network.recipe.clip, 0, None)
        clips = torch.stack([samples[0, i, i].clip for i in range(360)])  # type: ignore[misc]
        truth = torch.tensor([samples.source.label(i) for i in range(360)])
        accuracies[file] = score(network.recognition, network.predict(clips), truth)["accuracy"]
    assert result["last"]["accuracy"] == pytest.approx(accuracies[WEIGHTS])
    assert accuracies[WEIGHTS] != pytest.approx(accuracies[LAST])


def test_a_run_of_other_settings_is_another_run(tmp_path: Path, run: Path) -> None:
    tuned(run, tmp_path / "out")
    for other in ({"drop_path": 0.2}, {"from_scratch": True}, {"seed": 1}, {"labels_per_class": 20}, {"epochs": 3}):
        with pytest.raises(ValueError, match="holds another run"):
            tuned(run, tmp_path / "out", **other)


def test_pieces_of_a_batch_add_up(tmp_path: Path, run: Path) -> None:
    """The same steps, whether a batch is computed at once or in unequal pieces; in pre-training too."""
    for n in (1, 7):
        tuned(run, tmp_path / f"{n}", accumulate=n, drop_path=0.0, blr=1e-3)
    one, seven = (load_recognizer(tmp_path / n)[0].state_dict() for n in ("1", "7"))
    for name, value in one.items():
        torch.testing.assert_close(seven[name], value, rtol=0, atol=2e-5)
    for recipe in ("diffmae", "umd"):
        made = []
        for n in (1, 4):
            out = tmp_path / f"{recipe}{n}"
            asked = {"epochs": 1, "batch_size": 180, "blr": 1e-3, "warmup_epochs": 0.0, "ema_decays": ()}
            pretrain(Pretrain(data="digits:test", out=out, recipe=recipe, accumulate=n, device="cpu", **asked))
            made.append(load_model(out)[0].state_dict())
        moved = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = MaskedDiffusionAutoencoder(load_model(tmp_path / f"{recipe}1")[0].recipe).state_dict()
        for name, value in made[0].items():
            # keys' biases have no gradient but rounding, of which AdamW makes whole steps
            some = 0.51 if name.endswith(("qkv.bias", "kv.bias")) else 0.005
            assert ((made[1][name] - value).abs() > 2e-5).float().mean() < some, name
            moved = max(moved, (value - drawn[name]).abs().max().item())
        assert moved > 5e-4


def test_from_scratch_is_the_same_network_with_drawn_weights(tmp_path: Path, run: Path) -> None:
    result = tuned(run, tmp_path / "out", from_scratch=True, epochs=1, batch_size=360, blr=1e-12)
    assert (result["loaded"], result["start"]) == (1, "random weights")  # positions, which begin as the fixed table
    new, old = load_recognizer(tmp_path / "out")[0], load_model(run)[0]
    assert not new.encoder.blocks[0].attn.qkv.weight.allclose(old.encoder.blocks[0].attn.qkv.weight, atol=1e-3)
    pretrained = tuned(run, tmp_path / "other", epochs=1, batch_size=360, blr=1e-12)
    assert pretrained["loaded"] == pretrained["tensors"] - 4
    kept = load_recognizer(tmp_path / "other")[0]
    torch.testing.assert_close(kept.encoder.blocks[0].attn.qkv.weight, old.encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["mae", "diffmae", "umd", "dit"])
def test_another_picture_size(tmp_path: Path, name: str) -> None:
    run = save(tmp_path / "run", name)
    result = tuned(run, tmp_path / "out", image_size="12x8", epochs=1, labels_per_class=5, batch_size=50)
    assert (result["train_samples"], result["test_samples"]) == (50, 360)
    network, old = load_recognizer(tmp_path / "out")[0], load_model(run)[0]
    assert (network.recipe.clip.height, network.recipe.clip.width) == (12, 8)
    expected = resample_positions(old.encoder.positions.table(), old.recipe.clip.grid, network.recipe.clip.grid)
    trained = network.encoder.positions.table()
    assert (trained - expected).abs().max() < 0.1  # one epoch moves them little; a new table would be up to 2 away
    assert (trained - sincos_positions(32, network.recipe.clip.grid)).abs().max() > 0.3 or name == "umd"
    assert "encoder.positions.pos_embed" in dict(network.named_parameters())


def test_a_fifth_is_held_out(tmp_path: Path, run: Path) -> None:
    result = tuned(run, tmp_path / "out", test_data=None, epochs=1)
    assert (result["train_samples"], result["test_samples"], result["trained_on_too"]) == (290, 70, 0)
    truth = truth_of(open_source("digits:test", 1), "single", ("label",))
    assert np.sum(result["confusion"], 1).tolist() == [round(n / 5) for n in truth.values.bincount().tolist()]


def test_a_class_of_few_keeps_one_to_train_on(tmp_path: Path, run: Path) -> None:
    for seed in range(5):
        for name, number in (("a", 1), ("b", 2), ("c", 9)):
            (tmp_path / "few" / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                Image.fromarray(np.full((8, 8), 9 * i + ord(name), np.uint8)).save(tmp_path / f"few/{name}/{i}.png")
        options = Finetune(run=run, data=str(tmp_path / "few"), out=tmp_path / "x", seed=seed)
        source, truth, test, _, unlabelled = split(options, load_model(run)[0].recipe)
        assert (len(source), len(test), unlabelled) == (10, 2, 0)
        assert truth.values.bincount().tolist() == [1, 2, 7]


def test_what_is_tested_and_trained_on_is_counted(tmp_path: Path, run: Path, listed: Path) -> None:
    assert tuned(run, tmp_path / "same", epochs=1)["trained_on_too"] == 360
    given = {"epochs": 1, "batch_size": 6, "labels_per_class": 2}
    result = tuned(run, tmp_path / "out", data=str(listed), test_data=str(listed), **given)
    assert (result["train_samples"], result["trained_on_too"]) == (4, 4)


def test_broken_test_files_are_told(tmp_path: Path, run: Path, listed: Path) -> None:
    (listed.parent / "pictures/0.png").write_bytes(b"no picture")
    given = {"data": "digits:test", "epochs": 1, "batch_size": 180}
    copy = listed.with_name("digits.csv")
    copy.write_text(listed.read_text().replace(",cat,", ",1,").replace(",dog,", ",2,"))
    result = tuned(run, tmp_path / "out", test_data=str(copy), **given)
    assert result["test_samples"] == 5
    assert result["test_problems"][0]["where"] == "pictures/0.png"
    assert np.sum(result["confusion"], 1).tolist() == [0, 2, 3, 0, 0, 0, 0, 0, 0, 0]  # 0.png was a cat, 1
    network, _ = load_recognizer(tmp_path / "out")
    samples = Samples(open_source(str(copy), 1), network.recipe.clip, 0, None)
    told = network.predict(torch.stack([samples[0, i, i].clip for i in range(1, 6)]))  # type: ignore[misc]
    assert result["confusion"] == confusion(told.argmax(1), torch.tensor([2, 1, 2, 1, 2]), 10).tolist()
    for i in range(6):
        (listed.parent / f"pictures/{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="The first samples of the test data cannot be read"):
        tuned(run, tmp_path / "other", test_data=str(copy), **given)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "task, columns", [("multi", ("marks",)), ("multi", ("dark",)), ("regression", ("value", "dark"))]
)
def test_labels_and_numbers_are_learned(
    tmp_path: Path, listed: Path, run: Path, task: Any, columns: tuple[str, ...]
) -> None:
    given = {"epochs": 60, "batch_size": 6, "eval_epochs": 30, "drop_path": 0.0, "label_smoothing": 0.0, "flip": False}
    if columns == ("marks",):
        given |= {"pool": "class"}
    result = tuned(
        run, tmp_path / "out", data=str(listed), test_data=str(listed), task=task, label_columns=columns, blr=0.1,
        **given,
    )  # fmt: skip
    assert result["last"]["score"] > (0.8 if task == "regression" else 95)
    assert "confusion" not in result
    network, _ = load_recognizer(tmp_path / "out")
    made = predict(Predict(run=tmp_path / "out", data=str(listed), out=tmp_path / "told.csv", device="cpu"))
    assert made["samples"] == 6
    multi = task == "multi"
    assert (made["counts"] is None) == (not multi)
    with (tmp_path / "told.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", *(["told"] if multi else []), *network.recognition.outputs]
    if multi:
        for row in rows:
            above = [name for name in network.recognition.outputs if float(row[name]) > 0.5]
            assert row["told"] == "|".join(above)
        assert sum(made["counts"].values()) == sum(len(row["told"].split("|")) for row in rows if row["told"])
    if task == "regression":
        assert [float(row["value"]) for row in rows] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=0.5)
        assert to_targets(network.recognition, torch.tensor([[1.25, 0.5]]))[0].tolist() == pytest.approx(
            [0, 0], abs=1e-5
        )


def test_predictions_are_those_of_the_network(tmp_path: Path, run: Path) -> None:
    result = tuned(run, tmp_path / "out", epochs=4, layer_decay=1.0, blr=0.02)
    (tmp_path / "new").mkdir()
    source = open_source("digits:test", 1)
    for i in range(5):
        values = source.read(i).values[0, 0].numpy()
        Image.fromarray(values).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "new" / "broken.png").write_bytes(b"no picture")
    made = predict(Predict(run=tmp_path / "out", data=str(tmp_path / "new"), out=tmp_path / "told.csv", device="cpu"))
    assert (made["samples"], made["skipped"]) == (5, 1)
    with (tmp_path / "told.csv").open() as file:
        rows = list(csv.DictReader(file))
    network, _ = load_recognizer(tmp_path / "out")
    samples = Samples(source, network.recipe.clip, 0, None)
    expected = network.predict(torch.stack([samples[0, i, i].clip for i in range(5)]))  # type: ignore[misc]
    for row, probabilities in zip(rows, expected, strict=True):
        assert row["told"] == DIGITS[int(probabilities.argmax())]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-3)
        assert sum(float(row[name]) for name in DIGITS) == pytest.approx(1, abs=1e-4)
    assert sum(made["counts"].values()) == 5
    assert result["last"]["accuracy"] > 15


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_what_the_head_reads_can_be_embedded(tmp_path: Path, run: Path, pool: Any) -> None:
    tuned(run, tmp_path / "out", pool=pool)
    made = embed(Embed(run=tmp_path / "out", data="digits:test", out=tmp_path / "features.npz", device="cpu"))
    assert (made["pool"], made["shape"]) == (pool, [32])
    network, _ = load_recognizer(tmp_path / "out")
    samples = Samples(open_source("digits:test", 1), network.recipe.clip, 0, None)
    clips = torch.stack([samples[0, i, i].clip for i in range(9)])  # type: ignore[misc]
    with np.load(tmp_path / "features.npz") as file:
        torch.testing.assert_close(
            torch.from_numpy(file["features"][:9]), network.pooled(clips).detach(), rtol=0, atol=1e-5
        )
    with pytest.raises(ValueError, match="so it has no other features"):
        embed(Embed(run=tmp_path / "out", data="digits:test", out=tmp_path / "x.npz", pool="patches", device="cpu"))


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_what_the_head_reads_can_be_probed(tmp_path: Path, run: Path, pool: Any) -> None:
    """Of neighbours in the features that `embed` writes."""
    tuned(run, tmp_path / "out", pool=pool)
    made = probe(Probe(run=tmp_path / "out", data="digits:train", test_data="digits:test", method="knn", device="cpu"))
    assert made["pool"] == pool
    parts = {}
    for part in ("train", "test"):
        out = tmp_path / f"{part}.npz"
        embed(Embed(run=tmp_path / "out", data=f"digits:{part}", out=out, device="cpu"))
        with np.load(out) as file:
            parts[part] = torch.from_numpy(file["features"]), torch.from_numpy(file["label"])
    (guess,) = knn_predictions(*parts["train"], parts["test"][0], 10, (20,))
    right = accuracy(guess, parts["test"][1])
    assert made["results"]["encoder"]["knn"] == pytest.approx(
        right, abs=0.3
    )  # a tie may fall otherwise in other batches
    assert made["results"].keys() == {"encoder", "untrained encoder", "raw pixels"}
    with pytest.raises(ValueError, match="so it has no other features"):
        probe(Probe(run=tmp_path / "out", data="digits:train", test_data="digits:test", time=50, device="cpu"))


# What the command says


@pytest.fixture
def unveil(capsys: pytest.CaptureFixture[str]) -> Any:
    def go(line: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(line.split())
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def test_the_commands_tell(tmp_path: Path, run: Path, unveil: Any) -> None:
    line = f"finetune --run {run} --data digits:test --out {tmp_path}/out --epochs 1 --batch-size 180 --device cpu"
    code, out, _ = unveil(line)
    assert code == 0
    assert "Started from diffmae Nano/2: " in out
    assert "Training on 290 samples, testing on 70." in out
    assert re.search(
        r"^Test data, last epoch: [\d.]+ % right, [\d.]+ % as the mean over classes\. Always the most common answer gets",
        out,
        re.M,
    )
    assert "report.html" in out
    assert "1 steps are few to learn by. Give more --epochs, or a smaller --batch-size.\n" in out
    code, out, _ = unveil(f"info --run {tmp_path}/out")
    assert re.search(r"^tells +one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, from the mean of the patches$", out, re.M)
    assert re.search(r"^can +recognise$", out, re.M)
    assert re.search(r"^tensors +all there$", out, re.M)
    code, out, _ = unveil(f"predict --run {tmp_path}/out --data digits:test --out {tmp_path}/told.csv --device cpu")
    assert code == 0
    assert f"Wrote 360 rows to {tmp_path}/told.csv." in out
    for command in ("inpaint --images digits:test --out x", "generate --out x"):
        code, _, err = unveil(f"{command} --run {tmp_path}/out")
        assert code == 2
        assert "holds a network fine-tuned for 10 outputs" in err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--data {flat}", "has no labels: sort the pictures into a folder for each class, or give a column `label`"),
        ("--data digits:test --task multi", "is no table, and --task multi needs one"),
        ("--data digits:test --labels-per-class 99", "--labels-per-class 99, but the class '0' has "),
        ("--data digits:test --labels-per-class 0", "--labels-per-class 0"),
        (
            "--data digits:test --accumulate 65",
            "--accumulate 65: a batch of 64 clips can be computed in 1 to 64 pieces",
        ),
        ("--data digits:test --accumulate 0", "--accumulate 0"),
        (
            "--data digits:test --test-data {csv} --task regression --label-columns value",
            "is no table, and --task regression",
        ),
        ("--data {csv} --task regression --label-columns value", "1 test sample has no spread to be explained"),
        ("--data digits:test --eval-epochs 0", "--eval-epochs 0"),
        ("--data digits:test --ema-decays 0.9 0.99", "fine-tuning keeps one running average"),
        ("--data digits:test --drop-path 1", "drop_path=1.0"),
        ("--data digits:test --image-size 9", "Clip has height=9"),
        ("--data digits:test --image-size big", "--image-size 'big' is no size"),
        ("--data {one}", "has one class, 'a'; to tell classes apart takes two"),
        (
            "--data {csv} --test-data {csv} --task regression --label-columns value --mixup 0.8",
            "--mixup 0.8 is for classes and labels",
        ),
    ],
)
def test_finetune_refuses(tmp_path: Path, run: Path, listed: Path, unveil: Any, options: str, message: str) -> None:
    for folder in ("flat", "one/a"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / folder / f"{i}.png")
    given = options.format(flat=tmp_path / "flat", one=tmp_path / "one", csv=listed)
    code, _, err = unveil(f"finetune --run {run} --out {tmp_path}/out --device cpu {given}")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_colours_of_many_channels_are_not_changed(tmp_path: Path) -> None:
    recipe = small("mae", channels=4, height=16)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, crop_scale=0.5, flip=True))
    options = Finetune(run=tmp_path, data="x", out=tmp_path)
    assert training_of(options, recipe, 100).randaugment_ops == 0
    with pytest.raises(ValueError, match="--randaugment-ops 2 needs pictures of 1 or 3 channels"):
        training_of(dataclasses.replace(options, randaugment_ops=2), recipe, 100)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--run {run} --data digits:test --out {tmp}/x.csv", "holds a pre-trained diffmae without a head"),
        ("--run {run} --data digits:test --out {tmp}/x.txt", "must end in .csv"),
        ("--run {run} --data digits:test --out {tmp}/there.csv", "exists already and is not overwritten"),
    ],
)
def test_predict_refuses(tmp_path: Path, run: Path, unveil: Any, options: str, message: str) -> None:
    (tmp_path / "there.csv").write_text("mine")
    code, _, err = unveil("predict --device cpu " + options.format(run=run, tmp=tmp_path))
    assert code == 2
    assert message in err
    assert (tmp_path / "there.csv").read_text() == "mine"

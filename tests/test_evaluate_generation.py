"""FID and its relatives against torch-fidelity on random weights, and references that are looked at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from PIL import Image
from small import generator
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from unveil import cli, inception
from unveil.inception import INCEPTION, Inception, Moments, Seen
from unveil.metric_weights import FromWeights, Weights, find_weights_of
from unveil.metrics import gaussian_distance
from unveil.picture_sets import Fitted, open_pictures
from unveil.tasks import evaluate_generation as task
from unveil.tasks.evaluate_generation import EvaluateGeneration, evaluate_generation


def pictures(folder: Path, n: int, seed: int = 0, size: tuple[int, int] = (20, 24), brighter: int = 0) -> Path:
    """n pictures as `unveil generate` numbers them, with shapes that are no noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 200, (5, 4, 3), dtype=np.uint8) + np.uint8(brighter))
        coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def network(inception_weights: Path) -> Inception:
    return Inception(find_weights_of(INCEPTION, FromWeights(weights=inception_weights)), "tf1", "cpu")


class Quick:
    """In place of the network: features that follow from a picture's mean colours, at no cost. looks: pictures seen by all."""

    looks = 0

    def __init__(self, weights: Weights, resize: Any, device: Any) -> None:
        self.weights, self.resize, self.device = weights, resize, torch.device("cpu")

    def __call__(self, pictures: Tensor) -> Seen:
        Quick.looks += len(pictures)
        colours = F.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)
        features = torch.cat([colours, colours.square()], 1)
        return Seen(features[:, : inception.POOLED], features[:, -inception.SPATIAL :], features)


def look_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "Inception", Quick)
    monkeypatch.setattr(inception, "POOLED", 24)
    monkeypatch.setattr(inception, "SPATIAL", 20)
    monkeypatch.setattr(Quick, "looks", 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command with `Quick`, in a folder of its own."""
    look_quickly(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "weights.pth").write_bytes(b"weights")

    def run(images: Path | str, reference: Path | str, **options: Any) -> dict[str, Any]:
        given = {"weights": tmp_path / "weights.pth", "device": "cpu", **options}
        result = evaluate_generation(EvaluateGeneration(images=str(images), reference=str(reference), **given))
        json.dumps(result, allow_nan=False)
        return result

    return run


# Against the library


def test_features_are_the_librarys_own(network: Inception, inception_weights: Path) -> None:
    """By its own forward pass, with a hook on the branch; the spatial ones in TensorFlow's order."""
    theirs = FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    branch: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: branch.append(output))
    values = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=generator())
    pooled, logits = theirs(values)
    seen = network(values)
    assert pooled.std() > 0.01
    torch.testing.assert_close(seen.pooled, pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.logits, logits, rtol=1e-5, atol=1e-5)
    assert seen.spatial.shape == (2, 2023)
    assert (branch[0][:, :7].std((0, 2, 3)) > 0.01).sum() >= 3  # the others are dead
    for channel in range(7):
        places = torch.tensor([[(y * 17 + x) * 7 + channel for x in range(17)] for y in range(17)])
        torch.testing.assert_close(seen.spatial[:, places], branch[0][:, channel], rtol=1e-5, atol=1e-6)


def test_the_ways_to_resize_give_other_features(network: Inception) -> None:
    """Where a picture shrinks, much; a picture of the network's own size is not resized at all."""
    clean = Inception(network.weights, "clean", "cpu")
    small, same = torch.rand(1, 3, 600, 600, generator=generator()), torch.rand(1, 3, 299, 299, generator=generator())
    small, same = ((255 * x).byte() for x in (small, same))
    assert not torch.allclose(network(small).pooled, clean(small).pooled, rtol=0.01)
    assert torch.equal(network(same).pooled, clean(same).pooled)
    assert torch.equal(clean._brought(same)[0], same[0].float())


def test_clean_resizing_is_antialiased_and_not_rounded() -> None:
    values = torch.randint(0, 256, (3, 500, 40), dtype=torch.uint8, generator=generator())
    expected = F.interpolate(values[None].float(), (299, 299), mode="bicubic", antialias=True)[0].clamp(0, 255)
    found = inception._clean(values)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    assert (found != found.round()).any()


def test_moments_equal_those_of_all_features_at_once() -> None:
    features = 1000 + torch.randn(50, 30, generator=generator(), dtype=torch.float64)
    moments = Moments(30, torch.device("cpu"))
    for batch in features.float().split(7):
        moments.add(batch)
    mean, covariance = moments.gaussian()
    torch.testing.assert_close(mean, features.float().double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, torch.cov(features.float().double().T), rtol=1e-9, atol=1e-9)


def test_the_distance_equals_torch_fidelitys() -> None:
    g = generator()
    a, b = (torch.randn(n, 64, generator=g) * torch.linspace(0.1, 2, 64) for n in (200, 90))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    ours = gaussian_distance(*((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b)))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


@pytest.mark.slow
def test_the_whole_command_equals_torch_fidelity(tmp_path: Path, inception_weights: Path) -> None:
    """FID, Inception score, KID, precision and recall of the same folders with the same file; sFID as a distance of its own."""
    made, real = pictures(tmp_path / "made", 10), pictures(tmp_path / "real", 12, seed=1, brighter=30)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(real),
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        isc_splits=1,
        kid_subset_size=10,
        rng_seed=0,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    options = EvaluateGeneration(
        images=str(made),
        reference=str(real),
        weights=inception_weights,
        cache=tmp_path / "cache",
        batch_size=6,
        device="cpu",
    )
    result = evaluate_generation(options)
    scores = result["scores"]
    assert scores["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert scores["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert scores["kid"]["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert scores["kid"]["std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3, abs=1e-6)
    assert (scores["precision"], scores["recall"]) == (theirs["precision"], theirs["recall"])
    assert 0 < scores["precision"] < 1
    assert scores["sfid"] > 0
    again = evaluate_generation(options)
    assert again["statistics_reused"]
    assert again["scores"] == scores


def test_the_inception_score_is_over_parts_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(25, 6, generator=generator())
    monkeypatch.setattr(task, "SPLIT", 10)
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = part.double().softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert task.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-9)


def test_precision_and_recall_by_counting() -> None:
    g = generator()
    made, real = torch.randn(12, 5, generator=g), 1.5 * torch.randn(15, 5, generator=g)

    def inside(points: Tensor, others: Tensor) -> float:
        radius = torch.stack([(others - x).norm(dim=1).sort().values[3] for x in others])
        return float(np.mean([bool(((others - x).norm(dim=1) <= radius).any()) for x in points]))

    found = task.precision_and_recall(made, real)
    assert (found["precision"], found["recall"]) == pytest.approx((inside(made, real), inside(real, made)))
    assert found["precision"] != found["recall"]


# What is kept of a reference


def test_a_reference_is_looked_at_once(tmp_path: Path, quick: Callable[..., dict[str, Any]]) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 7, seed=1)
    first = quick(made, real)
    assert Quick.looks == 12
    assert first["statistics"].startswith(str(tmp_path / "caches" / "unveil" / "statistics"))
    second = quick(made, real)
    assert Quick.looks == 17  # the generated ones alone
    assert (first["statistics_reused"], second["statistics_reused"]) == (False, True)
    assert second["scores"] == first["scores"]
    copied = pictures(tmp_path / "copied", 7, seed=1)  # the same contents elsewhere
    assert quick(made, copied)["statistics"] == first["statistics"]
    named = quick(made, first["statistics"])  # the file itself
    assert named["scores"] == first["scores"]
    assert named["num_reference"] == 7


@pytest.mark.parametrize("change", ["pixel", "order", "resize", "size", "weights", "seed", "one more"])
def test_whatever_changes_the_numbers_is_looked_at_anew(
    tmp_path: Path, quick: Callable[..., dict[str, Any]], change: str
) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 5, seed=1)
    first = quick(made, real)
    options: dict[str, Any] = {}
    if change == "pixel":
        with Image.open(real / "00003.png") as image:
            changed = image.copy()
        changed.putpixel((3, 3), (1, 2, 3))
        changed.save(real / "00003.png")
    elif change == "order":
        (real / "00000.png").rename(real / "00009.png")
    elif change == "one more":
        pictures(tmp_path / "more", 1, seed=3)
        (tmp_path / "more" / "00000.png").rename(real / "00010.png")
    elif change == "size":
        made = pictures(tmp_path / "larger", 5, size=(24, 24))
    elif change == "weights":
        (tmp_path / "weights.pth").write_bytes(b"others")
    else:
        options = {"resize": "clean"} if change == "resize" else {"seed": 1}
    second = quick(made, real, **options)
    assert not second["statistics_reused"]
    assert second["statistics"] != first["statistics"]


def test_the_file_has_adms_names(tmp_path: Path, quick: Callable[..., dict[str, Any]]) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 6, seed=1)
    first = quick(made, real)
    with np.load(first["statistics"]) as file:
        arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
        assert file["pool_3"].shape == (6, 24)
    values = np.stack([np.array(Image.open(path)) for path in sorted(real.iterdir())])
    np.savez(tmp_path / "adm.npz", arr_0=values, **arrays)  # as a reference batch of ADM
    batch = quick(made, tmp_path / "adm.npz")
    assert batch["scores"] == first["scores"]
    assert batch["num_reference"] is None
    np.savez(tmp_path / "both.npz", **arrays)
    both = quick(made, tmp_path / "both.npz")
    assert both["scores"] == {name: first["scores"][name] for name in ("fid", "sfid", "inception_score")}
    assert any("has no pictures, so there is no precision" in notice for notice in both["notices"])
    np.savez(tmp_path / "mar.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # as pytorch-fid and MAR have them
    mar = quick(made, tmp_path / "mar.npz")
    assert mar["scores"].keys() == {"fid", "inception_score"}
    assert any("so there is no sFID" in notice for notice in mar["notices"])


def test_features_of_ten_thousand_are_kept_drawn_by_the_seed(
    tmp_path: Path, quick: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "KEPT", 4)
    monkeypatch.setattr(task, "KEPT", 4)
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 12, seed=1)
    kept = []
    for seed in (0, 1):
        result = quick(made, real, seed=seed)
        assert (result["num_reference"], result["num_reference_features"]) == (12, 4)
        assert any("are beside 4 of the reference's pictures" in notice for notice in result["notices"])
        with np.load(result["statistics"]) as file:
            kept.append(file["pool_3"])
    assert not np.array_equal(*kept)


# Pictures


def test_npz_and_folder_have_the_same_pictures(tmp_path: Path, quick: Callable[..., dict[str, Any]]) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 6, seed=1)
    values = np.stack([np.array(Image.open(path)) for path in sorted(made.iterdir())])
    for save, name in ((np.savez, "plain.npz"), (np.savez_compressed, "small.npz")):
        save(tmp_path / name, arr_0=values)
        assert quick(tmp_path / name, real)["scores"] == quick(made, real)["scores"]
    np.savez(tmp_path / "grey.npz", arr_0=values[..., :1])
    (_, grey), *_ = open_pictures(str(tmp_path / "grey.npz"))
    assert torch.equal(grey, torch.from_numpy(values[0, :, :, :1]).permute(2, 0, 1).expand(3, -1, -1))


def test_the_contact_sheet_of_generate_is_left_out(tmp_path: Path, quick: Callable[..., dict[str, Any]]) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 6, seed=1)
    expected = quick(made, real)
    Image.new("RGB", (300, 200)).save(made / "grid.png")
    (made / "labels.csv").write_text("file,label\n")
    result = quick(made, real)
    assert (result["num_images"], result["scores"]) == (5, expected["scores"])
    (made / "photo.jpg").write_bytes((made / "grid.png").read_bytes())  # then it is no folder of generate's
    assert len(open_pictures(str(made))) == 7


def test_references_come_to_the_size_of_what_was_generated(
    tmp_path: Path, quick: Callable[..., dict[str, Any]]
) -> None:
    made = pictures(tmp_path / "made", 5)
    real = pictures(tmp_path / "real", 6, seed=1, size=(40, 60))
    fitted = pictures(tmp_path / "fitted", 0)
    for number, picture in Fitted(open_pictures(str(real)), 20, 24):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(fitted / f"{number}.png")
    result = quick(made, real)
    assert result["scores"] == quick(made, fitted)["scores"]
    assert any(
        "6 pictures of the reference had another size and were brought to 24 x 20" in n for n in result["notices"]
    )
    assert any("6 pictures of the reference" in notice for notice in quick(made, real)["notices"])  # also if kept


def test_what_is_unusual_is_told(
    tmp_path: Path, quick: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = pictures(tmp_path / "made", 6), pictures(tmp_path / "real", 6, seed=1)
    for i in range(6):
        folder = made / f"class{i // 3}"
        folder.mkdir(exist_ok=True)
        (made / f"{i:05d}.png").rename(folder / f"{i}.png")
    (made / "class0" / "broken.png").write_bytes(b"no picture")
    (made / "class0" / "empty.png").touch()
    (real / "damaged.png").write_bytes(b"no picture")
    monkeypatch.setattr(task, "SPLIT", 4)
    told = " ".join(quick(made, real)["notices"])
    assert "6 pictures and 6 of the reference are few: below some 10,000, FID and sFID are biased upward" in told
    assert "is sorted by class, and the Inception score is the mean over parts of 4" in told
    assert f"Files of {made} that could not be used: 2, as class0/broken.png: " in told
    assert "; class0/empty.png: empty file (0 bytes)." in told
    assert f"Files of {real} that could not be used: 1, as damaged.png: " in told
    assert "weights are not those that everybody has" in told
    few = quick(pictures(tmp_path / "few", 3), real)
    assert {"precision", "recall"}.isdisjoint(few["scores"])
    assert few["scores"]["kid"]["subset"] == 3
    assert f"Files of {real} that could not be used: 1." in few["notices"]  # which one was seen when it was looked at
    assert any("Precision and recall need more than 3" in notice for notice in few["notices"])


@pytest.mark.parametrize(
    "case, words",
    [
        ({"images": "nowhere"}, "There is no data at"),
        ({"images": "mixed"}, r"has pictures of 24 x 20 and of 30 x 20 pixels; generated ones have one size"),
        ({"images": "one"}, r"1 picture\(s\) could be read; a distribution needs two"),
        ({"images": "broken"}, "No picture of .*broken can be read"),
        ({"images": "float.npz"}, r"holds arr_0 as float64 of \(2, 4, 4, 3\); pictures are uint8"),
        ({"images": "named.npz"}, "holds no pictures \\(arr_0\\), only other"),
        ({"images": "text.npz"}, "cannot be read as an .npz file"),
        ({"images": "cut.npz"}, "is damaged"),
        ({"reference": "wrong.npz"}, r"has mu of shape \(3,\); of Inception's features it is \(24,\)"),
        (
            {"reference": "stats.npz", "resize": "clean"},
            "was made of pictures resized as tf1, as all such files are taken",
        ),
        ({"batch_size": 0}, "--batch-size 0: use 1 or more"),
        ({"seed": -1}, "--seed -1: use 0 or more"),
        ({"device": "gpu"}, "--device gpu cannot be used"),
        ({"weights": "nowhere.pth"}, "nowhere.pth does not exist"),
    ],
)
def test_evaluate_generation_refuses(
    tmp_path: Path, quick: Callable[..., dict[str, Any]], case: dict[str, Any], words: str
) -> None:
    made, real = pictures(tmp_path / "made", 3), pictures(tmp_path / "real", 3, seed=1)
    pictures(tmp_path / "one", 1)
    mixed = pictures(tmp_path / "mixed", 2)
    Image.new("RGB", (30, 20)).save(mixed / "00002.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "named.npz", other=np.zeros(2))
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "cut.npz", arr_0=np.ones((50, 4, 4, 3), dtype=np.uint8))
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:200] + b"\0" * 50 + content[250:])
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(24), sigma=np.eye(24))
    paths = {name: tmp_path / case[name] for name in ("images", "reference", "weights") if name in case}
    given = {"images": made, "reference": real, **case, **paths}
    with pytest.raises(ValueError, match=words):
        quick(given.pop("images"), given.pop("reference"), **given)


def test_statistics_of_other_weights_or_another_way_are_refused(
    tmp_path: Path, quick: Callable[..., dict[str, Any]]
) -> None:
    made, real = pictures(tmp_path / "made", 3), pictures(tmp_path / "real", 3, seed=1)
    file = quick(made, real)["statistics"]
    with pytest.raises(ValueError, match=r"was made of pictures resized as tf1, as it says.*Use --resize tf1"):
        quick(made, file, resize="clean")
    (tmp_path / "weights.pth").write_bytes(b"others")
    with pytest.raises(ValueError, match="was made with other weights"):
        quick(made, file)


def test_the_network_refuses_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    found = find_weights_of(INCEPTION, FromWeights(weights=tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="holds other weights than weights-inception-2015-12-05-6726825d"):
        Inception(found, "tf1", "cpu")
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r'This needs torch-fidelity .*pip install "unveil\[evaluate\]"'):
        Inception(found, "tf1", "cpu")


def test_the_command_line_names_what_the_numbers_belong_to(
    tmp_path: Path, quick: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    made, real = pictures(tmp_path / "made", 5), pictures(tmp_path / "real", 6, seed=1)
    command = f"evaluate generation --images {made} --reference {real} --weights {tmp_path}/weights.pth --device cpu"
    cli.main(command.split())
    out = capsys.readouterr().out
    for words in (
        f"5 pictures of 24 x 20 beside 6 of {real}.",
        "TensorFlow 1's bilinear",
        "(tf1)",
        "seed 0",
        "kept in",
    ):
        assert words in out
    for name in ("FID", "sFID", "Inception score", "precision", "recall", "KID"):
        assert f"\n  {name} " in out
    cli.main([*command.split(), "--resize", "clean", "--json"])
    captured = capsys.readouterr()
    assert "Pillow's antialiased bicubic" in captured.err
    assert json.loads(captured.out)["resize"] == "clean"

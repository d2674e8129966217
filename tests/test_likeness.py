"""SSIM and LPIPS against their library and independent arithmetic, and weights that are there, missing, fetched or wrong."""

import hashlib
import os
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage, stats
from small import generator
from torch import Tensor
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.functional.image import lpips as library

from unveil import likeness, metric_weights
from unveil.inception import INCEPTION
from unveil.likeness import PSNR, SMALLEST, TRUNKS, CannotJudge, Trunk, lpips_judge, ssim_judge
from unveil.metric_weights import FromWeights, MissingWeights, Published, Weights, find_weights_of, read_state
from unveil.metrics import mean_interval

KINDS: list[Trunk] = ["alex", "vgg"]


def clips(channels: int = 3, frames: int = 1, height: int = 32, width: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Three true clips, painted ones that differ in a hole, and the holes, of unequal size."""
    g = generator()
    truth = torch.rand(3, channels, frames, height, width, generator=g)
    hole = torch.zeros(3, frames, height, width, dtype=torch.bool)
    for i in range(3):
        hole[i, :, 2 : 5 + 2 * i, 3:9] = True
    return torch.where(hole[:, None], torch.rand(truth.shape, generator=g), truth), truth, hole


def features(net: str, pretrained: bool = False) -> torch.nn.Module:
    """The trunk of a torchvision network, without its classifier, whose random values take seconds to draw."""
    with torch.device("meta"):
        model = getattr(torchvision.models, net)()
    trunk = model.features.to_empty(device="cpu")
    g = generator()
    for parameter in trunk.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * (2 / parameter[0].numel()) ** 0.5
    return trunk


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(library, "_get_tv_model_features", features)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random trunks under the published names, without the classifiers, which nothing reads."""
    folder = tmp_path_factory.mktemp("trunks")
    for name in KINDS:
        state = features({"alex": "alexnet", "vgg": "vgg16"}[name]).state_dict()
        torch.save({f"features.{key}": value for key, value in state.items()}, folder / TRUNKS[name].name)
    return folder


def judge_of(trunks: Path, name: Trunk, channels: int = 3, height: int = 32, width: int = 40) -> likeness.Judge:
    weights = find_weights_of(TRUNKS[name], FromWeights(weights=trunks))
    return lpips_judge(name, weights, channels, height, width, "cpu")


def test_ssim_equals_independent_arithmetic_in_the_hole_and_over_the_whole() -> None:
    painted, truth, hole = clips(frames=2)
    in_hole, whole = ssim_judge(32, 40).compare(painted, truth, hole)

    def blurred(x: np.ndarray) -> np.ndarray:  # over height and width; 11 pixels
        return ndimage.gaussian_filter(x, sigma=(0, 0, 0, 1.5, 1.5), truncate=3.5, mode="mirror")

    a, b = painted.double().numpy(), truth.double().numpy()
    mean_a, mean_b = blurred(a), blurred(b)
    spread = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    maps = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (spread + 9e-4))
    maps = maps.mean(1)
    np.testing.assert_allclose(whole.numpy(), maps.mean((1, 2, 3)), atol=1e-5)
    for i in range(3):
        np.testing.assert_allclose(in_hole[i].item(), maps[i][hole[i].numpy()].mean(), atol=1e-5)


def test_psnr_over_the_whole_follows_from_the_hole() -> None:
    painted, truth, hole = clips()
    in_hole, whole = PSNR.compare(painted, truth, hole)
    torch.testing.assert_close(whole, in_hole * hole.double().mean((1, 2, 3)))
    torch.testing.assert_close(PSNR.told(whole)[0], -10 * (painted - truth)[0].double().square().mean().log10())


@pytest.mark.parametrize("name", KINDS)
def test_lpips_equals_torchmetrics(trunks: Path, name: Trunk) -> None:
    """Over the whole its public function, in the hole its map, with `features` in place of what they would fetch."""
    painted, truth, hole = clips()
    in_hole, whole = judge_of(trunks, name).compare(painted, truth, hole)
    expected = learned_perceptual_image_patch_similarity(
        painted[:, :, 0], truth[:, :, 0], net_type=name, reduction="none", normalize=True
    )
    torch.testing.assert_close(whole.float(), expected, rtol=1e-5, atol=1e-7)
    with torch.inference_mode():
        maps = library._LPIPS(net=name, spatial=True)(painted[:, :, 0], truth[:, :, 0], normalize=True)
    for i in range(3):
        torch.testing.assert_close(in_hole[i].float(), maps[i, 0][hole[i, 0]].mean(), rtol=1e-5, atol=1e-7)
    assert (in_hole > whole).all()  # nothing was painted outside


def test_lpips_of_clips_and_of_grey_pictures(trunks: Path) -> None:
    painted, truth, hole = clips(channels=1, frames=2)
    in_hole, whole = judge_of(trunks, "alex", channels=1).compare(painted, truth, hole)
    colours = [x.repeat(1, 3, 1, 1, 1) for x in (painted, truth)]
    compare = judge_of(trunks, "alex").compare
    torch.testing.assert_close(whole, compare(*colours, hole)[1])
    frames = [compare(*(x[:, :, t : t + 1] for x in colours), hole[:, t : t + 1]) for t in (0, 1)]
    torch.testing.assert_close(whole, (frames[0][1] + frames[1][1]) / 2)
    torch.testing.assert_close(in_hole, (frames[0][0] + frames[1][0]) / 2)  # both frames have the same hole


@pytest.mark.slow
def test_lpips_of_torchvisions_own_networks(trunks: Path) -> None:
    """Built as they are in use, with whole files, classifiers and all; to the judges that quick tests look at."""
    for name, net in (("alex", "alexnet"), ("vgg", "vgg16")):
        network = likeness._network(name, find_weights_of(TRUNKS[name], FromWeights(weights=trunks)))
        for key, value in features(net).state_dict().items():
            layer, kind = key.split(".")
            (mine,) = (v for k, v in network.net.state_dict().items() if k.endswith(f".{layer}.{kind}"))
            assert torch.equal(mine, value)
        painted, truth, _ = clips()
        assert network(painted[:, :, 0], truth[:, :, 0], normalize=True).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_the_smallest_picture_is_the_smallest_that_a_trunk_can_look_at(trunks: Path, name: Trunk) -> None:
    side = SMALLEST[name]
    painted, truth, hole = clips(height=side, width=side)
    assert judge_of(trunks, name, height=side, width=side).compare(painted, truth, hole)[1].isfinite().all()
    with pytest.raises(CannotJudge, match=rf"LPIPS {name} needs pictures of {side} pixels.*these are {side - 1} x 40"):
        judge_of(trunks, name, height=40, width=side - 1)
    network = likeness._network(name, find_weights_of(TRUNKS[name], FromWeights(weights=trunks)))
    with pytest.raises(RuntimeError, match="too small"):
        network(*2 * [torch.rand(1, 3, side - 1, side - 1)])


def test_judges_refuse(trunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotJudge, match="but these have 4 channels"):
        judge_of(trunks, "alex", channels=4)
    with pytest.raises(CannotJudge, match="SSIM needs pictures of 6 pixels"):
        ssim_judge(5, 40)
    vgg = find_weights_of(TRUNKS["vgg"], FromWeights(weights=trunks / TRUNKS["vgg"].name))
    with pytest.raises(ValueError, match=r"holds other weights than alexnet-owt-7be5be79\.pth, which LPIPS alex needs"):
        lpips_judge("alex", vgg, 3, 32, 32, "cpu")
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional", None)
    for attempt in (lambda: ssim_judge(32, 32), lambda: judge_of(trunks, "alex")):
        with pytest.raises(CannotJudge, match=r'needs torchmetrics .*pip install "unveil\[evaluate\]"'):
            attempt()


def test_the_global_generator_is_left_alone(trunks: Path) -> None:
    state = torch.get_rng_state()
    judge_of(trunks, "alex")
    assert torch.equal(torch.get_rng_state(), state)


# Weights


def test_what_is_published_is_what_the_libraries_would_fetch() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert TRUNKS["alex"].url == torchvision.models.AlexNet_Weights.DEFAULT.url
    assert TRUNKS["vgg"].url == torchvision.models.VGG16_Weights.DEFAULT.url
    assert INCEPTION.url == URL_INCEPTION_V3
    for published in (*TRUNKS.values(), INCEPTION):
        assert all(name.endswith(f"-{published.sha256}.pth") for name in (published.name, *published.also))


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """A file of one tensor, published at a file: address."""
    torch.save({"a": torch.ones(1)}, tmp_path / "there.pth")
    digest = hashlib.sha256((tmp_path / "there.pth").read_bytes()).hexdigest()
    there = (tmp_path / "there.pth").rename(tmp_path / f"there-{digest[:8]}.pth")
    return Published("The network", there.as_uri(), digest[:8], 1, also=("other.pth",))


def test_weights_are_found_by_either_name_or_as_a_file(tmp_path: Path, published: Published) -> None:
    source = tmp_path / published.name
    assert find_weights_of(published, FromWeights(weights=source)).published
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "other.pth").write_bytes(source.read_bytes())
    found = find_weights_of(published, FromWeights(weights=folder))
    assert (found.path, found.published) == (folder / "other.pth", True)
    assert read_state(found, "x").keys() == {"a"}
    torch.save({"b": torch.ones(1)}, folder / published.name)
    assert find_weights_of(published, FromWeights(weights=folder)).published is False


def test_weights_are_fetched_only_if_that_is_asked_for(
    tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    place = tmp_path / "hub" / "checkpoints" / published.name
    with pytest.raises(MissingWeights) as missing:
        find_weights_of(published, FromWeights())
    assert all(words in str(missing.value) for words in (published.url, str(place), "--weights", "--download"))
    assert not place.exists()
    found = find_weights_of(published, FromWeights(download=True))
    assert (found.path, found.published) == (place, True)
    assert find_weights_of(published, FromWeights()).path == place
    mine = tmp_path / "mine"
    assert find_weights_of(published, FromWeights(weights=mine, download=True)).path == mine / published.name


def test_fetching_refuses(tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    other = Published("The network", published.url, "00000000", 1)
    with pytest.raises(ValueError, match="is not what was published"):
        find_weights_of(other, FromWeights(weights=folder, download=True))
    assert list(folder.iterdir()) == []
    with pytest.raises(ValueError, match=r"--weights .*nowhere does not exist. Name a folder with there-"):
        find_weights_of(published, FromWeights(weights=tmp_path / "nowhere"))

    def offline(*arguments: Any, **named: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"cannot be fetched \(Name or service not known\)\. Fetch it where there is"):
        find_weights_of(published, FromWeights(weights=folder, download=True))


class Evil:
    """Makes a folder `was_here` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_here",)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot be read as weights"),
        (b"<html>404</html>", "cannot be read as weights"),
        (pickle.dumps({"a": Evil()}, protocol=2), "cannot be read as weights"),
        ([torch.ones(1)], "holds no table of tensors"),
        ({"a": 1}, "holds no table of tensors"),
    ],
)
def test_read_state_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        read_state(Weights(path, "0", False), "a network")
    assert not (tmp_path / "was_here").exists()


def test_the_usual_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert metric_weights.usual_folder() == tmp_path / "hub" / "checkpoints"


# Intervals


def test_the_interval_equals_scipys() -> None:
    values = torch.randn(30, generator=generator()).double()
    told = mean_interval(values)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    assert told["mean"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert (told["low"], told["high"]) == pytest.approx((expected.low, expected.high), rel=1e-10)
    assert mean_interval(values[:1]) == {"mean": values[0].item(), "low": None, "high": None}
    assert mean_interval(torch.ones(5)) == {"mean": 1.0, "low": 1.0, "high": 1.0}

"""What all tests share."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture
def curves() -> None:
    """Asked for by a test of a run's page, so that its curves are painted."""


@pytest.fixture(autouse=True)
def plain_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of runs have no curves in most tests: painting them takes longer than the training does."""
    if "curves" in request.fixturenames:
        return
    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, "PNG")
    for name in ("training_report.curve", "recognition_report.curve", "recognition_report.matrix_picture"):
        monkeypatch.setattr(f"unveil.{name}", lambda *arguments, **named: blank.getvalue())


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception that keep the scale of what goes through them; without counts of batches, as published."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds

    from unveil.inception import INCEPTION

    path = tmp_path_factory.mktemp("inception") / INCEPTION.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *arguments: None)
        patch.setattr(torch, "load", lambda *arguments, **named: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    drawn = torch.Generator().manual_seed(0)
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    for name, value in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(value.shape, generator=drawn) * (2 / value[0].numel()) ** 0.5
        elif name.endswith("bn.bias"):
            state[name] = torch.randn(value.shape, generator=drawn) / 2
        elif name == "fc.weight":
            state[name] = torch.randn(value.shape, generator=drawn) / 10
    torch.save(state, path)
    return path

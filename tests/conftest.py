"""What all tests share."""

import io

import pytest
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

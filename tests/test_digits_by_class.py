"""The whole way to pictures by class, on digits: pre-train without labels, fine-tune, generate, and let a classifier judge."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "umd_digits.py"


@pytest.mark.slow
def test_a_classifier_names_nine_of_ten_generated_digits_as_asked(tmp_path: Path) -> None:
    """500 guided samples; guidance must not make them worse, and the classifier must be worth asking.

    Fewer epochs, steps and samples than the example's own have to do.
    """
    example = runpy.run_path(str(EXAMPLE))
    results = example["main"](example["Options"](out=tmp_path, epochs=24, num_steps=10, num_samples=500))
    named = results["generated_digits_named_as_asked"]
    assert results["classifier_on_real_test_digits"] > 97
    assert named["guidance 1.5"] >= 90
    assert named["guidance 1.5"] >= named["guidance 1"]
    assert results["probe_10_labels_per_class"]["encoder"]["linear"] > 70
    assert (tmp_path / "generated.png").exists()

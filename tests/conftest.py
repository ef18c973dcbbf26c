"""Fixtures shared by the tests: golden data where it is, small models made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import write_model

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data; tests that need it are skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden data (../shared/golden) is not here")
    return GOLDEN


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3 model of two layers, F32."""
    return write_model(tmp_path_factory.mktemp("models") / "small.gguf")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

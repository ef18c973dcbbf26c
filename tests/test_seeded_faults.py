"""Every small fault turns the check red that should see it, and right code none; see there."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_checks import CHECKS, MODELS, Check, red, write_models
from seeded_faults import FAULTS, SOURCE_FAULTS, Fault, SourceFault, caught, line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> list[str]:
    """Rows of the table, shown with `pytest -s` at the end."""
    rows: list[str] = []
    request.addfinalizer(lambda: print("", *rows, sep="\n"))
    return rows


@pytest.mark.parametrize("model", [*MODELS, "tied"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_right_code_is_green(check: Check, model: str, files: dict[str, Path]):
    assert red(check, files[model]) == ""


def _case(fault: Fault | SourceFault) -> object:
    swept = isinstance(fault, SourceFault) and fault.sweep
    marks = [pytest.mark.sweep] if swept else []
    return pytest.param(fault, id=fault.name.replace(" ", "_"), marks=marks)


@pytest.mark.parametrize("fault", [_case(fault) for fault in (*FAULTS, *SOURCE_FAULTS)])
def test_a_fault_is_caught(fault: Fault | SourceFault, files: dict[str, Path], table: list[str]):
    said = caught(fault, files)
    table.append(line(fault, said))
    assert said, f"{fault.name}: {fault.caught_by.__doc__} is green"


def test_there_are_enough_faults_of_every_kind():
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.caught_by for fault in FAULTS} == set(CHECKS)

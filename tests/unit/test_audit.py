"""`scripts/audit`: its answer says whether the service was asked at all."""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

LOADER = SourceFileLoader("audit", str(Path(__file__).parents[2] / "scripts" / "audit"))
SPEC = spec_from_loader(LOADER.name, LOADER)
assert SPEC is not None
audit = module_from_spec(SPEC)
LOADER.exec_module(audit)

SOUND = {"name": "a", "version": "1", "vulns": []}
FLAWED = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}],
}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}
OURS = {"name": "aiotaskq", "skip_reason": "distribution marked as editable"}


@pytest.mark.parametrize(
    ("packages", "status", "told"),
    [
        ([SOUND, OURS], 0, "1 packages, and no known vulnerability"),
        ([SOUND, FLAWED], 1, "b 2: PYSEC-1 (CVE-1), mended in 3"),
        ([SOUND, FLAWED, UNKNOWN], 1, "b 2: PYSEC-1 (CVE-1), mended in 3"),
        ([SOUND, UNKNOWN], 2, "could not be asked about 1 others"),
        ([UNKNOWN], 2, "Dependency not found on PyPI"),
        ([], 2, "could not be asked"),
    ],
)
def test_the_answer_and_its_exit_status(
    packages: list[dict[str, Any]], status: int, told: str
) -> None:
    found, lines = audit.report(json.dumps({"dependencies": packages}), "")
    assert found == status
    assert told in lines[0]


@pytest.mark.parametrize("printed", ["", "no JSON", "[]", "{}"])
def test_a_service_that_does_not_answer_is_no_good_news(printed: str) -> None:
    status, lines = audit.report(printed, "Traceback\nConnectionError: no such host\n")
    assert status == 2
    assert lines == ["the vulnerability service could not be asked: ConnectionError: no such host"]
    assert audit.report(printed, "")[0] == 2

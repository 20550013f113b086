from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.runner import claims_of, reproducible, run_claims


def _claim(name: str, run) -> Claim:
    return Claim(system="davit", name=name, statement="It is so.", rule="confirmed when it is", run=run)


def _found(seed: int) -> Finding:
    return Finding({"ours": 1.0, "theirs": 2.5}, 0.5, Verdict.REFUTED, {"seed": seed})


def _broken(seed: int) -> Finding:
    raise RuntimeError("no room\nleft")


@pytest.fixture
def davit_claims(monkeypatch):
    module = ModuleType("manyheads.reproduce.davit")
    module.CLAIMS = (_claim("first", _found), _claim("second", _broken))
    monkeypatch.setitem(sys.modules, "manyheads.reproduce.davit", module)


def test_verdicts_and_errors_stand_side_by_side(davit_claims):
    refuted, broken = run_claims(claims_of("davit"), seed=7)
    assert (refuted.outcome, refuted.measured, refuted.baseline) == ("refuted", "ours 1, theirs 2.5", "0.5")
    assert refuted.finding.details == {"seed": 7}
    assert (broken.outcome, broken.error) == ("error", "RuntimeError: no room left")
    assert broken.finding is None


def test_results_are_json(davit_claims):
    first, second = json.loads(json.dumps([result.to_dict() for result in run_claims(claims_of("davit"))]))
    assert first["finding"]["measured"] == {"ours": 1.0, "theirs": 2.5}
    assert (second["outcome"], second["finding"]) == ("error", None)


def test_one_claim_by_name(davit_claims):
    assert [claim.name for claim in claims_of("davit", "second")] == ["second"]
    with pytest.raises(ValueError, match="no claim 'frist'; did you mean 'first'"):
        claims_of("davit", "frist")


def test_planned_and_unknown_systems_are_refused():
    assert "davit" in reproducible()
    with pytest.raises(ValueError, match="acmil is planned"):
        claims_of("acmil")
    with pytest.raises(ValueError, match="did you mean 'davit'"):
        claims_of("dawit")

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads import catalog
from tests.goldens.adapters import ADAPTERS

CASES = Path(__file__).parent.parent / "goldens" / "cases"
WORKS = catalog.systems(state="works")


def test_there_are_59_systems_with_golden_cases_for_each():
    slugs = [system.slug for system in catalog.systems()]
    assert len(slugs) == len(set(slugs)) == 59
    assert slugs == sorted(slugs)
    assert {folder.name for folder in CASES.iterdir()} <= set(slugs)


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.slug)
def test_entries_use_the_words_of_the_catalog(system):
    assert system.kind in catalog.KINDS
    assert set(system.patterns) <= set(catalog.PATTERNS)
    assert system.rooms
    assert set(system.rooms) <= set(catalog.ROOMS)
    assert system.state in catalog.STATES
    assert system.title
    assert system.why.endswith(".")
    assert len(system.why) <= 110
    assert "\n" not in system.why
    # An arXiv identifier begins with the year and month of the first version.
    assert not system.arxiv or system.year == 2000 + int(system.arxiv[:2])


@pytest.mark.parametrize("system", WORKS, ids=lambda system: system.slug)
def test_systems_that_work_are_pinned_by_goldens(system):
    if (CASES / system.slug).exists():
        assert callable(ADAPTERS[system.slug])


@pytest.mark.parametrize("system", WORKS, ids=lambda system: system.slug)
def test_systems_that_work_have_claims_with_rules(system):
    claims = importlib.import_module(f"manyheads.reproduce.{system.slug}").CLAIMS
    assert claims
    assert len({claim.name for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.system == system.slug
        assert claim.statement
        assert claim.rule
        assert not claim.full_scale or claim.full_scale.startswith("manyheads ")


@pytest.mark.parametrize("system", WORKS, ids=lambda system: system.slug)
def test_systems_that_work_have_documented_public_objects_in_every_room(system):
    assert system.public
    for name in system.public:
        module, _, attribute = name.rpartition(".")
        documented = getattr(importlib.import_module(module), attribute)
        assert callable(documented)
        assert documented.__doc__, name
    assert {name.split(".")[1] for name in system.public} == set(system.rooms)


def test_filters_combine():
    found = catalog.systems(kind="operator", pattern="causal-self", state="works")
    assert [system.slug for system in found] == [
        "lightning_attention",
        "lightning_attention_2",
        "neighborhood_attention",
    ]
    assert all("parallel" in system.rooms for system in catalog.systems(room="parallel"))


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"kind": "operators"}, "did you mean 'operator'"),
        ({"pattern": "causal"}, "did you mean 'causal-self'"),
        ({"room": "op"}, "did you mean 'ops'"),
        ({"state": "done"}, "choose from: works, planned"),
    ],
)
def test_unknown_words_are_refused_with_the_nearest(filters, words):
    with pytest.raises(ValueError, match=words):
        catalog.systems(**filters)


def test_unknown_systems_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'neighborhood_attention'"):
        catalog.get("neighbourhood attention")
    with pytest.raises(ValueError, match="did you mean 'lightning_attention'"):
        catalog.get("lightning")
    assert catalog.get("Duo-Attention").slug == "duo_attention"


def test_the_catalog_does_not_load_torch():
    code = "import sys, manyheads.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

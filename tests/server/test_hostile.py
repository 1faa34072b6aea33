"""Hostile requests and adapters in small numbers; bench/hostile.py sends them by the thousand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer, running_server

from bench.campaigns.harness import SYNTHETIC, Peft, Wanted
from bench.campaigns.hostile import campaign
from bench.campaigns.hostile.adapters import write_mutants
from bench.campaigns.hostile.grammar import Grammar

SEED = 1
NUM_REQUESTS = 300
SOUND = SYNTHETIC[:3]
NUM_ADAPTERS = 60

Answers = tuple[list[tuple[str, str]], list[Wanted]]


@pytest.fixture(scope="module")
def hostile_root(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    for name in SOUND:
        shutil.copytree(small_root / name, root / name)
    write_mutants(root, SEED, NUM_ADAPTERS)
    return root


@pytest.fixture(scope="module")
def known(small_model: Path, hostile_root: Path) -> Answers:
    return campaign.known_answers(Peft(small_model, hostile_root), SOUND)


@pytest.fixture(scope="module")
def small_server(small_model: Path, hostile_root: Path) -> Iterator[RunningServer]:
    """A server whose sequences are short, so that no hostile request is a long one."""
    with running_server(
        base_model=small_model, adapter_root=hostile_root, arguments=campaign.SETTINGS
    ) as running:
        yield running


def check(result: campaign.Result) -> None:
    shown = [f"case {f.case.index} ({f.case.kind}): {f.what}\n{f.case.wire!r:.1000}" for f in result.faults]
    assert shown + result.server_faults == []


def test_hostile_requests_are_each_answered_once_and_rightly(small_server: RunningServer, known: Answers):
    grammar = Grammar(SEED, known[0])
    result = campaign.run(small_server, map(grammar.case, range(NUM_REQUESTS)), known[1])
    check(result)
    assert result.num_cases.total() == NUM_REQUESTS
    assert set(result.num_cases) == set(grammar.kinds)


def test_mutated_adapters_are_refused_or_served(small_server: RunningServer, known: Answers):
    names = [f"m{index:04}" for index in range(NUM_ADAPTERS)]
    result = campaign.run_adapters(small_server, names, *known)
    check(result)
    ends = [end for counts in result.ends.values() for end in counts]
    assert {"served", "INVALID_ARG"} <= set(ends)

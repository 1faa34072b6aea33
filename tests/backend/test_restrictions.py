"""What `--allow` leaves closed. That it is closed is asked of a real server in tests/server/test_doors.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from manylora.errors import InvalidArgumentError
from manylora.serve import limits
from manylora.serve.restrictions import RESTRICTABLE, read_allowed, restriction_arguments


@pytest.mark.parametrize(
    ("allowed", "closed"),
    [
        ([], RESTRICTABLE),
        (["shared-memory"], ("trace", "logging", "model-repository")),
        (["trace, logging", "shared-memory"], ("model-repository",)),
    ],
    ids=["nothing", "one", "several"],
)
def test_what_is_not_allowed_is_closed(allowed: list[str], closed: tuple[str, ...]) -> None:
    arguments = restriction_arguments(read_allowed(allowed))
    assert [argument.partition(":")[0] for argument in arguments] == [
        f"--http-restricted-api={','.join(closed)}",
        f"--grpc-restricted-protocol={','.join(closed)}",
    ]
    names = [argument.partition(":")[2].partition("=")[0] for argument in arguments]
    assert ["\n" in name for name in names] == [True, True]


def test_where_all_is_allowed_nothing_is_closed() -> None:
    assert restriction_arguments(read_allowed(RESTRICTABLE)) == []


@pytest.mark.parametrize("page", ["README.md", "model_repository/llm/config.pbtxt"])
def test_what_is_shown_for_a_bare_tritonserver_closes_the_same(page: str) -> None:
    """The line break in the name is what keeps the key from being sent."""
    text = (Path(__file__).resolve().parents[2] / page).read_text()
    assert f"{','.join(RESTRICTABLE)}:$'closed\\nkey'=none" in text
    assert '--http-restricted-api="$rule" --grpc-restricted-protocol="$rule"' in text


def test_two_servers_have_two_keys() -> None:
    assert restriction_arguments(frozenset()) != restriction_arguments(frozenset())


@pytest.mark.parametrize(
    ("max_model_len", "wanted"), [(0, 64 << 20), (8192, 64 << 20), (131072, 128 << 20)], ids=str
)
def test_a_whole_batch_of_the_longest_prompts_finds_room(max_model_len: int, wanted: int) -> None:
    total = 1 << 30
    assert limits.region_bytes(0, max_model_len=max_model_len, total_bytes=total) == wanted
    assert limits.region_bytes(5 << 20, max_model_len=max_model_len, total_bytes=total) == 5 << 20


@pytest.mark.parametrize("max_model_len", [0, 10**16], ids=["default", "beyond-any-file"])
def test_the_default_leaves_room_for_replies_and_the_other_model(max_model_len: int) -> None:
    assert limits.region_bytes(0, max_model_len=max_model_len, total_bytes=64 << 20) == 16 << 20
    assert limits.shared_memory_bytes() > 0


def test_a_region_longer_than_any_file_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must be at most 9223372036854775807"):
        limits.region_bytes(99999999 << 40, max_model_len=0, total_bytes=64 << 20)

"""The command line without a server: plan and validate, exit codes, help."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from manylora import Engine, EngineConfig, cli
from manylora.commands import request_options
from manylora.commands.generate import describe_logprobs
from manylora.front_end.parameters import PARAMETERS
from manylora.model.outline import outline_model
from manylora.table import columns, cut, fill, render, size
from manylora_client import TokenLogprob
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / ".build" / "base_model"
ADAPTERS = ROOT / "examples" / "adapters"
COMMANDS = ("serve", "status", "generate", "chat", "validate", "plan")

# Runs a command where what only the server needs is not installed.
CLIENT_ONLY = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {"torch", "transformers", "triton", "safetensors", "tokenizers", "zmq", "msgspec", "jinja2"}

class ClientOnly(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path = [ClientOnly if finder is PathFinder else finder for finder in sys.meta_path]
from manylora import cli
sys.exit(cli.main())
"""

# What the commands say that they know, in this order.
SETTABLE = (
    "adapter_scale, max_tokens, min_tokens, stop, stop_token_ids, ignore_eos, add_special_tokens, "
    "temperature, top_p, top_k, min_p, seed, repetition_penalty, presence_penalty, frequency_penalty, "
    "logprobs, echo, deadline_ms, request_priority"
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command's exit status, and what it printed."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_oss", "cohere", "gpt2", "qwen3_moe"])
def test_a_plan_is_what_the_engine_takes(
    tiny_model: Callable[..., Path], run: Run, family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    settings = {"max_loras": "3", "max_lora_rank": "32", "kv_block_size": "8", "kv_cache_bytes": "2M"}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    status, out, _ = run("plan", f"--base-model={model}", "--json", *words)
    assert status == 0
    plan = json.loads(out)
    config = EngineConfig.from_strings({"base_model": str(model), "device": "cpu", **settings})
    with Engine(config) as engine:
        assert plan["pool_bytes"] == engine.pool.tensors.num_bytes
        assert plan["kv_tokens"] == engine.runner.num_blocks * config.kv_block_size
        assert plan["kv_bytes_per_token"] == engine.model.cache_bytes_per_token()
        assert {int(r): n for r, n in plan["adapters_that_fit"].items()} == {
            r: engine.pool.plan(r) for r in (8, 16, 32)
        }
        assert plan["max_model_len"] == engine.model.max_model_len
        assert outline_model(config).spec == engine.model.spec


def test_a_plan_reads_well_on_a_narrow_terminal(run: Run) -> None:
    status, out, _ = run("plan", f"--base-model={BASE_MODEL}")
    assert status == 0
    assert max(map(len, out.splitlines()), default=0) <= max(80, len(str(BASE_MODEL)) + 20)
    assert "device pool" in out
    assert "q_proj+k_proj+v_proj" in out


def test_a_plan_for_cuda_has_room_to_copy_through(run: Run) -> None:
    """As much as the largest adapter takes, and what aligns its sixteen tensors."""
    words = ("plan", f"--base-model={BASE_MODEL}", "--set=max_lora_rank=40")
    on_cpu, on_cuda = (
        json.loads(run(*words, "--json", f"--set=device={device}")[1]) for device in ("cpu", "cuda")
    )
    largest = on_cpu["adapter_bytes"]["40"] + on_cpu["vector_bytes"] // on_cpu["max_loras"]
    assert on_cpu["staging_bytes"] == 0
    assert largest <= on_cuda["staging_bytes"] < largest + 16 * 256
    pages = sum(kind["pages"] * kind["page_bytes"] for kind in on_cpu["kinds"])
    assert on_cpu["pool_bytes"] == pages + on_cpu["vector_bytes"]
    assert 0 < on_cpu["vector_bytes"] < 0.05 * pages
    for total in ("pool_bytes", "device_bytes"):
        assert on_cuda[total] - on_cpu[total] == on_cuda["staging_bytes"]
    block = on_cuda["host_cache_bytes"] // on_cuda["max_cpu_loras"]
    assert block & (block - 1) == 0
    assert on_cuda["staging_bytes"] <= block < 2 * on_cuda["staging_bytes"]
    status, out, _ = run(*words, "--set=device=cuda")
    assert status == 0
    assert "to copy through" in out
    assert "to copy through" not in run(*words, "--set=device=cpu")[1]


def test_a_cache_too_small_is_told_before_anything_is_loaded(run: Run) -> None:
    status, out, err = run("plan", f"--base-model={BASE_MODEL}", "--set=kv_cache_bytes=1M")
    assert (status, out) == (2, "")
    assert "kv_cache_bytes=1048576 holds" in err


def test_good_adapters_are_listed_with_what_they_take(run: Run) -> None:
    status, out, _ = run("validate", ADAPTERS, f"--base-model={BASE_MODEL}")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["haiku", "ok"],
        ["json", "ok"],
        ["pirate", "ok"],
    ]


def test_one_adapter_is_shown_site_by_site(run: Run) -> None:
    status, out, _ = run("validate", ADAPTERS / "pirate", f"--base-model={BASE_MODEL}")
    assert status == 0
    assert "90 of 90" in out
    assert "scaling    2" in out


def test_every_reason_of_a_refusal_is_listed(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ADAPTERS / "haiku", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    config.update(use_dora=True, bias="all")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    status, out, _ = run("validate", tmp_path, f"--base-model={BASE_MODEL}", "--max-lora-rank=4")
    assert status == 1
    assert "UNSUPPORTED" in out
    reasons = [line for line in out.splitlines() if line.startswith("  - ")]
    assert len(reasons) >= 2
    assert any("use_dora" in reason for reason in reasons)
    status, out, _ = run("validate", tmp_path, f"--base-model={BASE_MODEL}", "--json")
    assert (status, json.loads(out)["ok"], json.loads(out)["code"]) == (1, False, "UNSUPPORTED")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory of adapters with a good one, and three whose name or links no server takes."""
    root = tmp_path / "adapters"
    shutil.copytree(ADAPTERS / "haiku", root / "haiku")
    shutil.copytree(ADAPTERS / "haiku", root / "my adapter")
    shutil.copytree(ADAPTERS / "haiku", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "within").symlink_to(root / "haiku")
    (root / "weights").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "weights" / name).symlink_to(tmp_path / "outside" / name)
    return root


REFUSED = {
    "my adapter": "adapter name 'my adapter': must match",
    "link": "adapter 'link' is a link that leaves adapter_root",
    "weights": "adapter_config.json is a link that leaves adapter_root",
}


def test_names_and_links_that_a_server_refuses_are_refused(run: Run, elsewhere: Path) -> None:
    status, out, _ = run("validate", elsewhere, f"--base-model={BASE_MODEL}", "--json")
    assert status == 1
    found = {line["name"]: line for line in map(json.loads, out.splitlines())}
    assert {name for name, line in found.items() if line["ok"]} == {"haiku", "within"}
    assert {name for name, line in found.items() if not line["ok"]} == set(REFUSED)
    for name, told in REFUSED.items():
        assert found[name]["code"] == "INVALID_ARG"
        assert told in found[name]["message"]


@pytest.mark.parametrize("name", REFUSED)
def test_one_adapter_is_judged_by_the_name_and_place_it_is_given_by(
    run: Run, elsewhere: Path, name: str
) -> None:
    status, out, _ = run("validate", elsewhere / name, f"--base-model={BASE_MODEL}")
    assert status == 1
    assert out.startswith(f"{name}: refused, INVALID_ARG\n  - {REFUSED[name]}")


def test_an_adapter_may_be_the_directory_at_hand(
    run: Run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere / "haiku")
    status, out, _ = run("validate", ".", f"--base-model={BASE_MODEL}")
    assert (status, out.splitlines()[0]) == (0, "haiku: binds to base_model")


@pytest.mark.parametrize("setting", ["lora_dtype=float16", "dtype=float16"])
def test_an_adapter_is_checked_against_the_servers_dtype(run: Run, tmp_path: Path, setting: str) -> None:
    adapter = tmp_path / "large"
    shutil.copytree(ADAPTERS / "haiku", adapter)
    tensors = {name: t.float() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    # Beyond float16's 65504.
    next(iter(tensors.values())).fill_(1e5)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    words = ["validate", adapter, f"--base-model={BASE_MODEL}"]
    status, _, _ = run(*words, "--set=lora_dtype=bfloat16")
    assert status == 0
    status, out, _ = run(*words, f"--set={setting}")
    assert status == 1
    assert "values too large for lora_dtype=float16" in out


def test_what_an_adapter_takes_follows_the_servers_dtype(run: Run) -> None:
    words = ["validate", ADAPTERS / "haiku", f"--base-model={BASE_MODEL}"]
    taken = {
        name: json.loads(run(*words, "--json", f"--set=lora_dtype={name}")[1])["num_bytes"]
        for name in ("float16", "float32")
    }
    assert taken["float32"] == 2 * taken["float16"]
    assert "served as  float32" in run(*words, "--set=lora_dtype=float32")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set=lora_dtyp=float16"], "unknown configuration key lora_dtyp"),
        (["--set=lora_dtype=float8"], "lora_dtype='float8': expected auto"),
        (["--max-lora-rank=4", "--set=max_lora_rank=8"], "max_lora_rank is given already, as '4'"),
        (["--set=adapter_root=."], "adapter_root is given already"),
        (["--max-lora-rank=0"], "max_lora_rank=0: must be at least 1"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_setting_that_no_server_takes_is_told(run: Run, words: list[str], told: str) -> None:
    status, out, err = run("validate", ADAPTERS, f"--base-model={BASE_MODEL}", *words)
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["validate", "/no/such/place"], "no such directory"),
        (["validate", "."], "no adapter"),
        (["plan"], "no base model"),
        (["plan", "--base-model", "."], "no usable config.json"),
        (["plan", "--base-model", ".", "--set", "max_lora=3"], "unknown configuration key max_lora"),
        (["generate", "--set", "nonsense", "hi"], "expected NAME=VALUE"),
        (["generate", "--set", "prompt=x", "hi"], f"no such parameter; known are {SETTABLE}"),
        (["generate", "--set", "timeout=abc", "hi"], f"no such parameter; known are {SETTABLE}"),
        (["generate", "--set", "input_ids=[1]", "hi"], f"no such parameter; known are {SETTABLE}"),
        (["generate", "--set", "max_token=3", "hi"], f"no such parameter; known are {SETTABLE}"),
        (["generate", "--set", "adapter_id=pirate", "hi"], "--adapter or /adapter names the adapter"),
        (["chat", "--set", "stream=false"], f"no such parameter; known are {SETTABLE}"),
        (["generate", "--url", "ftp://x", "hi"], "the scheme is 'ftp'"),
        (["generate"], "no prompt"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_without_a_traceback(
    run: Run, words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_server_that_is_not_there_is_told(run: Run) -> None:
    status, out, err = run("generate", "--url=localhost:1", "hi")
    assert (status, out) == (1, "")
    assert "connection to localhost:1 failed" in err


def test_what_can_be_set_is_what_the_wire_contract_names() -> None:
    others = {"adapter_id", "lora_name", "chat"}
    assert {*request_options.SETTABLE, *others} == set(PARAMETERS)
    assert not others & set(request_options.SETTABLE)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("top-k=3", ("top_k", 3)),
        ("ignore_eos=true", ("ignore_eos", True)),
        ('stop=["a", "b"]', ("stop", ["a", "b"])),
        ("stop=the end", ("stop", "the end")),
        ("stop=a=b", ("stop", "a=b")),
        ("stop=" + "[" * 100_000, ("stop", "[" * 100_000)),
        ("seed=", ("seed", "")),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_setting_is_json_or_text(text: str, read: tuple[str, object]) -> None:
    assert request_options.read_setting(text) == read


class Typed(io.StringIO):
    """What a user types, on a terminal or into a pipe; with ^C in a line's place, an interrupt."""

    def __init__(self, *lines: str, is_terminal: bool) -> None:
        super().__init__("".join(f"{line}\n" for line in lines))
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def readline(self, *size: int) -> str:  # type: ignore[override]
        line = super().readline(*size)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`manylora chat` where no server is, with lines of input."""

    def chat(*lines: str, is_terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Typed(*lines, is_terminal=is_terminal))
        return run("chat", "--url=localhost:1")

    return chat


@pytest.mark.parametrize("text", ["stream=false", "timeout=abc", "messages=x", "prompt=x", "chat=true"])
def test_a_chat_goes_on_after_a_setting_that_is_none(chat: Run, text: str) -> None:
    status, out, err = chat(f"/set {text}", "hi", "/set seed=1", "/set")
    assert status == 1
    assert out.splitlines() == [
        f"base> /set {text}",
        "base> hi",
        "base> /set seed=1",
        "(seed=1)",
        "base> /set",
    ]
    wrong, failed, last = err.splitlines()
    assert wrong == f"manylora chat: {text!r}: no such parameter; known are {SETTABLE}"
    assert failed.startswith("manylora chat: connection to localhost:1 failed")
    assert last == "manylora chat: '': expected NAME=VALUE"


def test_a_piped_chat_fails_where_an_answer_did(chat: Run) -> None:
    status, out, err = chat("hi", "/adapter pirate")
    assert (status, out) == (1, "base> hi\nbase> /adapter pirate\n(adapter: pirate)\n")
    assert err.startswith("manylora chat: connection to localhost:1 failed")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("line", "status"), [("/bogus", 1), ("/reset", 0), ("", 0), ("/quit", 0)])
def test_a_piped_chat_fails_where_a_command_did(chat: Run, line: str, status: int) -> None:
    found, out, err = chat(line)
    assert found == status
    assert err == ("manylora chat: no command /bogus; /help names them\n" if status else "")
    assert "no command" not in out


def test_a_chat_on_a_terminal_shows_errors_and_goes_on(chat: Run) -> None:
    status, out, err = chat("hi", "/bogus", "^C", "/set stream=false", is_terminal=True)
    assert (status, err) == (0, "")
    assert "base> error: connection to localhost:1 failed" in out
    assert "base> no command /bogus; /help names them\n" in out
    assert "base> \n(/quit or Ctrl-D ends)\n" in out
    assert "base> error: 'stream=false': no such parameter" in out


def test_an_interrupt_ends_a_piped_chat(chat: Run) -> None:
    status, out, _ = chat("/reset", "^C", "/reset")
    assert (status, out) == (130, "base> /reset\n(begun anew)\n")


def test_help_says_how_a_piped_chat_ends(run: Run) -> None:
    assert "the exit status is 1 if any line failed" in run("chat", "--help")[1]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_names_what_can_be_set(run: Run, command: str) -> None:
    words = run(command, "--help")[1].replace(",", "").split()
    assert set(request_options.SETTABLE) <= set(words)


@pytest.mark.parametrize(
    "words",
    [["plan", "--base-model=x"], ["validate", "x"], ["serve", "--base-model=x"], ["status"]],
    ids=lambda words: words[0],
)
def test_a_client_only_install_names_what_a_command_needs(words: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", CLIENT_ONLY, *words], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    needed = "msgspec, torch, transformers, zmq"
    assert found.stderr == f"manylora {words[0]}: needs {needed}: pip install 'manylora[server]'\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "examples:" in out
    assert "exit status: 0 done, 1 failed, 2" in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_reader_that_leaves_early_is_no_error() -> None:
    pipe = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.close()"], stdin=subprocess.PIPE, close_fds=True
    )
    assert pipe.stdin
    pipe.wait()
    assert stat.S_ISFIFO(os.fstat(pipe.stdin.fileno()).st_mode)
    words = ["plan", f"--base-model={BASE_MODEL}", "--json"]
    found = subprocess.run(
        [sys.executable, "-m", "manylora.cli", *words],
        stdout=pipe.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    pipe.stdin.close()
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_a_table_sets_columns_to_their_widest_cell() -> None:
    found = render(("name", "n"), [("a", 1), ("longer", 100)], right=(1,))
    assert found.splitlines() == ["name      n", "a         1", "longer  100"]


def likeliest(texts: list[str], logprob: float) -> TokenLogprob:
    """A token, with itself and the other texts as its alternatives."""
    top = [TokenLogprob(id=i, text=text, logprob=logprob) for i, text in enumerate(texts)]
    return TokenLogprob(id=0, text=texts[0], logprob=logprob, top=top)


@pytest.mark.parametrize(
    "tokens",
    [
        [likeliest([f" word{i}" for i in range(20)], -12.5)],
        [likeliest([" " * i for i in range(40, 20, -1)], -1e9), likeliest(["a"], -0.001)],
        [likeliest(["\u5929\u7a7a" * 9, *"\u4e3a\u4ec0\u4e48"], -3.0)],
        [likeliest(["x"], 0.0)],
    ],
    ids=["twenty", "widest", "chinese", "one"],
)
def test_log_probabilities_stay_within_80_columns(tokens: list[TokenLogprob]) -> None:
    lines = describe_logprobs(tokens).splitlines()
    assert max(map(columns, lines)) <= 80
    assert lines[0].split() == ["token", "logprob", "likeliest"]
    start = lines[0].index("likeliest")
    # No cell but the likeliest ones on a line that goes on.
    assert len([line for line in lines[1:] if line[:1] == "'"]) == len(tokens)
    assert all(line[:start].isspace() for line in lines[1:] if line[:1] != "'")
    numbers = [f"{other.logprob:.3f}" for token in tokens for other in (token, *token.top)]
    assert sorted(w for line in lines[1:] for w in line.split() if w in numbers) == sorted(numbers)


def test_alternatives_keep_their_order() -> None:
    texts = [f"w{i}" for i in range(20)]
    shown = describe_logprobs([likeliest(texts, -1.5)]).splitlines()[1:]
    assert len(shown) > 2
    assert " ".join(shown).split()[2::2] == [repr(text) for text in texts]


def test_texts_are_cut_to_columns() -> None:
    assert [cut("abcdef", 6), cut("abcdefg", 6)] == ["abcdef", "abc..."]
    assert cut("\u5929\u7a7a\u5929\u7a7a", 7) == "\u5929\u7a7a..."
    assert [columns("e\u0301"), columns("\u5929")] == [1, 2]


def test_parts_fill_lines() -> None:
    assert fill(["aa", "bb", "cc"], 6) == ["aa  bb", "cc"]
    assert fill(["too long", "a"], 3) == ["too long", "a"]
    assert fill([], 3) == [""]


def test_sizes_have_the_unit_that_fits() -> None:
    assert [size(n) for n in (0, 999, 2048, 150 * 2**20, 2.5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "999 B",
        "2.0 KiB",
        "150 MiB",
        "2.5 GiB",
        "3.0 TiB",
    ]


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"manylora {version('manylora')}\n", "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        pytest.param("manylora se", ["serve"], id="command"),
        pytest.param("manylora serve --base", ["--base-model"], id="option"),
        pytest.param("manylora serve --set max_l", ["max_loras=", "max_lora_rank="], id="setting"),
        pytest.param("manylora generate --set pres", ["presence_penalty="], id="parameter"),
        pytest.param("manylora validate {}/ad", ["{}/adapters/"], id="directory"),
    ],
)
def test_a_shell_completes(line: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters.txt").touch()
    line = line.format(tmp_path)
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    (tmp_path / "offered").touch()
    command = [sys.executable, "-m", "manylora.cli"]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    found = (tmp_path / "offered").read_text().split("\n")
    assert [word.strip() for word in found] == [word.format(tmp_path) for word in offered]


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_what_only_some_need_is_not_imported_for_all(asked: str) -> None:
    program = (
        "import sys\nfrom manylora import cli\n"
        f"try: cli.main([{asked!r}])\nexcept SystemExit: pass\n"
        "print(sorted({'argcomplete', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")

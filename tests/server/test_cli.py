"""`manylora generate` and `chat` against the running server, piped and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import pytest
from manylora.serve.background import RunningServer
from manylora_client import Client

MANYLORA = [sys.executable, "-m", "manylora.cli"]
QUESTION = "Why is the sky blue?"


def run(server: RunningServer, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*MANYLORA, words[0], "--url", server.http, *words[1:]]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)


def expected(server: RunningServer, adapter: str, **parameters: object) -> str:
    with Client(server.http) as client:
        return client.chat(QUESTION, adapter_id=adapter, **parameters).text  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["--stream", "--no-stream"])
def test_generate_gives_the_answer_of_each_adapter(server: RunningServer, form: str) -> None:
    words = ["--chat", form, "--adapter=pirate", "--adapter=", "--max-tokens=24", QUESTION]
    found = run(server, "generate", *words)
    assert found.returncode == 0, found.stderr
    assert found.stdout == (
        f"--- pirate\n{expected(server, 'pirate', max_tokens=24)}\n"
        f"--- (base model)\n{expected(server, '', max_tokens=24)}\n"
    )


def test_a_chat_prompt_that_begins_with_a_bracket_is_a_message_and_a_list_of_messages_a_conversation(
    server: RunningServer,
) -> None:
    messages = [{"role": "user", "content": "[1, 2] and {3} summed?"}]
    with Client(server.http) as client:
        answer = client.chat(messages[0]["content"], max_tokens=4).text
    for prompt in (messages[0]["content"], json.dumps(messages)):
        found = run(server, "generate", "--chat", "--max-tokens=4", prompt)
        assert (found.returncode, found.stdout) == (0, f"{answer}\n"), found.stderr


def test_generate_reads_standard_input_and_writes_json(server: RunningServer) -> None:
    found = run(server, "generate", "--json", "--max-tokens=3", "--logprobs=2", stdin="The sea is\n")
    answer = json.loads(found.stdout)
    assert answer["prompt"] == "The sea is"
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == answer["num_output_tokens"] == 3
    assert [len(token["top"]) for token in answer["logprobs"]] == [2, 2, 2]


def test_many_alternatives_stay_within_80_columns(server: RunningServer) -> None:
    found = run(server, "generate", "--max-tokens=3", "--logprobs=20", "The sea is")
    assert found.returncode == 0, found.stderr
    table = found.stdout[found.stdout.index("token ") :].splitlines()
    assert max(map(len, table)) <= 80
    with Client(server.http) as client:
        tokens = client.generate("The sea is", max_tokens=3, logprobs=20).logprobs
    assert tokens is not None
    numbers = [f"{other.logprob:.3f}" for token in tokens for other in (token, *token.top)]
    assert len(numbers) == 63
    assert [word for line in table for word in line.split() if word in numbers] == numbers


def test_what_the_server_refuses_is_told_in_one_line(server: RunningServer) -> None:
    found = run(server, "generate", "--adapter=nobody", "hi")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "manylora generate: adapter 'nobody' is not found\n"


def test_a_chat_changes_its_adapter_and_outlives_errors(server: RunningServer) -> None:
    lines = [QUESTION, "/adapter pirate", "/reset", QUESTION, "/adapter nobody", "hello", "/bogus", "/quit"]
    found = run(server, "chat", "--max-tokens=24", stdin="\n".join(lines) + "\n")
    assert found.returncode == 1
    assert found.stderr.splitlines() == [
        "manylora chat: adapter 'nobody' is not found",
        "manylora chat: no command /bogus; /help names them",
    ]
    assert found.stdout.splitlines() == [
        f"base> {QUESTION}",
        *expected(server, "", max_tokens=24).splitlines(),
        "base> /adapter pirate",
        "(adapter: pirate)",
        "pirate> /reset",
        "(begun anew)",
        f"pirate> {QUESTION}",
        *expected(server, "pirate", max_tokens=24).splitlines(),
        "pirate> /adapter nobody",
        "(adapter: nobody)",
        "nobody> hello",
        "nobody> /bogus",
        "nobody> /quit",
    ]


def test_a_chat_answers_after_a_setting_that_is_none(server: RunningServer) -> None:
    lines = ["/set stream=false", "/set timeout=abc", "/set max-tokens=5", QUESTION]
    found = run(server, "chat", stdin="\n".join(lines) + "\n")
    assert found.returncode == 1
    wrong = found.stderr.splitlines()
    assert [line.partition("; ")[0] for line in wrong] == [
        "manylora chat: 'stream=false': no such parameter",
        "manylora chat: 'timeout=abc': no such parameter",
    ]
    answer = expected(server, "", max_tokens=5)
    assert found.stdout.endswith(f"(max_tokens=5)\nbase> {QUESTION}\n{answer}\n")


def test_a_chat_without_failure_ends_with_0(server: RunningServer) -> None:
    found = run(server, "chat", "--max-tokens=3", stdin=f"{QUESTION}\n")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_chat_keeps_its_history(server: RunningServer) -> None:
    found = run(server, "chat", "--max-tokens=16", stdin=f"{QUESTION}\nAnd at night?\n")
    with Client(server.http) as client:
        first = client.chat(QUESTION, max_tokens=16).text
        second = client.chat(
            [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": first},
                {"role": "user", "content": "And at night?"},
            ],
            max_tokens=16,
        ).text
    assert found.stdout == f"base> {QUESTION}\n{first}\nbase> And at night?\n{second}\n"


class Terminal:
    """`manylora chat` on a pseudo terminal."""

    def __init__(self, server: RunningServer) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # Whatever runs the tests in the background has them, and what they start, ignore it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(
                sys.executable,
                [*MANYLORA, "chat", "--url", server.http, "--max-tokens", "2000", "--set", "ignore_eos=true"],
            )
        self.seen = ""

    def read_until(self, pattern: str) -> str:
        """What was shown up to the pattern, which is taken away."""
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.fd], [], [], 300)
            assert ready, f"waited for {pattern!r}, saw {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Wait for its end; returns the exit status."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # how a terminal says that the other side has gone
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: RunningServer) -> None:
    terminal = Terminal(server)
    try:
        terminal.read_until("base> ")
        terminal.type("Tell me a story.\n")
        # Echoed, then some of the answer.
        terminal.read_until(r"story\.\r\n(.|\n){20}")
        terminal.type("\x03")
        terminal.read_until(r"\[stopped\](.|\n)*base> ")
        terminal.type("/set max_tokens=4\n")
        terminal.read_until("max_tokens=4(.|\n)*base> ")
        terminal.type("Again?\n")
        terminal.read_until("Again(.|\n)*\nbase> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()

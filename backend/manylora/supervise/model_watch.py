"""Watches one model of a running server and reports when it is dead or hung.

Triton keeps calling a model ready whose process is dead or hung. So the front end itself is asked, and what
Triton has queued for it is compared with what reaches it. None of the questions is a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from manylora.supervise.health import StageState, read_stages
from manylora.supervise.probe import (
    HttpProbe,
    KeptConnection,
    KeptConnectionProbe,
    Probe,
    http_status,
    ready_path,
)

LOOKS_BETWEEN = 20
"""Looks from one answer to the next question."""
HUNG_LOOKS = 240
"""Looks that an answer may take. It needs neither engine nor model, and only a moment."""
HUNG_ANSWERS = 12
"""Answers in a row, over a minute or more, that show a stage busy in the same turn: a turn with a thousand
prompts to tokenise ends in that time. Also answers in a row of metrics with requests that do not get
through."""
MAX_BAD_ANSWERS = 2
"""In a row, by which a model is given up as dead."""

EXECUTE = "execute"
"""The stage that takes requests from Triton."""

_PENDING = r'^nv_inference_pending_request_count\{{[^}}]*model="{}"[^}}]*\}} (\d+)'


class ModelWatch:
    """Counts its looks, four a second, instead of comparing times: a pause of the whole machine is one
    look."""

    def __init__(
        self,
        model: str,
        *,
        health: Path,
        http: str,
        metrics: str,
        is_full: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            health: socket of the model's front end.
            http: host:port of tritonserver.
            metrics: host:port of its metrics.
            is_full: whether it has so many connections that it can accept no other one.
        """
        self._model = model
        self._pending = re.compile(_PENDING.format(re.escape(model)), re.MULTILINE)
        self._stages: dict[str, StageState] = {}
        """As last said."""
        self._num_same: dict[str, int] = {}
        """Answers in a row with the stage busy in the same turn."""
        self._num_undelivered = 0
        """Answers in a row with requests in Triton and no turn of `execute` since the one before."""
        self._num_executed: int | None = None
        """Turns of `execute` by the answer before."""
        self._is_full = is_full
        self._say = say
        self._has_warned = False
        self._kept = KeptConnection(http)
        self._questions = (
            _Question(
                lambda: Probe(health),
                self._judge_health,
                silent=f"{model} hangs: it does not even say that it lives",
                dead=f"{model} does not say how it is",
            ),
            _Question(
                lambda: KeptConnectionProbe(self._kept, ready_path(model)),
                _judge_ready,
                silent=f"tritonserver hangs: it does not say whether {model} is ready",
                dead=f"tritonserver does not call {model} ready",
                is_excused=self._cannot_ask,
            ),
            # Metrics that do not come say nothing.
            _Question(lambda: HttpProbe(metrics, "/metrics"), self._judge_pending),
        )

    def look(self) -> str:
        """Look once.

        Returns: what is wrong; empty when nothing is.
        """
        problems = [question.look() for question in self._questions]
        return next(filter(None, problems), "")

    def close(self) -> None:
        """Abandon the questions in flight."""
        for question in self._questions:
            question.close()
        self._kept.close()

    def _cannot_ask(self) -> bool:
        """Whether tritonserver may be silent because it cannot accept our connection, not because it
        hangs."""
        if self._kept.is_accepted or not self._is_full():
            self._has_warned = False
            return False
        if not self._has_warned:
            self._say(
                f"{self._model} cannot be asked: tritonserver has as many connections as it may have open "
                "files; bound them with a proxy in front, or raise the limit (ulimit -n)"
            )
        self._has_warned = True
        return True

    def _judge_health(self, answer: str) -> str:
        stages = read_stages(answer)
        hung = ""
        for name, state in stages.items():
            is_same = state.is_busy and state == self._stages.get(name)
            self._num_same[name] = self._num_same.get(name, 0) + 1 if is_same else 0
            if self._num_same[name] >= HUNG_ANSWERS:
                hung = f"{self._model} hangs: one turn of {name} does not come to an end"
        self._stages = stages
        return hung

    def _judge_pending(self, answer: str) -> str:
        found = self._pending.search(answer)
        num_executed = self._stages[EXECUTE].num_turns if EXECUTE in self._stages else None
        is_waiting = found is not None and int(found[1]) > 0
        is_undelivered = is_waiting and num_executed is not None and num_executed == self._num_executed
        self._num_executed = num_executed
        self._num_undelivered = self._num_undelivered + 1 if is_undelivered else 0
        if self._num_undelivered < HUNG_ANSWERS:
            return ""
        return f"{self._model} hangs: requests wait in Triton and none reaches it"


class _Question:
    """Asked again and again."""

    def __init__(
        self,
        ask: Callable[[], Probe],
        judge: Callable[[str], str],
        *,
        silent: str = "",
        dead: str = "",
        is_excused: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            judge: says what an answer shows to be wrong, empty for nothing; ValueError where it is no answer.
            silent: what is wrong when no answer comes; empty: nothing.
            dead: what is wrong when there is nobody, or what comes is no answer; empty: nothing.
            is_excused: asked before either is said; true: nothing is wrong as yet.
        """
        self._ask = ask
        self._judge = judge
        self._is_excused = is_excused
        self._silent = silent
        self._dead = dead
        self._probe: Probe | None = None
        self._num_looks = 0
        """Since it was asked, or since its answer."""
        self._num_bad = 0

    def look(self) -> str:
        self._num_looks += 1
        if self._probe is None:
            if self._num_looks >= LOOKS_BETWEEN:
                self._probe = self._ask()
                self._num_looks = 0
            return ""
        if not self._probe.poll(0):
            return self._give_up()
        probe = self._probe
        self.close()
        self._num_looks = 0
        if probe.failure is not None:
            # What failed on our own side says nothing of the other one.
            return self._bad(str(probe.failure)) if probe.nobody_is_there else ""
        try:
            problem = self._judge(probe.answer.decode(errors="replace"))
        except ValueError as error:
            return self._bad(str(error))
        self._num_bad = 0
        return problem

    def close(self) -> None:
        if self._probe:
            self._probe.close()
        self._probe = None

    def _give_up(self) -> str:
        """On an answer that does not come, after so many looks."""
        if self._num_looks < HUNG_LOOKS:
            return ""
        if self._is_excused():
            self._num_looks = 0
            return ""
        return self._silent

    def _bad(self, why: str) -> str:
        if self._is_excused():
            return ""
        self._num_bad += 1
        return f"{self._dead}: {why}" if self._dead and self._num_bad >= MAX_BAD_ANSWERS else ""


def _judge_ready(answer: str) -> str:
    if http_status(answer) != 200:
        raise ValueError(answer.partition("\r\n")[0] or "it hangs up")
    return ""

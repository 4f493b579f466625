"""Reading a server's metrics for the terminal."""

from __future__ import annotations

import urllib.request
from http.client import IncompleteRead
from io import StringIO

import pytest
from rich.console import Console, RenderableType
from rich.live import Live

from vllm_propd import watch as watching
from vllm_propd.watch import Reading, bars, parse, rates, view

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 3.0
# HELP vllm:propd_steps_total Number of engine steps.
# TYPE vllm:propd_steps_total counter
vllm:propd_steps_total{{engine="0",model_name="m"}} {steps}
# HELP vllm:propd_sequences_total Sequences.
# TYPE vllm:propd_sequences_total counter
vllm:propd_sequences_total{{engine="0",model_name="m"}} {sequences}
vllm:propd_sequences_total{{engine="1",model_name="m"}} 0.0
# HELP vllm:propd_tree_nodes_total Nodes.
# TYPE vllm:propd_tree_nodes_total counter
vllm:propd_tree_nodes_total{{engine="0",model_name="m"}} {nodes}
# HELP vllm:propd_emitted_tokens_total Tokens.
# TYPE vllm:propd_emitted_tokens_total counter
vllm:propd_emitted_tokens_total{{engine="0",model_name="m"}} {emitted}
# HELP vllm:propd_measured_step_seconds_total Seconds.
# TYPE vllm:propd_measured_step_seconds_total counter
vllm:propd_measured_step_seconds_total{{engine="0",model_name="m"}} {seconds}
# HELP vllm:spec_decode_num_drafts_total Drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {sequences}
# HELP vllm:spec_decode_num_drafts_created Drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7e9
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} 0.0
"""


def text(steps: int) -> str:
    return TEXT.format(
        steps=steps, sequences=4 * steps, nodes=20 * steps, emitted=7 * steps,
        seconds=0.05 * steps, first=3 * steps,
    )  # fmt: skip


def test_rates_are_of_the_time_between() -> None:
    found = rates(parse(text(100), 10.0), parse(text(150), 12.0))
    assert found.running == 3
    assert found.tokens_per_s == pytest.approx(7 * 50 / 2)
    assert found.tree_size == pytest.approx(5)
    assert found.tokens_per_step == pytest.approx(7 / 4)
    assert found.step_ms == pytest.approx(50)
    assert found.per_depth == pytest.approx([0.75])
    assert found.expected == 0  # this server counts no expectations


def test_an_idle_server_has_no_rates() -> None:
    found = rates(parse(text(100), 10.0), parse(text(100), 12.0))
    assert found.tokens_per_s == 0
    assert [found.tree_size, found.step_ms, found.per_depth] == [None, None, []]
    console = Console(record=True, width=100)
    console.print(view("http://here", [found]))
    assert "tree size" in console.export_text()


def test_a_server_that_was_started_anew_counts_from_nothing() -> None:
    found = rates(parse(text(100), 10.0), parse(text(4), 12.0))
    assert found.tokens_per_s == pytest.approx(7 * 4 / 2)
    assert (found.tree_size, found.tokens_per_step) == (5, 7 / 4)
    assert found.per_depth == pytest.approx([0.75])
    nothing = rates(parse(text(100), 10.0), parse(text(0), 12.0))
    assert [nothing.tokens_per_s, nothing.tree_size, nothing.per_depth] == [0, None, []]


def test_another_server_is_refused() -> None:
    with pytest.raises(ValueError, match="does the server run with propd"):
        parse("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n", 0.0)


def test_bars_are_as_high_as_values() -> None:
    assert bars([0.0, 4.0, 8.0, None]) == " ▄█ "
    assert bars([None]) == " "


def test_bars_below_zero_are_empty() -> None:
    assert bars([-900.0, 4.0, 8.0]) == " ▄█"
    assert bars([-1.0, None]) == "  "


def reads(monkeypatch: pytest.MonkeyPatch, *found: Reading | BaseException) -> list[str]:
    """Lets a server say all this, one after another; returns what is shown, as it comes."""
    left, shown = list(found), []

    def read(url: str) -> Reading:
        now = left.pop(0)
        if isinstance(now, BaseException):
            raise now
        return now

    def update(self: Live, screen: RenderableType, refresh: bool) -> None:
        console = Console(record=True, width=100, file=StringIO())
        console.print(screen)
        shown.append(console.export_text())

    monkeypatch.setattr(watching, "read", read)
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Live, "update", update)
    return shown


def test_a_server_that_is_started_anew_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, anew = (
        parse(text(100), 10.0),
        parse(text(150), 12.0),
        parse(text(4), 16.0),
    )
    gone = ConnectionRefusedError("refused")
    shown = reads(monkeypatch, first, gone, second, gone, anew, KeyboardInterrupt())
    watching.watch("http://here", 1.0, once=False)
    silent, alive, silent_again, back = shown
    assert "no answer from http://here: refused" in silent and "tokens" not in silent
    assert "175.0 /s" in alive and "no answer" not in alive
    assert "no answer" in silent_again and "175.0 /s" in silent_again
    assert "7.0 /s" in back and "no answer" not in back


@pytest.mark.parametrize(("answers", "once"), [(0, False), (0, True), (1, True)])
def test_a_server_that_is_not_there_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, answers: int, once: bool
) -> None:
    reads(monkeypatch, *[parse(text(1), 0.0)] * answers, ConnectionRefusedError("refused"))
    with pytest.raises(OSError, match="refused"):
        watching.watch("http://here", 1.0, once)


def test_an_answer_that_breaks_off_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> None:
        raise IncompleteRead(b"half")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match="http://here/metrics: IncompleteRead"):
        watching.read("http://here/")

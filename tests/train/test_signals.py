import signal
import threading

import pytest

from rankwise.train.signals import Interrupted, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_kept_and_the_second_acts(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda n, _: seen.append(n))
    try:
        with StopRequest() as stop:
            assert stop.number is None
            signal.raise_signal(number)
            assert stop.number == number
            assert seen == []
            signal.raise_signal(number)
            assert seen == [number]
    finally:
        signal.signal(number, before)


def test_the_second_ctrl_c_ends_the_program() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_are_put_back() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest():
        assert all(signal.getsignal(n) != handler for n, handler in before.items())
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend((signal.getsignal(signal.SIGINT), stop.number))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


def test_the_message_says_how_to_go_on() -> None:
    error = Interrupted(signal.SIGINT, "rankwise fit --resume --out runs/first")
    assert error.number == 2
    assert "rankwise fit --resume --out runs/first" in str(error)


def test_the_first_signal_is_answered_at_once() -> None:
    told: list[str] = []
    with StopRequest(told.append):
        signal.raise_signal(signal.SIGTERM)
        assert told == ["Stopping after this step; again to stop at once."]


def test_an_answer_that_the_stream_refuses_stops_nothing() -> None:
    """A stream refuses a line that comes in the middle of another one."""

    def refuse(text: str) -> None:
        raise RuntimeError("reentrant call")

    with StopRequest(refuse) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT

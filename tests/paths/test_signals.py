"""Signals set flags that the loop reads; nothing else happens, except on the second ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from turnout.train.signals import StopRequest


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def at_a_terminal() -> Iterator[None]:
    """Started by nohup, the tests would ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.is_active
        assert not stop.requested
        raise_signal(number)
        assert stop.requested
        assert stop.received is number
        assert not stop.save_requested()


def test_a_process_that_was_told_to_outlive_its_terminal_does() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        raise_signal(signal.SIGHUP)
        assert not stop.requested


def test_repeated_sigterm_is_patient_and_the_first_signal_is_kept() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            raise_signal(number)
        assert stop.received is signal.SIGTERM


@pytest.mark.parametrize("first", [[], [signal.SIGTERM]])
def test_a_second_interrupt_ends_at_once(first: list[int]) -> None:
    with StopRequest():
        for number in [*first, signal.SIGINT]:
            raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            raise_signal(signal.SIGINT)


def test_sigusr1_asks_for_one_save_and_no_end() -> None:
    with StopRequest() as stop:
        raise_signal(signal.SIGUSR1)
        raise_signal(signal.SIGUSR1)
        assert not stop.requested
        assert stop.save_requested()
        assert not stop.save_requested()


def test_the_handlers_found_are_put_back_also_after_an_error() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ValueError, match="inside"), StopRequest():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in numbers] == before


def test_requests_nest() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            raise_signal(signal.SIGTERM)
        assert inner.requested
        assert not outer.requested
        raise_signal(signal.SIGTERM)
        assert outer.requested


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([stop.is_active, stop.requested])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, False]
    assert signal.getsignal(signal.SIGTERM) is before

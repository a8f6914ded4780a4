"""A first signal asks, a second one ends, and the handlers of before come back."""

import signal
import threading

import pytest

from spark_fast.run.signals import Interrupt


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_a_signal_is_remembered_and_released_handlers_are_those_of_before(number, capfd):
    before = [signal.getsignal(s) for s in Interrupt.SIGNALS]
    interrupt = Interrupt()
    try:
        assert not interrupt.asked
        signal.raise_signal(number)
        assert interrupt.asked
        signal.raise_signal(number)  # within the same second: torchrun passes on what the scheduler sent
        assert capfd.readouterr().err.strip() == "finishing the step and saving; the next signal ends the run at once"
    finally:
        interrupt.release()
    assert [signal.getsignal(s) for s in Interrupt.SIGNALS] == before


def test_in_another_thread_signals_are_left_alone(caplog):
    before = [signal.getsignal(s) for s in Interrupt.SIGNALS]
    caplog.set_level("INFO", "spark_fast")

    def use():
        interrupt = Interrupt()
        assert [signal.getsignal(s) for s in Interrupt.SIGNALS] == before
        interrupt.release()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [signal.getsignal(s) for s in Interrupt.SIGNALS] == before
    assert "not in the main thread" in caplog.text

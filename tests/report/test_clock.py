"""Seconds and tokens of phases, against a clock that the test moves."""

import pytest

from hybrid_engine.report.clock import PhaseClock


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return PhaseClock(time)


def test_seconds_and_rates_since_the_last_take(clock, time):
    with clock.phase("generate"):
        time.pass_by(1)
        clock.count(10)
        time.pass_by(1)
        clock.count(40)
        assert clock.rate() == 20.0
    with clock.phase("train"):
        time.pass_by(3)
    assert clock.take() == {
        "seconds_generate": 2.0,
        "seconds_train": 3.0,
        "tokens_per_second_generate": 20.0,
    }
    assert clock.take() == {}
    with clock.phase("generate"):
        time.pass_by(2)
        clock.count(10)  # counts start anew with every visit
    assert clock.take() == {"seconds_generate": 2.0, "tokens_per_second_generate": 5.0}
    assert clock.seconds == {"generate": 4.0, "train": 3.0}


def test_inner_phase_is_not_counted_twice(clock, time):
    with clock.phase("evaluate"):
        time.pass_by(1)
        with clock.phase("generate"):
            time.pass_by(5)
            clock.count(5)
        time.pass_by(2)
    assert clock.take() == {
        "seconds_evaluate": 3.0,
        "seconds_generate": 5.0,
        "tokens_per_second_generate": 1.0,
    }
    assert sum(clock.seconds.values()) == clock.elapsed() == 8.0


def test_take_inside_a_phase(clock, time):
    with clock.phase("train"):
        time.pass_by(2)
        clock.count(8)
        assert clock.take() == {"seconds_train": 2.0, "tokens_per_second_train": 4.0}
        time.pass_by(1)
        clock.count(9)
        assert clock.take() == {"seconds_train": 1.0, "tokens_per_second_train": 1.0}


def test_time_outside_phases_belongs_to_none(clock, time):
    time.pass_by(4)
    with clock.phase("train"):
        time.pass_by(1)
    time.pass_by(4)
    assert clock.seconds == {"train": 1.0}
    assert clock.rate() == 0.0
    clock.count(7)  # no phase is running
    assert clock.take() == {"seconds_train": 1.0}


def test_a_phase_ends_with_its_exception(clock, time):
    def fail():
        with clock.phase("train"):
            time.pass_by(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.current is None
    assert clock.seconds == {"train": 1.0}

import dataclasses
import math

import pytest

from starcast import Broadcast, ConfigurationError, Tuning


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Tuning)])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, None, "10"])
def test_a_value_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be a number above 0, not "):
        Tuning(**{name: value})


def test_sizes_are_whole_numbers():
    with pytest.raises(ConfigurationError, match=r"max_pending must be an integer, not 1\.5"):
        Tuning(max_pending=1.5)


def test_times_may_be_whole_numbers():
    assert Tuning(close_timeout=2).close_timeout == 2


@pytest.mark.parametrize("value", [10, {}, Tuning])
def test_a_hub_takes_nothing_else(value):
    with pytest.raises(ConfigurationError, match="tuning must be a Tuning, not "):
        Broadcast(tuning=value)

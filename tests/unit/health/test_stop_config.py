import pytest
from pydantic import ValidationError

from dstrain.health.stop_config import StopConfig, budget_limits, tokens_spent, training_spent
from dstrain.health.stop_deadline import Limit


def test_without_settings_nothing_ends_a_run():
    assert budget_limits(StopConfig(), started=5.0, num_devices=8) == {}
    assert tokens_spent(StopConfig(), 10**15) is None


def test_hours_of_a_job_may_be_continued():
    [limit] = budget_limits(StopConfig(max_hours=2.0), started=100.0, num_devices=8, earlier_device_s=1e9).values()
    assert limit == Limit(7300.0, "stop.max_hours: 2 are over")
    assert limit.requeue


def test_device_hours_count_all_devices_and_all_earlier_jobs_and_end_the_run():
    config = StopConfig(max_device_hours=10.0)
    [limit] = budget_limits(config, started=100.0, num_devices=4, earlier_device_s=6 * 3600.0).values()
    assert limit == Limit(3700.0, "stop.max_device_hours: 10 are spent", requeue=False)
    [spent] = budget_limits(config, started=100.0, num_devices=4, earlier_device_s=11 * 3600.0).values()
    assert spent.at < 100.0


def test_dollars_are_device_hours_at_a_price():
    config = StopConfig(max_usd=30.0, usd_per_device_hour=3.0, max_device_hours=100.0)
    limits = budget_limits(config, started=0.0, num_devices=5)
    assert limits["max_usd"] == Limit(7200.0, "stop.max_usd: 30 are spent", requeue=False)
    assert limits["max_device_hours"].at == 72000.0
    with pytest.raises(ValidationError, match="max_usd needs usd_per_device_hour"):
        StopConfig(max_usd=30.0)


def test_tokens():
    config = StopConfig(max_tokens=1000)
    assert tokens_spent(config, 999) is None
    assert tokens_spent(config, 1000) == "stop.max_tokens: 1000 are done"


def test_hours_in_steps():
    config = StopConfig(max_training_hours=0.5)
    assert training_spent(config, 1799.9) is None
    assert training_spent(config, 1800.0) == "stop.max_training_hours: 0.5 are over"
    assert training_spent(StopConfig(), 1e12) is None

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.health.start_config import StartConfig


def test_every_check_is_on_and_the_wait_is_shorter_than_a_collectives():
    config = StartConfig()
    assert all(getattr(config, name) for name in ("clock", "disk", "shared_folder", "network", "gpu"))
    assert config.join_s < 600


@pytest.mark.parametrize(
    "given", [{"join_s": 0.0}, {"network_share": 1.0}, {"gpu_share": 0.0}, {"clock_limit_s": -1.0}, {"gpus": True}]
)
def test_what_cannot_be_meant_is_refused(given):
    with pytest.raises(ConfigError):
        validate(StartConfig, given, source="test")

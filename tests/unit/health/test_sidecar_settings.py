import json

from dstrain.health.sidecar_settings import SidecarSettings


def test_settings_survive_the_command_line(settings):
    assert SidecarSettings.from_plain(json.loads(json.dumps(settings.to_plain()))) == settings

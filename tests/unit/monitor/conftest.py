import logging

import pytest


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def messages():
    """What dstrain logged during the test, whatever `configure_logs` did to the logger before."""
    logger = logging.getLogger("dstrain")
    handler, level = _Messages(), logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)

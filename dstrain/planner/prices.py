"""Prices and power from a table that people edit: a YAML beside this file, or their own.

The packaged numbers are orders of magnitude and say so. Knows no market.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import Field

from dstrain.base.config import Config, read_yaml, validate
from dstrain.base.errors import ConfigError
from dstrain.planner.devices import Device


class DevicePrice(Config):
    """What a device costs."""

    price_per_hour: float = Field(ge=0.0)
    """Of one device with its share of the host, in the table's currency."""
    watts: float | None = Field(default=None, gt=0.0)
    """Of the device under load; default: its data sheet's."""


class PriceTable(Config):
    """All of a price file."""

    currency: str = "USD"
    """Printed behind amounts."""
    as_of: str = ""
    """When the numbers were written down."""
    host_watts_per_device: float = Field(default=200.0, ge=0.0)
    """Share of host, fans and network that comes with a device, W."""
    power_usage_effectiveness: float = Field(default=1.3, ge=1.0)
    """Power drawn from the grid over power drawn by machines."""
    devices: dict[str, DevicePrice]
    """By name, as --gpu-type takes it."""


def load_prices(path: Path | None) -> PriceTable:
    """The packaged table, or another one.

    Raises:
        ConfigError: the file is missing or not a price table.
    """
    if path is not None:
        return validate(PriceTable, read_yaml(path), source=str(path))
    packaged = Path(str(files("dstrain.planner") / "prices.yaml"))
    return validate(PriceTable, read_yaml(packaged), source=str(packaged))


def price_of(table: PriceTable, device: Device, *, source: str) -> DevicePrice:
    """The price of a device.

    Raises:
        ConfigError: the table does not have it.
    """
    found = table.devices.get(device.name)
    if found is None:
        known = ", ".join(sorted(table.devices)) or "none"
        raise ConfigError(
            f"{source}: devices: there is no price for {device.name} (it has {known}): add the line\n"
            f"  {device.name}: {{price_per_hour: ...}}"
        )
    return found


def kilowatt_hours(table: PriceTable, price: DevicePrice, device: Device, *, device_hours: float) -> float:
    """Energy from the grid."""
    watts = (price.watts if price.watts is not None else device.power_w) + table.host_watts_per_device
    return device_hours * watts * table.power_usage_effectiveness / 1000

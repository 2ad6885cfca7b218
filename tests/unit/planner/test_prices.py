"""Price tables: the packaged one, one's own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError
from dstrain.planner.devices import find_device
from dstrain.planner.prices import kilowatt_hours, load_prices, price_of


def test_ones_own_table_wins(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\ndevices:\n  h100: {price_per_hour: 1.5, watts: 650}\n", encoding="utf-8")
    table = load_prices(path)
    price = price_of(table, find_device("h100"), source=str(path))
    assert (table.currency, price.price_per_hour, price.watts) == ("EUR", 1.5, 650)


def test_a_table_without_the_device_is_refused_with_the_line_to_add(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("devices:\n  a100: {price_per_hour: 1.5}\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"no price for h100 \(it has a100\): add the line\n  h100: \{price_per_hour:"
    ):
        price_of(load_prices(path), find_device("h100"), source=str(path))


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("devices:\n  h100: {price: 1.5}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"prices\.yaml.*price"):
        load_prices(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_prices(tmp_path / "nowhere.yaml")


def test_energy_counts_board_host_and_building(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(
        "host_watts_per_device: 300\npower_usage_effectiveness: 1.5\ndevices:\n  h100: {price_per_hour: 1.5}\n",
        encoding="utf-8",
    )
    table, device = load_prices(path), find_device("h100")
    price = price_of(table, device, source="x")
    assert kilowatt_hours(table, price, device, device_hours=10) == pytest.approx(10 * (700 + 300) * 1.5 / 1000)

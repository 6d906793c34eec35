"""Numbers on the command line: seeds of any length, counts and fractions within what arrays can hold."""

from __future__ import annotations

import click
import pytest

from mergelab.cli.main import cli
from mergelab.cli.numbers import Number, Seed, WholeNumber
from mergelab.cli.options import SIZE

FORTY = "1234567890" * 4


def refused(kind: click.ParamType, value: str) -> str:
    """What a value is refused with."""
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(value, None, None)
    assert len(caught.value.message) < 300
    return caught.value.message


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40, 2**63 - 2**32 - 1, -(2**63)])
def test_a_seed_that_fits_stays_what_it_is(seed: int) -> None:
    assert Seed().convert(str(seed), None, None) == seed


def test_a_longer_seed_is_folded_always_alike() -> None:
    folded = Seed().convert(FORTY, None, None)
    assert folded == 2970958848733818387  # what it has been from the start: it decides what is drawn
    assert 0 <= folded < 2**62
    assert folded == Seed().convert(f"+{FORTY}", None, None)
    assert folded != Seed().convert(FORTY + "1", None, None)
    assert Seed(fold=False).convert(FORTY, None, None) == int(FORTY)
    assert refused(Seed(), "9" * 5000).endswith("is not a seed; write a whole number such as 7")
    assert "is not a seed" in refused(Seed(), "1.5")
    assert "x>=0" in refused(Seed(0), "-1")


LOOSE = (click.IntRange, click.FloatRange, click.types.IntParamType, click.types.FloatParamType)


def below(group: click.Group) -> list[click.Command]:
    """Every command of a group, those of its groups too."""
    context = click.Context(group)
    found = [
        command for name in group.list_commands(context) if (command := group.get_command(context, name))
    ]
    return [
        *found,
        *(inner for command in found if isinstance(command, click.Group) for inner in below(command)),
    ]


def test_every_command_takes_its_numbers_through_one_place() -> None:
    parameters = [(command.name, parameter) for command in below(cli) for parameter in command.params]
    assert len([1 for _, parameter in parameters if parameter.name == "seed"]) >= 6
    for name, parameter in parameters:
        assert parameter.name != "seed" or isinstance(parameter.type, Seed), name
        counted = isinstance(parameter, click.Option) and parameter.count  # -v -v: how often, not a number
        if isinstance(parameter.type, LOOSE) and not counted:
            assert isinstance(parameter.type, WholeNumber | Number), (name, parameter.name)


def test_counts_and_fractions_are_bounded() -> None:
    assert WholeNumber(1).convert("2147483647", None, None) == 2147483647
    for value in ("2147483648", FORTY, "9" * 5000):
        assert "is beyond 2,147,483,647" in refused(WholeNumber(1), value)
    assert "x>=1" in refused(WholeNumber(1), "0")
    assert Number(0).convert("0.5", None, None) == 0.5
    for value in ("nan", "inf", "1e999", "9" * 5000):
        refused(Number(0), value)
    for value in ("9" * 400, "9" * 5000 + "GB", "99999999999TB"):
        refused(SIZE, value)

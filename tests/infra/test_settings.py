"""`--set step.field=value`: typed, nested, checked together, refused with the nearest right name."""

import pytest
from pydantic import BaseModel, ConfigDict, model_validator
from toy_stages import number

from ropewalk.infra.settings import with_settings
from ropewalk.infra.step import Pipeline, Step, UserError


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "a"
    size: int = 1


class Nested(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    low: int = 1
    high: int = 10
    rate: float = 0.5
    part: Part = Part()
    parts: tuple[Part, ...] = (Part(), Part(name="b"))
    shares: dict[str, float] = {"x": 1.0}
    optional: Part | None = None

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


def changed(*settings):
    return with_settings(Pipeline("p", (Step("s", number, Nested()),)), settings)["s"].config


def test_values_are_typed_by_the_field():
    assert changed("s.rate=1").rate == 1.0
    assert changed('s.part={"name": "z", "size": 3}').part == Part(name="z", size=3)


def test_nested_fields_list_entries_and_mappings_can_be_set():
    assert changed("s.part.size=7").part.size == 7
    assert changed("s.parts.1.size=7").parts == (Part(), Part(name="b", size=7))
    assert changed("s.shares.y=0.5").shares == {"x": 1.0, "y": 0.5}


def test_fields_that_depend_on_each_other_change_together_in_any_order():
    assert changed("s.low=20", "s.high=30").low == 20
    assert changed("s.high=30", "s.low=20").low == 20
    with pytest.raises(UserError, match=r"--set s\.low: s: low must be below high"):
        changed("s.low=20")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("s.lwo=1", "no field is called 'lwo'; did you mean 'low'"),
        ("s.part.sise=1", "in s.part no field is called 'sise'; did you mean 'size'"),
        ("s.parts.2.size=1", "2 entries; '2' is none of 0 to 1"),
        ("s.parts.x.size=1", "'x' is none of 0 to 1"),
        ("s.low.deep=1", "s.low has no fields; it is 1"),
        ("s.low=high", "s.low: Input should be a valid integer"),
        ("s.optional.size=1", "s.optional has no fields; it is None"),
        ("s=1", "write it as step.field=value"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, message):
    with pytest.raises(UserError) as caught:
        changed(setting)
    assert message in str(caught.value)

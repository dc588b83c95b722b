"""Settings: strict at the door, and never at a loss with what a broken file or request holds."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lib_subquad import Settings
from lib_subquad.settings import CHUNK_MAX, OPTIONS, shown

NAMES = list(OPTIONS)
NUMBERS = [name for name in NAMES if OPTIONS[name].maximum]
WORDS = [name for name in NAMES if OPTIONS[name].choices]
SWITCHES = [name for name in NAMES if isinstance(OPTIONS[name].default, bool)]
tried = 0


class Broken:
    """Whose every way to become something else fails."""

    def _fail(self, *_):
        raise RuntimeError("broken")

    __repr__ = __str__ = __float__ = __int__ = __index__ = __bool__ = __eq__ = __lt__ = __gt__ = _fail
    __hash__ = None


class BrokenText(str):
    """Text that cannot be compared."""

    def __eq__(self, other):
        raise RuntimeError("broken")

    __hash__ = str.__hash__


class BrokenNumber(int):
    def __le__(self, other):
        raise RuntimeError("broken")

    __ge__ = __lt__ = __gt__ = __eq__ = __le__
    __hash__ = int.__hash__


class Odd:
    """Becomes what it is told to."""

    def __init__(self, text, number):
        self.text, self.number = text, number

    def __repr__(self):
        return self.text

    def __float__(self):
        return self.number


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, CHUNK_MAX + 5),
    st.sampled_from((9, 400, 5000)).map(lambda digits: 10**digits),
    st.sampled_from((9, 400, 5000)).map(lambda digits: -(10**digits)),
    st.floats(),
    st.floats(-2, CHUNK_MAX + 2),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.binary(max_size=8),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from([choice for name in WORDS for choice in OPTIONS[name].choices]),
    st.sampled_from(("Automatic", " PORTABLE ", "True", "off", "1", "0", "512", "", "9" * 5000, "NaN", "\0", "\udc80")),
    st.builds(Odd, st.text(max_size=100), st.floats()),
    st.builds(lambda make: make(), st.sampled_from((Broken, BrokenText, BrokenNumber, object))),
    st.sampled_from((Broken, int, Settings, math.inf, -math.inf, Ellipsis, NotImplemented, print)),
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def test_defaults_are_legal_and_what_the_options_say():
    assert dataclasses.asdict(Settings()) == {name: option.default for name, option in OPTIONS.items()}
    for option in OPTIONS.values():
        assert option.accepts(option.default) and option.label and option.help.endswith((".", "'."))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_whole_and_in_range(name):
    option = OPTIONS[name]
    for value in (option.minimum, option.maximum, option.maximum // 2):
        assert getattr(Settings(**{name: value}), name) == value
    for value in (option.minimum - 1, option.maximum + 1, 5.0, 5.5, "5", True, None, math.nan, [5], -(10**5000)):
        refused(name, value, f"expected a whole number from {option.minimum} to {option.maximum}")


@pytest.mark.parametrize("name", WORDS)
def test_words_are_one_of_the_choices(name):
    for choice in OPTIONS[name].choices:
        assert getattr(Settings(**{name: choice}), name) == choice
    for value in (OPTIONS[name].default.upper(), "", None, 0, True, b"automatic", ["automatic"]):
        refused(name, value, f"expected one of {OPTIONS[name].choices[0]!r}")


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_true_or_false(name):
    assert not getattr(Settings(**{name: False}), name)
    for value in (0, 1, "true", None, 0.0, []):
        refused(name, value, "expected true or false")


def refused(name, value, expected):
    with pytest.raises(ValueError) as error:
        Settings(**{name: value})
    assert str(error.value).startswith(f"{name} is {shown(value)}; {expected}")


def test_a_value_that_cannot_be_shown_is_refused_too():
    with pytest.raises(ValueError, match="memory_limit is a Broken; expected a whole number from 1 to 100"):
        Settings(memory_limit=Broken())


def test_settings_are_frozen_and_can_be_a_key():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().query_chunk = 3
    assert {Settings(): 1}[Settings(query_chunk=0)] == 1


NEAREST = [
    ("query_chunk", "512", 512, True),
    ("query_chunk", " 1e3 ", 1000, True),
    ("query_chunk", 512.0, 512, False),  # as gradio and JSON give it
    ("query_chunk", 511.6, 512, True),
    ("query_chunk", -3, 0, True),
    ("query_chunk", 1e9, CHUNK_MAX, True),
    ("query_chunk", 10**5000, CHUNK_MAX, True),
    ("query_chunk", math.inf, CHUNK_MAX, True),
    ("query_chunk", -math.inf, 0, True),
    ("query_chunk", math.nan, 0, True),
    ("query_chunk", "many", 0, True),
    ("query_chunk", None, 0, True),
    ("query_chunk", [512], 0, True),
    ("query_chunk", True, 0, True),
    ("memory_limit", 0, 1, True),
    ("memory_limit", math.nan, 70, True),
    ("memory_limit", "200", 100, True),
    ("memory_limit", Broken(), 70, True),
    ("engine", "Portable", "portable", True),
    ("engine", "portable", "portable", False),
    ("engine", "quantum", "automatic", True),
    ("engine", 3, "automatic", True),
    ("upcast", "WEB ui", "web UI", True),
    ("vae", 0, False, False),  # as a hand-edited JSON file may have it
    ("vae", "off", False, True),
    ("vae", "perhaps", True, True),
    ("vae", 2, True, True),
    ("retry", None, True, True),
    ("retry", math.nan, True, True),
]


@pytest.mark.parametrize("name, value, legal, said", NEAREST, ids=[f"{n}={shown(v)}" for n, v, *_ in NEAREST])
def test_nearest_legal_value_and_its_words(name, value, legal, said):
    settings, messages = Settings.nearest({name: value, "other": 1})
    assert settings == Settings(**{name: legal}) and type(getattr(settings, name)) is type(legal)
    words = f"{name} is {shown(value)}, expected {OPTIONS[name].expected}; using {legal!r}"
    assert messages == ([words] if said else [])


@given(anything)
@effort(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nearest_never_fails_and_is_always_legal(value):
    """The same value for every option at once."""
    global tried
    settings, messages = Settings.nearest(dict.fromkeys((*NAMES, "other"), value))
    said = {message.partition(" is ")[0]: message for message in messages}
    assert len(said) == len(messages) and not set(said) - set(NAMES)
    for name, option in OPTIONS.items():
        tried += 1
        kept = getattr(settings, name)
        assert option.accepts(kept) and type(kept) is type(option.default)
        assert (name in said) != unchanged(value, kept)
        assert name not in said or said[name].endswith(f"using {kept!r}")


def test_nearest_leaves_what_is_not_given():
    assert Settings.nearest({}) == (Settings(), [])
    assert Settings.nearest({"kv_chunk": 9, "Kv_chunk": 3, "": None}) == (Settings(kv_chunk=9), [])


def unchanged(value, kept) -> bool:
    """The same value, be it as another type of number."""
    if type(value) is type(kept):
        return value == kept
    return type(value) in (int, float, bool) and type(kept) in (int, bool) and value == kept and type(value) is not bool


def test_how_many_inputs_were_tried(capsys):
    if not tried:
        pytest.skip("the test that tries them did not run")
    with capsys.disabled():
        print(f" [{tried} values given to Settings.nearest] ", end="")
    assert tried >= 2000

"""The settings behave as the web UI's do."""

import pytest


@pytest.fixture
def options(host):
    from modules.options import OptionHTML, OptionInfo, Options, options_section

    return Options(
        options_section(
            ("sec", "Section"),
            {
                "number": OptionInfo(3, "Number", component_args={"minimum": 0}).info("help"),
                "hidden": OptionInfo("x", component_args={"visible": False}),
                "text": OptionHTML("a paragraph"),
            },
        )
    )


@pytest.fixture
def flags(options, monkeypatch):
    from modules.shared_cmd_options import cmd_opts

    return lambda name, value: monkeypatch.setattr(cmd_opts, name, value)


def test_values_are_attributes(options):
    assert options.number == 3
    options.number = 5
    assert (options.number, options.data["number"], options.get_default("number")) == (5, 5, 3)
    with pytest.raises(AttributeError):
        _ = options.unknown
    options.unknown = 1  # no setting: an ordinary attribute, as in the web UI
    assert "unknown" not in options.data


def test_set_tells_whether_it_changed_and_calls_onchange(options):
    calls = []
    options.onchange("number", lambda: calls.append(options.number), call=False)
    assert options.set("number", 4)
    assert not options.set("number", 4)
    assert options.set("number", 5, run_callbacks=False)
    assert calls == [4]


def test_a_failing_onchange_takes_the_change_back(options):
    options.onchange("number", lambda: 1 / 0, call=False)
    assert not options.set("number", 4)
    assert options.number == 3


def test_a_paragraph_has_no_value(options):
    assert not options.set("text", "other")
    assert "text" not in options.data


def test_restricted_settings_stay(options):
    assert not options.set("hidden", "y")
    assert options.hidden == "x"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("freeze_settings", True), ("freeze_settings_in_sections", "other, sec"), ("freeze_specific_settings", "number")],
)
def test_frozen_settings_raise(options, flags, flag, value):
    flags(flag, value)
    with pytest.raises(AssertionError):
        options.set("number", 4)
    assert options.number == 3


def test_casts_and_types(options):
    assert options.cast_value("number", "512") == 512
    with pytest.raises(ValueError):
        options.cast_value("number", "512.0")
    assert options.same_type(3, 4.0) and options.same_type(None, "x") and not options.same_type(3, "3")
    assert not options.same_type(True, 1)


def test_saved_values_win_over_defaults_and_wrong_types_are_told(options, tmp_path, capsys):
    from modules.options import OptionInfo

    (tmp_path / "config.json").write_text('{"number": "text", "later": 7}', encoding="utf8")
    options.load(str(tmp_path / "config.json"))
    assert "bad setting value: number" in capsys.readouterr().err
    options.add_option("later", OptionInfo(1))
    assert (options.number, options.later) == ("text", 7)
    options.save(str(tmp_path / "saved.json"))
    options.load(str(tmp_path / "saved.json"))
    assert options.later == 7
    options.load(str(tmp_path / "missing.json"))
    assert options.later == 1

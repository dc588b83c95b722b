"""The settings as the host keeps them: registered, broken, frozen, overridden, given by flags."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_subquad.engines import order
from lib_subquad.settings import OPTIONS, Settings

BROKEN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.sampled_from([10**9, -(10**5000), "512", "nan", "TRUE", " Fused ", "1e3", 0.0, "web ui"]),
    st.builds(object),
)


@pytest.fixture
def generate(subquad):
    """Passes a request to the host; its "image" is the settings in force."""
    from modules import processing, scripts

    class Request(processing.StableDiffusionProcessingTxt2Img):
        def sample(self):
            return subquad.options.current()

    def generate(**request):
        return processing.process_images(Request(scripts=scripts.scripts_txt2img, **request)).images[0]

    return generate


def test_every_setting_is_an_option_in_one_section(subquad):
    from modules import shared

    for name, option in OPTIONS.items():
        info = shared.opts.data_labels[f"subquad_{name}"]
        assert info.section == ("subquad", "Sub-quadratic attention")
        assert info.default == option.default and type(info.default) is type(option.default)
        assert info.label == option.label and option.help in info.comment_after
        assert info.infotext == subquad.options.INFOTEXT[name]
    assert sum(key.startswith("subquad_") for key in shared.opts.data_labels) == len(OPTIONS)
    assert subquad.options.current() == Settings(upcast="never")


def test_nowebui_never_asks_for_settings(host, monkeypatch):
    from modules import script_callbacks, shared

    monkeypatch.setattr(script_callbacks, "ui_settings_callback", lambda: None)
    host.load_extension()
    assert shared.opts.subquad_query_chunk == 0
    assert shared.opts.set("subquad_query_chunk", 512)


@settings(max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(list(OPTIONS)), BROKEN, min_size=1))
def test_no_value_fails_a_generation(subquad, values):
    """Read while it is broken, then put right in the store; a word that is not known here stays there."""
    from modules import shared

    given = {name: values.get(name, option.default) for name, option in OPTIONS.items()}
    for name, value in given.items():
        shared.opts.data[f"subquad_{name}"] = value
    current = subquad.options.current()
    for name, option in OPTIONS.items():
        assert option.accepts(getattr(current, name))
    told = subquad.options.changed_from_default()
    assert told.keys() <= set(subquad.options.INFOTEXT.values()) and None not in told.values()
    subquad.options.put_right()
    kept = subquad.options.kept()
    for name, option in OPTIONS.items():
        stored = shared.opts.data[f"subquad_{name}"]
        assert option.accepts(stored) or option.choices and kept[name] is stored is given[name]
    stored = {key: shared.opts.data[key] for key in map(subquad.options.key, OPTIONS)}
    assert (
        json.loads(json.dumps(stored, allow_nan=False, ensure_ascii=False).encode("utf-8")) == stored
    )  # as it is saved
    assert subquad.options.current() == current


def test_a_broken_value_is_told_once_with_its_name_and_the_value_used(subquad, capsys):
    subquad.opts.data["subquad_query_chunk"] = 10**9
    for _ in range(3):
        subquad.options.current()
        subquad.options.put_right()
    subquad.opts.data["subquad_query_chunk"] = "many"
    subquad.options.current()
    subquad.opts.data["subquad_query_chunk"] = 10**9
    subquad.options.current()
    told = [line for line in capsys.readouterr().out.splitlines() if "[subquad]" in line]
    assert told == [
        "[subquad] setting subquad_query_chunk is 1000000000, expected a whole number from 0 to 16384; using 16384",
        "[subquad] setting subquad_query_chunk is 'many', expected a whole number from 0 to 16384; using 0",
    ]


def test_whole_numbers_that_came_as_fractions_are_not_worth_a_word(subquad, capsys):
    subquad.opts.data["subquad_query_chunk"] = 512.0
    assert subquad.options.current().query_chunk == 512
    assert capsys.readouterr().out == ""


def test_a_hand_edited_config_is_put_right_when_the_scripts_load(host, tmp_path):
    from modules import shared

    broken = {"subquad_query_chunk": "text", "subquad_engine": None, "subquad_vae": "no", "subquad_memory_limit": -3}
    (tmp_path / "config.json").write_text(json.dumps(broken), encoding="utf8")
    shared.opts.load(str(tmp_path / "config.json"))
    host.load_extension()
    stored = {key: shared.opts.data[key] for key in broken}
    assert stored == {
        "subquad_query_chunk": 0,
        "subquad_engine": "automatic",
        "subquad_vae": False,
        "subquad_memory_limit": 1,
    }
    assert [type(value) for value in stored.values()] == [int, str, bool, int]


WORDS = {"subquad_engine": "hyperformers", "subquad_checkpointing": "自動", "subquad_upcast": "queries"}


@pytest.fixture
def words_of_another_version(host, tmp_path, capsys):
    """The extension, loaded on a config file with words that it does not know; returns where the file is."""
    from modules import shared

    config = tmp_path / "config.json"
    config.write_text(json.dumps({**WORDS, "subquad_kv_chunk": 512}), encoding="utf8")
    shared.opts.load(str(config))
    host.load_extension()
    return config


def test_words_that_are_not_known_here_are_kept_as_saved(words_of_another_version):
    """Also when other settings are changed and saved, as "Apply settings" does it: all at once, through the page."""
    from modules import shared

    from lib_subquad.webui import options

    assert options.current() == Settings(kv_chunk=512, upcast="never")
    shown = {}
    for name in map(options.key, OPTIONS):
        info = shared.opts.data_labels[name]
        arguments = info.component_args() if callable(info.component_args) else info.component_args
        widget = info.component(label=info.label, value=shared.opts.data[name], **arguments)
        shown[name] = widget.preprocess(widget.postprocess(widget.value))
        choices = [choice for _, choice in getattr(widget, "choices", [])]
        assert not choices or shown[name] in choices  # the page has a button for it
    for name, value in {**shown, "subquad_kv_chunk": 256}.items():
        assert shared.opts.same_type(value, shared.opts.data_labels[name].default)
        shared.opts.set(name, value)
    shared.opts.save(str(words_of_another_version))
    saved = json.loads(words_of_another_version.read_text(encoding="utf8"))
    assert WORDS.items() <= saved.items() and saved["subquad_kv_chunk"] == 256


def test_an_engine_that_comes_later_is_known_then(subquad):
    from types import SimpleNamespace

    from modules import shared

    shared.opts.data["subquad_engine"] = "late"
    assert subquad.options.current().engine == "automatic"
    order.register(SimpleNamespace(**{**vars(order.engines()[-1]), "NAME": "late", "EXACT": False}))
    try:
        assert subquad.options.current().engine == "late"
    finally:
        order.withdraw("late")
    assert subquad.options.current().engine == "automatic"


def test_they_are_told_once_on_the_console_and_on_the_page(words_of_another_version, capsys):
    from lib_subquad.webui import laboratory, options

    for _ in range(3):
        options.current()
        options.put_right()
    told = [line for line in capsys.readouterr().out.splitlines() if "hyperformers" in line]
    assert told == [
        f"[subquad] setting subquad_engine is 'hyperformers', expected {OPTIONS['engine'].expected}; "
        "using 'automatic' meanwhile, and keeping what was saved"
    ]
    status = laboratory.LABORATORY.status()
    assert "Engine is set to &#x27;hyperformers&#x27;, which is not known here. Meanwhile it is automatic" in status
    assert "自動" in status and "queries" in status


def test_and_can_be_changed_away_from(words_of_another_version):
    from modules import shared

    from lib_subquad.webui import laboratory, options

    def choices():
        return shared.opts.data_labels["subquad_engine"].component_args()["choices"]

    assert choices() == ["automatic", *order.names(), "hyperformers"]
    assert shared.opts.set("subquad_engine", "portable")
    assert options.current().engine == "portable"
    assert choices() == ["automatic", *order.names()]
    assert "hyperformers" not in laboratory.LABORATORY.status()


@pytest.mark.parametrize("broken", ["", " ", "\ud800", "two\nlines", 5, None, ["fused"]])
def test_what_is_no_word_is_put_right(subquad, tmp_path, broken):
    """Half a character would break the file that it is saved to."""
    subquad.opts.data["subquad_engine"] = broken
    subquad.options.put_right()
    assert subquad.opts.data["subquad_engine"] == "automatic" and not subquad.options.kept()
    subquad.opts.save(str(tmp_path / "config.json"))


def test_a_known_word_is_put_right_however_it_is_spelled(subquad):
    subquad.opts.set("subquad_engine", " Portable ")
    assert subquad.opts.data["subquad_engine"] == "portable"


def test_it_starts_on_a_console_that_cannot_show_the_value(host, monkeypatch):
    from modules import sd_hijack, shared

    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", console)
    shared.opts.data.update(subquad_engine="自動", subquad_query_chunk="自動")
    host.load_extension()
    assert "subquad - fast attention within a memory limit" in [entry.title() for entry in sd_hijack.optimizers]
    from lib_subquad.webui import options

    shared.opts.data["subquad_vae"] = "自動"  # as one request's override sets it
    assert options.current() == Settings(upcast="never")
    told = console.buffer.getvalue().decode("cp1252").splitlines()
    assert [line.split()[2] for line in told] == ["subquad_query_chunk", "subquad_engine", "subquad_vae"]
    assert all("'\\u81ea\\u52d5'" in line for line in told)


def test_setting_one_puts_it_right_at_once(subquad):
    assert subquad.opts.set("subquad_query_chunk", "a lot")
    assert subquad.opts.data["subquad_query_chunk"] == 0
    assert subquad.opts.set("subquad_query_chunk", 99999)
    assert subquad.opts.data["subquad_query_chunk"] == 16384


@pytest.mark.parametrize(
    ("arguments", "query_chunk", "kv_chunk"),
    [
        ([], 0, 0),
        (["--sub-quad-q-chunk-size", "512"], 512, 0),
        (["--sub-quad-q-chunk-size=512", "--sub-quad-kv-chunk-size=256"], 512, 256),
        (["--sub-quad-kv-chunk-size", "256"], 0, 256),
        (["--sub-quad-q-chunk-size", "1024"], 1024, 0),  # the host's own default, but asked for
        (["--sub-quad-q-chunk-size=99999999"], 16384, 0),
        (["--sub-quad-q-chunk-size=-5"], 0, 0),
    ],
)
def test_the_hosts_flags_are_our_defaults(host, monkeypatch, arguments, query_chunk, kv_chunk):
    from modules import cmd_args, shared

    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    for name, value in vars(cmd_args.parser.parse_args(arguments)).items():
        monkeypatch.setattr(shared.cmd_opts, name, value)
    host.load_extension()
    assert (shared.opts.subquad_query_chunk, shared.opts.subquad_kv_chunk) == (query_chunk, kv_chunk)
    assert shared.opts.get_default("subquad_query_chunk") == query_chunk


def test_a_saved_value_wins_over_a_flag(host, monkeypatch):
    from modules import shared

    monkeypatch.setattr(sys, "argv", ["launch.py", "--sub-quad-q-chunk-size=512"])
    monkeypatch.setattr(shared.cmd_opts, "sub_quad_q_chunk_size", 512)
    shared.opts.data["subquad_query_chunk"] = 2048
    host.load_extension()
    assert shared.opts.subquad_query_chunk == 2048


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("freeze_settings", True),
        ("freeze_settings_in_sections", "subquad"),
        ("freeze_specific_settings", "subquad_query_chunk"),
    ],
)
def test_frozen_settings_are_read_and_put_right_all_the_same(host, monkeypatch, flag, value):
    from modules import shared

    monkeypatch.setattr(shared.cmd_opts, flag, value)
    shared.opts.data["subquad_query_chunk"] = "broken"
    shared.opts.data["subquad_kv_chunk"] = 256
    host.load_extension()
    from lib_subquad.webui import options

    assert options.current() == Settings(kv_chunk=256, upcast="never")
    assert shared.opts.data["subquad_query_chunk"] == 0
    with pytest.raises(AssertionError):
        shared.opts.set("subquad_query_chunk", 512)


@pytest.mark.parametrize("ours", ["web UI", "always", "never"])
@pytest.mark.parametrize("hosts", [True, False])
def test_upcast_follows_the_host_unless_told_otherwise(subquad, ours, hosts):
    subquad.opts.data.update(subquad_upcast=ours, upcast_attn=hosts)
    assert subquad.options.current().upcast == {"web UI": "always" if hosts else "never"}.get(ours, ours)


def test_an_override_holds_for_one_request(subquad, generate):
    subquad.opts.set("subquad_kv_chunk", 128)
    seen = generate(override_settings={"subquad_query_chunk": 512, "subquad_engine": "portable"})
    assert (seen.query_chunk, seen.kv_chunk, seen.engine) == (512, 128, "portable")
    assert generate() == Settings(kv_chunk=128, upcast="never")


def test_an_override_that_is_not_known_here_leaves_the_setting_as_saved(subquad, generate):
    """As an image's infotext from another version brings it."""
    subquad.opts.set("subquad_engine", "portable")
    assert generate(override_settings={"subquad_engine": "hyperformers"}).engine == "automatic"
    assert subquad.opts.data["subquad_engine"] == "portable"
    subquad.opts.set("subquad_engine", "hyperformers")
    assert generate(override_settings={"subquad_engine": "portable"}).engine == "portable"
    assert subquad.opts.data["subquad_engine"] == "hyperformers"


@pytest.mark.parametrize("value", ["text", -1, None, float("nan"), 10**9, [1]])
def test_a_broken_override_fails_nothing(generate, value):
    """The host sets it without calling onchange: only the reading puts it right."""
    assert OPTIONS["query_chunk"].accepts(generate(override_settings={"subquad_query_chunk": value}).query_chunk)
    assert generate() == Settings(upcast="never")


@pytest.mark.parametrize("value", [["everything"], {"a": 1}, None, 5, "quantum"])
def test_a_broken_switch_is_off(subquad, value):
    subquad.options.register(switch=True)
    subquad.opts.data["subquad_use"] = value
    assert subquad.options.use() == ()

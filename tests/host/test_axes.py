"""Axes of the X/Y/Z plot script, as it would call them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib_subquad.engines import order


@pytest.fixture
def plot(subquad):
    """A loaded script with the X/Y/Z plot's names, with our axes by their labels."""
    from modules import scripts

    from lib_subquad.webui import axes

    class AxisOption:
        def __init__(self, label, type, apply, confirm=None, choices=None):
            self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices

    class Script:
        pass

    Script.__module__ = "xyz_grid.py"
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    scripts.scripts_data.append(scripts.ScriptClassData(Script, "xyz_grid.py", "", module))
    for _ in range(2):  # Reload UI
        axes.register()
    yield {axis.label: axis for axis in module.axis_options}, module
    scripts.scripts_data.pop()


def test_each_axis_once(plot):
    axes, module = plot
    assert len(module.axis_options) == len(axes) == 1 + 5
    names = ("Query chunk", "KV chunk", "Engine", "Memory limit", "VAE in bands")
    assert {f"[Subquad] {name}" for name in names} < set(axes)


@pytest.mark.parametrize(
    ("label", "value", "key"),
    [
        ("Query chunk", 128, "subquad_query_chunk"),
        ("KV chunk", 0, "subquad_kv_chunk"),
        ("Engine", "portable", "subquad_engine"),
        ("Memory limit", 30, "subquad_memory_limit"),
        ("VAE in bands", "always", "subquad_vae_bands"),
    ],
)
def test_a_value_goes_into_the_requests_overrides(plot, label, value, key):
    axis = plot[0][f"[Subquad] {label}"]
    p = SimpleNamespace(override_settings={})
    axis.confirm(p, [axis.type(str(value))])
    axis.apply(p, axis.type(str(value)), [])
    assert p.override_settings == {key: value}


@pytest.mark.parametrize(
    ("label", "value"),
    [("Query chunk", -1), ("Engine", "quantum"), ("Memory limit", 0), ("VAE in bands", "often")],
)
def test_a_value_out_of_range_is_refused_in_words(plot, label, value):
    with pytest.raises(RuntimeError, match=label):
        plot[0][f"[Subquad] {label}"].confirm(None, [value])


def test_the_engines_to_choose_from(plot):
    assert plot[0]["[Subquad] Engine"].choices() == ["automatic", *order.names()]


def test_without_the_plot_script(subquad):
    from lib_subquad.webui import axes

    axes.register()

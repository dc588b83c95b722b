"""Wrong input becomes one clear sentence."""

import pytest

from demo.inputs import check_output, check_steps, parse_setting, parse_size
from lib_subquad.console import UserError


@pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), ("512x384", (512, 384)), ("64X128", (64, 128))])
def test_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "big", "100", "0", "-64", "64x64x64", "4096", "256x100", "1e3"])
def test_bad_size(text):
    with pytest.raises(UserError, match="size is|Width is|Height is"):
        parse_size(text)


@pytest.mark.parametrize("steps", [0, -1, 151])
def test_bad_steps(steps):
    with pytest.raises(UserError, match=f"steps is {steps}"):
        check_steps(steps)


def test_output_must_be_a_png_in_a_folder_that_exists(tmp_path):
    assert check_output(str(tmp_path / "a.png")) == tmp_path / "a.png"
    with pytest.raises(UserError, match=r"\.png"):
        check_output(str(tmp_path / "a.jpg"))
    with pytest.raises(UserError, match="no folder"):
        check_output(str(tmp_path / "none" / "a.png"))
    with pytest.raises(UserError, match="cannot be written"):
        check_output(str(tmp_path / ("x" * 300 + ".png")))


def test_setting_takes_the_type_of_its_default(host):
    from modules.options import OptionInfo, Options

    opts = Options({"n": OptionInfo(0), "b": OptionInfo(True), "s": OptionInfo("x")})
    assert parse_setting("n=64", opts) == ("n", 64)
    assert parse_setting("b=false", opts) == ("b", False)
    assert parse_setting("s=a=b", opts) == ("s", "a=b")
    for text in ("n=many", "b=perhaps", "unknown=1", "n"):
        with pytest.raises(UserError, match="setting"):
            parse_setting(text, opts)

"""A whole generation through the host."""

import numpy as np
import pytest

SCRIPT = """
from modules import scripts, shared
class Notes(scripts.Script):
    def show(self, is_img2img): return scripts.AlwaysVisible
    def before_process(self, p): self.before = shared.opts.upcast_attn
    def process(self, p): p.extra_generation_params["Upcast"] = f"{self.before}, {shared.opts.upcast_attn}"
"""


@pytest.fixture
def running(extension, host):
    extension(SCRIPT)
    host.start()
    return host


def test_optimizers_make_the_same_image_and_a_prompt_another(running):
    from demo.generate import generate

    steps, images = [], []
    for name in ("None", "sdp"):
        running.use_optimizer(running.title_of(name))
        made = generate("a", width=64, height=128, steps=2, progress=lambda *done: steps.append(done))
        images.append(np.asarray(made.image, dtype=int))
        assert made.optimizer.split()[0] == name and made.seconds > 0
    assert steps == [(1, 2), (2, 2)] * 2
    assert images[0].shape == (128, 64, 3)
    assert np.abs(images[0] - images[1]).max() <= 2
    other = np.asarray(generate("b", width=64, height=128, steps=2).image, dtype=int)
    assert np.abs(other - images[1]).max() > 20


def test_overrides_hold_from_process_on_and_for_one_image(running):
    from modules import shared

    from demo.generate import generate

    made = generate("a, b", width=64, height=64, steps=1, override_settings={"upcast_attn": True})
    assert made.infotext == (
        'a, b\nSteps: 1, Sampler: DDIM, CFG scale: 7.0, Seed: 1, Size: 64x64, Upcast: "False, True"'
    )
    assert shared.opts.upcast_attn is False


def test_bad_requests_are_refused_in_words(running):
    from demo.generate import generate
    from lib_subquad.console import UserError

    with pytest.raises(UserError, match="Height is 65; it must be a multiple of 64 from 64 to 2048"):
        generate("a", width=64, height=65)
    with pytest.raises(UserError, match="steps is 0"):
        generate("a", steps=0)

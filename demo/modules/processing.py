"""One request: what it asks for, the scripts around it, and the text that goes into its image."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from modules import images, shared  # noqa: F401 - the web UI has loaded both with this
from modules.scripts import ScriptRunner
from PIL import Image


@dataclass
class StableDiffusionProcessing:
    """A request for one image. A subclass says in `sample` how the image is made."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    width: int = 256
    height: int = 256
    batch_size: int = 1
    steps: int = 8
    cfg_scale: float = 7.0
    sampler_name: str = "DDIM"
    override_settings: dict = field(default_factory=dict)
    override_settings_restore_afterwards: bool = True
    extra_generation_params: dict = field(default_factory=dict)
    scripts: ScriptRunner | None = None

    @property
    def sd_model(self):
        return shared.sd_model

    def sample(self) -> Image.Image:
        raise NotImplementedError


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """From a prompt alone."""


@dataclass
class Processed:
    """What came of a request."""

    images: list[Image.Image]
    infotexts: list[str]


def create_infotext(p: StableDiffusionProcessing) -> str:
    """The request in the web UI's notation."""
    params = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "CFG scale": p.cfg_scale,
        "Seed": p.seed,
        "Size": f"{p.width}x{p.height}",
        **p.extra_generation_params,
    }
    line = ", ".join(f"{key}: {_quote(value)}" for key, value in params.items() if value is not None)
    negative = f"\nNegative prompt: {p.negative_prompt}" if p.negative_prompt else ""
    return f"{p.prompt}{negative}\n{line}"


def _quote(value) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text


class DecodedSamples(list):
    """Pictures [3, height, width], from -1 to 1."""

    already_decoded = True


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False) -> DecodedSamples:
    """The pictures of what was sampled."""
    return DecodedSamples((model.decode(batch) * 2 - 1).to(target_device))


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Make the image of `p`; its `override_settings` hold meanwhile."""
    if p.scripts is not None:
        p.scripts.before_process(p)
    stored = {key: shared.opts.data[key] for key in p.override_settings if key in shared.opts.data}
    try:
        for key, value in p.override_settings.items():
            shared.opts.set(key, value, is_api=True, run_callbacks=False)
        if p.scripts is not None:
            p.scripts.process(p)
            p.scripts.process_batch(p)
        image = p.sample()
        if p.scripts is not None:
            p.scripts.postprocess_batch(p)
        processed = Processed([image], [create_infotext(p)])
        if p.scripts is not None:
            p.scripts.postprocess(p, processed)
        return processed
    finally:
        if p.override_settings_restore_afterwards:
            for key, value in stored.items():
                setattr(shared.opts, key, value)

"""From a prompt to an image, with what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from modules import devices, processing, scripts, shared
from modules.call_queue import queue_lock
from PIL import Image

from demo.host import optimizer_in_force
from demo.inputs import check_size, check_steps
from demo.sampler import sample
from lib_subquad.lab import tables
from lib_subquad.lab.meter import PeakMemory, give_back_freed_memory

SEED_MAX = 2**32 - 1


@dataclass(frozen=True)
class MadeImage:
    """An image and what it took. `peak_bytes` is memory on top of the loaded model, None where nothing tells it."""

    image: Image.Image
    infotext: str
    optimizer: str
    seconds: float
    peak_bytes: int | None

    @property
    def cost(self) -> str:
        return f"{self.seconds:.2f} s, {tables.memory(self.peak_bytes)}"


@dataclass
class Txt2Img(processing.StableDiffusionProcessingTxt2Img):
    """A request that this demo's sampler fulfils; `on_step(done, steps)` is told how far it has come."""

    on_step: Callable[[int, int], None] | None = None
    started: float = 0.0

    def sample(self) -> Image.Image:
        self.started = time.perf_counter()  # what scripts do before is no part of the image
        model, state = self.sd_model, shared.state
        state.job, state.sampling_step, state.sampling_steps = "txt2img", 0, self.steps

        def stepped(done: int) -> None:
            state.sampling_step = done
            if self.on_step:
                self.on_step(done, self.steps)

        # on the CPU, so that a seed means the same image on every device
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, 4, self.height // 8, self.width // 8, generator=generator).to(model.device)
        with torch.inference_mode(), devices.autocast():
            latent = sample(
                model,
                noise,
                model.encode_prompt(self.prompt),
                model.encode_prompt(self.negative_prompt),
                self.steps,
                self.cfg_scale,
                stepped,
            )
            pixels = processing.decode_latent_batch(model, latent)[0] / 2 + 0.5
        return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def generate(
    prompt: str,
    seed: int = 1,
    width: int = 256,
    height: int = 256,
    steps: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **request,
) -> MadeImage:
    """Make one image with the optimizer in force. `request` goes to the processing object, e.g. `override_settings`.

    Raises:
        UserError: a size or a number of steps that the model cannot take.
    """
    check_size(width, height)
    check_steps(steps)
    p = Txt2Img(
        prompt=prompt,
        seed=seed % (SEED_MAX + 1),
        width=width,
        height=height,
        steps=steps,
        scripts=scripts.scripts_txt2img,
        on_step=progress,
        **request,
    )
    with queue_lock:
        devices.torch_gc()
        give_back_freed_memory()
        with PeakMemory(devices.device, sampled=True) as peak:
            processed = processing.process_images(p)
            seconds = time.perf_counter() - p.started
        optimizer = optimizer_in_force()
    return MadeImage(processed.images[0], processed.infotexts[0], optimizer, seconds, peak.bytes)

"""The web UI's own classes of models beyond U-Nets, built small from random weights and run within a generation.

They have few blocks and heads, of the true widths. Of a model that several web UIs have, each has a class of its own.
"""

import importlib
import importlib.util
import inspect
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
from modules import script_callbacks, scripts, shared

LOADED_AT_START = set(sys.modules)
BATCH, TEXT, CONTEXT, POOLED = 2, 21, 48, 32
TIMES = ("t", "timestep", "timesteps")
# Where a generation of tests leaves what is to be run, and what came of it; outlives "Reload UI".
KEPT = sys.modules.setdefault("subquad_probe_models", types.ModuleType("subquad_probe_models"))
shared.opts.data.setdefault("use_dynamicPE", False)  # one that has it forgets it where there is no page
KEPT.waiting = KEPT.asked = KEPT.error = None
KEPT.results = []

FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": CONTEXT, "hidden_size": 256,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
FLUX_AS_IT_IS = {"hidden_size": 24 * 128, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}
CHROMA = {
    **FLUX, "guidance_out_dim": 256, "guidance_hidden_dim": 64, "guidance_n_layers": 2, "in_dim": 64, "out_dim": 256,
    "hidden_dim": 64, "n_layers": 2,
}  # fmt: skip
SD3 = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 3, "adm_in_channels": POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 3 * 64}
    },
    "pos_embed_scaling_factor": None, "pos_embed_max_size": 16, "num_patches": 256,
}  # fmt: skip
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 256, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": CONTEXT,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 32,
}  # fmt: skip
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": 192, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1,
    "multiple_of": 32, "qk_norm": True, "cap_feat_dim": CONTEXT, "axes_dims": (32, 32, 32), "axes_lens": (64, 64, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`places`: "module:class" of the web UIs that have it. `latent`: channels and sizes; `inputs` besides."""

    places: tuple[str, ...]
    config: dict
    latent: tuple[int, ...] = (16, 7, 9)
    inputs: dict = field(default_factory=dict)


MASK = {"attention_mask": lambda: (torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 8]])).long()}
MASK_OF_ALL = {"attention_mask": lambda: MASK["attention_mask"]()[1:]}  # of two images it takes no other
KINDS = {
    "flux": Kind(
        ("backend.nn.flux:IntegratedFluxTransformer2DModel", "ldm_patched.ldm.flux.model:Flux"), FLUX,
    ),
    "flux2": Kind(
        ("backend.nn.flux2:IntegratedFlux2Transformer2DModel",),
        {**FLUX, "patch_size": 1, "axes_dim": [32, 32, 32, 32], "txt_ids_dims": [3], "global_modulation": True,
         "mlp_silu_act": True, "ops_bias": False},
    ),
    "chroma": Kind(
        ("backend.nn.chroma:IntegratedChromaTransformer2DModel",), CHROMA,
    ),
    "chroma by patches": Kind(
        ("ldm_patched.ldm.chroma.model:Chroma",), {**CHROMA, "in_channels": 16 * 4, "out_channels": 16 * 4},
    ),
    "sd3": Kind(
        ("backend.nn.mmditx:MMDiTX", "ldm_patched.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper"),
        SD3, (16, 6, 10),
    ),
    "sd3.5": Kind(
        ("backend.nn.mmditx:MMDiTX", "ldm_patched.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper"),
        {**SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1]}, (16, 6, 10),
    ),
    "aura": Kind(
        ("ldm_patched.ldm.aura.mmdit:MMDiT",),
        {"dim": 512, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": 512, "cond_seq_dim": CONTEXT,
         "max_seq": 1024},
        (4, 6, 10),
    ),
    "cosmos": Kind(
        ("ldm_patched.ldm.cosmos.model:GeneralDIT",),
        {**COSMOS, "block_x_format": "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
         "extra_per_block_abs_pos_emb_type": "learnable"},
        (16, 1, 6, 10), MASK,
    ),
    "cosmos predict2": Kind(("ldm_patched.ldm.cosmos.predict2:MiniTrainDIT",), COSMOS, (16, 1, 6, 10)),
    "anima": Kind(("backend.nn.cosmos_predict2:MiniTrainDIT",), COSMOS, (16, 6, 10)),
    "wan": Kind(
        ("ldm_patched.ldm.wan.model:WanModel",),
        {"dim": 256, "ffn_dim": 512, "text_dim": CONTEXT, "num_heads": 2, "num_layers": 2}, (16, 2, 6, 10),
    ),
    "wan of one frame": Kind(
        ("backend.nn.wan:WanModel",),
        {"dim": 256, "ffn_dim": 512, "text_dim": CONTEXT, "num_heads": 2, "num_layers": 2}, (16, 7, 9),
    ),
    "hunyuan video": Kind(
        ("ldm_patched.ldm.hunyuan_video.model:HunyuanVideo",),
        {**FLUX, "patch_size": [1, 2, 2], "theta": 256}, (16, 2, 6, 10), MASK_OF_ALL,
    ),
    "lumina": Kind(
        ("ldm_patched.ldm.lumina.model:NextDiT", "backend.nn.lumina2:Lumina2DiT"), LUMINA, (16, 7, 9),
        {"num_tokens": lambda: TEXT},
    ),
    "omnigen": Kind(
        ("ldm_patched.ldm.omnigen.omnigen2:OmniGen2Transformer2DModel",),
        {"hidden_size": 192, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
         "multiple_of": 32, "text_feat_dim": CONTEXT, "axes_lens": (64, 64, 64)},
        (16, 6, 10), {"num_tokens": lambda: TEXT},
    ),
    "ltx video": Kind(
        ("ldm_patched.ldm.lightricks.model:LTXVModel",),
        {"in_channels": 16, "cross_attention_dim": 256, "attention_head_dim": 64, "num_attention_heads": 4,
         "caption_channels": CONTEXT, "num_layers": 2},
        (16, 2, 6, 10), MASK,
    ),
    "krea2": Kind(
        ("backend.nn.krea2:SingleStreamDiT",),
        {"features": 256, "txtdim": CONTEXT, "heads": 2, "kvheads": 1, "layers": 2, "txtlayers": 3, "txtheads": 2,
         "txtkvheads": 1},
        (16, 7, 9), {"context": lambda: torch.randn(BATCH, TEXT, 3, CONTEXT)},
    ),
    "vae": Kind(
        ("backend.nn.vae:IntegratedAutoencoderKL",),
        {"block_out_channels": (64, 128), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 16,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "use_quant_conv": False, "use_post_quant_conv": False},
        (16, 9, 11),
    ),
    "vae by a config": Kind(
        ("ldm_patched.ldm.models.autoencoder:AutoencoderKL",),
        {"embed_dim": 16, "ddconfig": {
            "ch": 64, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "out_ch": 3,
            "resolution": 32, "z_channels": 16, "double_z": True,
        }},
        (16, 9, 11),
    ),
    "wan vae": Kind(("backend.nn.vae_wan:AutoencoderQwen2D",), {"base_dim": 32, "dim_mult": (1, 2)}, (16, 9, 11)),
}  # fmt: skip


class Run:
    """A model and what it is given, the same every time."""

    def __init__(self, kind: Kind, place: str, dtype: torch.dtype):
        name, _, cls = place.partition(":")
        self.module = importlib.import_module(name)
        self.dtype = dtype
        torch.manual_seed(0)
        self.model = _make(self.module, getattr(self.module, cls), kind.config, dtype)
        self.compute = getattr(self.model, "decode", self.model)
        entrance = inspect.signature(getattr(self.model, "decode", self.model.forward)).parameters
        latent = torch.randn(BATCH, *kind.latent).to(dtype)
        known = {
            **dict.fromkeys(TIMES, torch.tensor([0.7] * BATCH)),
            "context": torch.randn(BATCH, TEXT, CONTEXT).to(dtype),
            "y": torch.randn(BATCH, POOLED).to(dtype),
            "guidance": torch.full((BATCH,), 3.5),
            "transformer_options": {},
            **{name: _in(dtype, make()) for name, make in kind.inputs.items()},
        }
        self.inputs = (latent, {name: value for name, value in known.items() if name in entrance})

    def __call__(self) -> torch.Tensor:
        latent, more = self.inputs
        copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
        with torch.inference_mode():
            return self.compute(latent.clone(), **copies)


def _make(module, cls, config: dict, dtype: torch.dtype) -> torch.nn.Module:
    if _is_large(module.__name__):
        config = {**config, **FLUX_AS_IT_IS}
    known = inspect.signature(cls.__init__).parameters
    if takes_all := any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        fields = getattr(vars(module).get(f"{cls.__name__}Params"), "__annotations__", None)
        known, takes_all = {**known, **(fields or {})}, not fields
    config = {name: value for name, value in config.items() if takes_all or name in known}
    if "ldm_patched" in cls.__module__:
        operations = importlib.import_module("ldm_patched.modules.ops").manual_cast
        how = {"dtype": dtype, "device": "cpu", "operations": operations}
        return _filled(cls(**config, **{name: value for name, value in how.items() if name in known}).to(dtype).eval())
    weights = _filled(cls(**config).to(dtype)).state_dict()
    with importlib.import_module("backend.operations").using_forge_operations(device="cpu", dtype=dtype):
        made = cls(**config).to(dtype).eval()
    made.load_state_dict(weights)  # only then they have any
    return made


@torch.no_grad()
def _filled(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        _fill(name.rpartition(".")[2], parameter)
    for name, buffer in model.named_buffers():
        if name == "pos_embed":  # checkpoints bring it
            buffer.zero_()
    return model


def _fill(name: str, parameter: torch.nn.Parameter) -> None:
    """Weights keep the size of what they are applied to, so that scores differ; norms and biases do nothing."""
    if parameter.ndim > 1:
        bound = math.sqrt(3 / math.prod(parameter.shape[1:]))
        parameter.uniform_(-bound, bound)
    else:
        parameter.fill_(1 if name in ("weight", "scale") else 0)


def _in(dtype: torch.dtype, value):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class ProbeModels(scripts.Script):
    """After the probe, which counts calls by then, and after ours."""

    def title(self):
        return "probe of models"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def before_process(self, p, *args):
        if isinstance(KEPT.waiting, tuple):  # it is loaded while ours is in place
            kind, place, dtype = KEPT.waiting
            for name in [place.partition(":")[0], *kind.places]:
                sys.modules.pop(name.partition(":")[0], None)
            KEPT.waiting = Run(kind, place, dtype)

    def process(self, p, *args):
        run, KEPT.waiting, KEPT.error = KEPT.waiting, None, None
        try:
            if run:
                KEPT.results.append(run())
        except Exception as error:
            KEPT.error = f"{type(error).__name__}: {error}"


def routes(_page, app):
    @app.get("/probe/models")
    def models():
        """The kinds of models that this web UI has: whether they are loaded when it starts, and cannot be small."""
        found = {name: _place(kind).partition(":")[0] for name, kind in KINDS.items()}
        return {
            name: {"early": place in LOADED_AT_START, "large": _is_large(place)}
            for name, place in found.items()
            if place
        }

    @app.post("/probe/models")
    def run(request: dict):
        """The model is to run in the next generation; `late`: and its module to be loaded, too."""
        kind, dtype = KINDS[request["kind"]], getattr(torch, request["dtype"])
        if request != KEPT.asked:
            KEPT.asked, KEPT.results = request, []
        waiting = (kind, _place(kind), dtype)
        KEPT.waiting = waiting if request.get("late") else Run(*waiting)
        return True

    @app.get("/probe/models/error")
    def error():
        """What the last run ended with; nothing if it came to a result."""
        return KEPT.error

    @app.get("/probe/models/results")
    def results():
        """Of the two runs asked for last: the size of the first, and how far the other is from it, relative to that;
        both as root mean squares."""
        first, last = (result.double() for result in KEPT.results)
        size = first.square().mean().sqrt()
        return {"size": float(size), "apart": float((last - first).square().mean().sqrt() / size)}


def _place(kind: Kind) -> str:
    return next((place for place in kind.places if _is_there(place)), "")


def _is_large(name: str) -> bool:
    """Whether the sizes of the real one are written into its code."""
    spec = importlib.util.find_spec(name)
    return "15360" in Path(spec.origin).read_text(encoding="utf8")


def _is_there(place: str) -> bool:
    try:
        return importlib.util.find_spec(place.partition(":")[0]) is not None
    except ImportError:
        return False


script_callbacks.on_app_started(routes)

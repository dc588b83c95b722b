"""xformers, flash-attn and SageAttention as modules of the tests' own: they take what the real ones take, refuse what
they refuse, and compute in float64.

What each demands is written down from the sources of xformers 0.0.20, 0.0.23.post1 and 0.0.35, flash-attn 2.0 to 2.8,
and SageAttention 1.0.6 and 2.2; devices apart, for these run on the CPU.
"""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import torch

HALF = (torch.float16, torch.bfloat16)


def scores_of(query, key, scale):
    """[batch, heads, queries, keys] of tensors [batch, tokens, heads, width]."""
    query, key = (it.detach().double().transpose(1, 2) for it in (query, key))
    return query @ key.mT * scale


def require(true: bool, words: str, error=RuntimeError) -> None:
    if not true:
        raise error(words)


def require_aligned(name: str, tensor, elements: int) -> None:
    """What CHECK_ALIGNED_PTR and the checks of strides in the C++ of xformers come to."""
    require(tensor.stride(-1) == 1, f"{name}: last dimension must be contiguous")
    steps = (*tensor.stride()[:-1], tensor.storage_offset())
    require(not any(step % elements for step in steps), f"{name} is not correctly aligned: {tensor.stride()}")


# --------------------------------------------------------------------------------------------------------- xformers


class Inputs:
    def __init__(self, query, key, value, attn_bias=None, p=0.0, scale=None):
        self.query, self.key, self.value, self.attn_bias, self.p, self.scale = query, key, value, attn_bias, p, scale


def xformers(newest: bool = True, widest: int = 65536) -> dict[str, ModuleType]:
    """The modules by name. `newest`: the signatures of 0.0.35, else those of 0.0.20."""
    calls: list[str] = []

    def declared(name: str, inputs) -> None:
        """As its operators' `not_supported_reasons`."""
        query, value, bias = inputs.query, inputs.value, inputs.attn_bias
        step = 16 // query.element_size()
        flash, cutlass = [], []
        for reasons, dtypes, most in ((flash, HALF, 256), (cutlass, (*HALF, torch.float32), widest)):
            if query.dtype not in dtypes:
                reasons.append(f"dtype={query.dtype} (supported: {set(dtypes)})")
            if max(query.shape[-1], value.shape[-1]) > most:
                reasons.append(f"max(query.shape[-1], value.shape[-1]) > {most}")
            for its, tensor in (("query", query), ("value", value)):
                if tensor.shape[-1] % step:
                    reasons.append(f"{its}.shape[-1] % {step} != 0")
                elif tensor.stride(-2) % step:
                    reasons.append(f"{its}.stride(-2) % {step} != 0 ({its}.stride() = {tensor.stride()})")
                if tensor.stride(-1) > 1:
                    reasons.append(f"{its}.stride(-1) > 1")
        if bias is not None:
            flash.append(f"attn_bias type is {type(bias)}")
            if any(bias.stride(dim) % step for dim in range(bias.ndim - 1)):
                cutlass.append(f"attn_bias.stride(-2) % {step} != 0 (attn_bias.stride() = {bias.stride()})")
                cutlass.append("HINT: To use an `attn_bias` with a sequence length that is not a multiple of 8, …")
        if query.shape[-1] != value.shape[-1]:
            flash.append("query.shape[-1] != value.shape[-1]")
        if flash and cutlass:
            raise NotImplementedError(
                f"No operator found for `{name}` with inputs:\n     query       : shape={tuple(query.shape)}\n"
                + "\n".join(
                    f"`{operator}` is not supported because:\n    " + "\n    ".join(reasons)
                    for operator, reasons in (("fa2F@2.5.7", flash), ("cutlassF-pt", cutlass))
                )
            )

    def forward(query, key, value, attn_bias, scale):
        tensors = (query, key, value)
        require(all(it.dim() == 4 for it in tensors), "Expected shape [batch, seqlen, num_heads, K]", ValueError)
        require(all(it.dtype == query.dtype for it in tensors), "should all have the same dtype", ValueError)
        batch, queries, heads, width = query.shape
        keys = key.shape[1]
        require(key.shape == (batch, keys, heads, width), "Incompatible shapes for attention inputs", ValueError)
        require(value.shape[:3] == (batch, keys, heads), "Incompatible shapes for attention inputs", ValueError)
        require(all(it.stride(2) for it in tensors), "one head for many is another operator")
        if attn_bias is not None:
            expected = (batch, heads, queries, keys)
            require(attn_bias.shape == expected, f"Invalid shape for attention bias: {attn_bias.shape}", ValueError)
        declared("memory_efficient_attention_forward", Inputs(query, key, value, attn_bias))
        for name, tensor in zip(("query", "key", "value"), tensors):
            require_aligned(name, tensor, 16 // query.element_size())
        scores = scores_of(query, key, scale)
        if attn_bias is not None:
            require(attn_bias.dtype == query.dtype, "invalid dtype for bias - should match query's dtype")
            require_aligned("attn_bias", attn_bias, 16 // query.element_size())
            scores = scores + attn_bias.double()
        output = scores.softmax(-1) @ value.double().transpose(1, 2)  # a row of -inf is NaN
        logsumexp = torch.full((batch, heads, -(-queries // 32) * 32), math.inf)
        logsumexp[..., :queries] = scores.logsumexp(-1)
        return output.to(query.dtype).transpose(1, 2).contiguous(), logsumexp

    def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        calls.append("forward")
        return forward(query, key, value, attn_bias, scale)[0]

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        calls.append("forward_requires_grad")
        return forward(query, key, value, attn_bias, scale)

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        calls.append("backward")
        forward(query, key, value, attn_bias, scale)  # for what it demands
        batch, queries, heads, _ = query.shape
        require(grad.shape == output.shape == (batch, queries, heads, value.shape[-1]), "grad.shape", ValueError)
        require(grad.dtype == output.dtype == query.dtype, "grad.dtype", ValueError)
        require(lse.dtype == torch.float32 and lse.shape[:2] == (batch, heads), "lse", ValueError)
        require(lse.is_contiguous() and lse.shape[2] >= queries, "lse", ValueError)
        scores = scores_of(query, key, scale) + (0 if attn_bias is None else attn_bias.double())
        weights = (scores - lse[..., :queries, None].double()).exp()
        grad, output, query, key, value = (it.double().transpose(1, 2) for it in (grad, output, query, key, value))
        sums = (grad * output).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ value.mT - sums) * scale
        found = grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad
        return tuple(it.to(lse.dtype).transpose(1, 2) for it in found)

    def _dispatch_fw(inp, needs_gradient):
        declared("memory_efficient_attention_forward", inp)

    def _dispatch_bw(inp, varlen_lse_packed):
        declared("memory_efficient_attention_backward", inp)

    dispatch = SimpleNamespace(_dispatch_fw=_dispatch_fw, _dispatch_bw=_dispatch_bw)
    if not newest:
        dispatch._dispatch_fw = lambda inp: _dispatch_fw(inp, False)
        dispatch._dispatch_bw = lambda inp: _dispatch_bw(inp, None)
    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(Inputs=Inputs, dispatch=dispatch)
    ops.calls = calls
    for function in (
        memory_efficient_attention_forward,
        memory_efficient_attention_forward_requires_grad,
        memory_efficient_attention_backward,
    ):
        setattr(ops, function.__name__, function)
    package = ModuleType("xformers")
    package.ops = ops
    return {"xformers": package, "xformers.ops": ops}


# ------------------------------------------------------------------------------------------------------- flash-attn


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale):
        scores = scores_of(query, key, scale)
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        output = (scores.softmax(-1) @ value.double().transpose(1, 2)).transpose(1, 2)
        return output.to(query.dtype).contiguous(), scores.logsumexp(-1).float()

    @staticmethod
    def backward(ctx, grad, _):
        leaves = [it.detach().double().requires_grad_() for it in ctx.saved_tensors]
        with torch.enable_grad():
            query, key, value = (it.transpose(1, 2) for it in leaves)
            output = ((query @ key.mT * ctx.scale).softmax(-1) @ value).transpose(1, 2)
        found = torch.autograd.grad(output, leaves, grad.double())
        return (*(it.to(grad.dtype) for it in found), None)


def flash_attn() -> dict[str, ModuleType]:
    package = ModuleType("flash_attn")

    # the parameters that 2.0 to 2.8 share, all but the tensors by name
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        package.calls.append(tuple(q.shape))
        require(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
        require(k.dtype == v.dtype == q.dtype, "query and key must have the same dtype")
        batch, _, heads, width = q.shape
        require(width <= 256, "FlashAttention forward only supports head dimension at most 256")
        require(k.shape == v.shape and k.shape[::2] == (batch, heads) and k.shape[3] == width, "CHECK_SHAPE")
        require(all(it.stride(-1) == 1 for it in (q, k, v)), "Input tensor must have contiguous last dimension")
        require(dropout_p == 0.0 and not causal and softmax_scale >= 0, "not this time")
        output, logsumexp = FlashAttnFunc.apply(q, k, v, softmax_scale)
        return (output, logsumexp, None) if return_attn_probs else output

    package.flash_attn_func, package.calls = flash_attn_func, []
    return {"flash_attn": package}


# ---------------------------------------------------------------------------------------------------- SageAttention


def sageattention(first: bool = False, gives=lambda output: output) -> dict[str, ModuleType]:
    """`first`: version 1.0.6, else 2.2. `gives` is what becomes of a result."""
    package = ModuleType("sageattention")

    def attend(q, k, v, tensor_layout, is_causal, sm_scale):
        require(tensor_layout in ("HND", "NHD"), f"tensor_layout {tensor_layout} not supported", ValueError)
        require(q.dtype in HALF, "Input tensors must be in dtype of torch.float16 or torch.bfloat16", AssertionError)
        require(q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype.", AssertionError)
        last = all(it.stride(-1) == 1 for it in (q, k, v))
        require(last, "Last dim of qkv must be contiguous.", AssertionError)
        require(not any(it.requires_grad for it in (q, k, v)) or not torch.is_grad_enabled(), "forward only")
        require(k.shape == v.shape, "shapes")
        package.calls.append(tensor_layout)
        if tensor_layout == "HND":
            q, k, v = (it.transpose(1, 2) for it in (q, k, v))
        output = scores_of(_rounded(q), _rounded(k), sm_scale).softmax(-1) @ v.double().transpose(1, 2)
        output = gives(output.to(q.dtype))
        return output if tensor_layout == "HND" else output.transpose(1, 2)

    def sageattn_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        require(q.size(-1) in (64, 96, 128), "headdim should be in [64, 96, 128].", AssertionError)
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)  # in place, as 1.0.6 does
        return attend(q, k, v, tensor_layout, is_causal, sm_scale)

    def sageattn_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        require(q.size(-1) <= 128, f"Unsupported head_dim: {q.size(-1)}", ValueError)
        return attend(q, k, v, tensor_layout, is_causal, sm_scale)

    package.sageattn, package.calls = sageattn_1 if first else sageattn_2, []
    return {"sageattention": package}


def _rounded(tensor):
    """To 8 bits, a scale for each token and head."""
    step = tensor.detach().double().abs().amax(-1, keepdim=True) / 127
    return (tensor.double() / step).round() * step

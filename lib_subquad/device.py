"""What a device can do: free bytes, largest tensor, dtype rules, and what its out-of-memory looks like.

Every rule that depends on the device stands here, with its source; the rest of the library asks for `rules(device)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.utils._python_dispatch
from torch.torch_version import TorchVersion

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Rules:
    """What one kind of device allows and prefers.

    `largest_elements` and `largest_bytes` bound every tensor a call makes; None means that only memory does.
    `tile_bytes` is the size of score buffer that automatic sizes aim for, and `kv_tile` its width in keys;
    `least_tile_bytes` the smallest that is still efficient: no count of free memory alone leads to a smaller one. Both
    are for each thread where `threads_share`: the threads of the portable engine's own then work on tiles of their own.
    `lazy_maximum` lets the portable engine check results on the host while it runs: free on the CPU, a stall elsewhere.
    `masks_in_rows`: fused kernels read a mask only with its keys side by side. `cudnn`: PyTorch may take cuDNN's, whose
    rows that may attend to nothing are not zeros. `widest_in_registers`: of half-precision values wider than this a
    fused kernel keeps the results in float32 as well. `most_entries`: so many of a batch, or heads, fused kernels take.
    `packages`: xformers, flash-attn and SageAttention are built for such devices. `pads`: columns of zeros up to a
    width of the fused kernel's are taken to cost less than going without it.

    `no_fused` says why the device has no fused kernel. From the torch of `fused_from` on it has one all the same, of
    which PyTorch does not tell: for heads, and values, of `fused_widths`, without gradients unless `fused_gradients`,
    of at least `fewest_queries`, and unless the environment variable `fused_off` is set.
    """

    no_fused: str = ""
    largest_elements: int | None = None
    largest_bytes: int | None = None
    contiguous: bool = False
    float64: bool = True
    tile_bytes: int = 128 * MIB
    least_tile_bytes: int = 16 * MIB
    kv_tile: int = 4096
    lazy_maximum: bool = False
    threads_share: bool = False
    masks_in_rows: bool = True
    cudnn: bool = False
    widest_in_registers: int | None = None
    most_entries: int | None = None
    packages: bool = False
    pads: bool = True
    fused_from: str = ""
    fused_widths: tuple[int, ...] = ()
    fused_gradients: bool = True
    fewest_queries: int = 1
    fused_off: str = ""

    @property
    def keeps_scores(self) -> bool:
        """Whether scores may be kept for the backward pass, which makes one tensor of all heads and keys."""
        return self.largest_bytes is None


RULES = {
    # Tile: the best of a grid of 256-2048 queries x 256-1024 keys x 1-16 heads on two AVX-512 cores: buffers of 2 MiB
    # stay in the last-level cache. `python -m lib_subquad lab --device cpu` measures the grid again. With 1 MiB, 256
    # queries x 512 keys x 2 heads, calls took 1.05-1.4 times as long there; on 16 cores up to 4.5 times.
    "cpu": Rules(
        tile_bytes=2 * MIB,
        least_tile_bytes=3 * MIB // 4,
        kv_tile=512,
        lazy_maximum=True,
        threads_share=True,
        masks_in_rows=False,  # PyTorch PR #158424 asks for them everywhere else
        # The portable engine's time against it, heads x tokens, width/value width, two busy cores, torch 2.13: 1.04
        # times at 16 x 4096, 64/40; 1.40 and 1.33 at 1 x 4096, 512/256 and 256/512; 1.60 at 8 x 2048, 160/32.
        pads=False,
    ),
    # Tiles on accelerators: large enough that launching a kernel (about 10 us) is lost beside computing one, small
    # enough to fit a 4 GB card. Measured on an H100 only, where launching weighs most: 16 MiB takes 1.2-1.85 times as
    # long as 128, 8 MiB 1.6-3.2 times, 512 MiB 0.8-0.97 times.
    # cuDNN: PyTorch makes -65504 of a bool mask's False up to torch 2.11, and a row of nothing attends to everything
    # (PyTorch #177842). It comes first on Hopper and datacentre Blackwell.
    # Width: PyTorch's mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer; 32 MiB at 1 x 16384 x 512 in
    # float16, measured on an H200.
    # Packages: xformers' operators (0.0.20 to 0.0.35) declare the device "cuda", ROCm's as well; flash-attn's README
    # names CUDA and ROCm; SageAttention asserts "cuda". None knows ZLUDA.
    # Entries: PyTorch #142228, #146704; in float32 65,536 heads are an "invalid argument" on an H200 with torch 2.11.
    "cuda": Rules(cudnn=True, widest_in_registers=128, most_entries=65_535, packages=True),
    "rocm": Rules(most_entries=65_535, packages=True),
    "zluda": Rules(),
    # Larger tensors are silently corrupted or abort: ComfyUI #14837, #14838, PyTorch #149261. Operands must be
    # contiguous: web UI PR #10201. SDPA there materialises the scores and loses half-precision accuracy beyond some
    # 3,000 tokens: PyTorch PR #190791. A fixed modest budget beats a share of free memory: web UI PR #12526.
    # From torch 2.13 on there is a fused kernel, forward only, for these widths and more than 8 queries: PyTorch
    # PR #181575; its tiles are in the wheel's ATen/native/mps/kernels/PrefillAttention.h. _fused_sdp_choice does not
    # know of it: PyTorch PR #184585. The variable is named in ATen/native/mps/operations/Attention.mm.
    "mps": Rules(
        no_fused="on Apple Silicon PyTorch's attention keeps all scores in memory and is inexact beyond 3,000 tokens",
        largest_elements=(1 << 30) - 1,
        largest_bytes=4 * GIB,
        contiguous=True,
        float64=False,
        fused_from="2.13",
        fused_widths=(32, 64, 72, 80, 96, 128, 256),
        fused_gradients=False,
        fewest_queries=9,
        fused_off="PYTORCH_MPS_DISABLE_PREFILL_ATTENTION",
    ),
    # Older Arc drivers refuse any block over 4 GiB: web UI PR #14353.
    "xpu": Rules(largest_bytes=4 * GIB),
    # No fused kernels, and memory comes back late (amdgpu fork #414): keep tiles small.
    "directml": Rules(no_fused="DirectML has no fused attention kernel", float64=False, tile_bytes=64 * MIB),
    "other": Rules(tile_bytes=64 * MIB),
}

# Where a device does not tell its free memory (DirectML outside the amdgpu fork): what a 4 GB card has to spare.
UNKNOWN_FREE_BYTES = GIB


def kind(device: torch.device) -> str:
    """The key of `RULES` that describes `device`."""
    if device.type == "cuda":
        return _cuda_kind(device.index)
    return {"privateuseone": "directml"}.get(device.type, device.type if device.type in RULES else "other")


@cache
def _cuda_kind(index: int | None) -> str:
    if torch.version.hip:
        return "rocm"
    with contextlib.suppress(Exception):  # a name is no reason to fail
        if "[ZLUDA]" in torch.cuda.get_device_name(index):
            return "zluda"
    return "cuda"


def rules(device: torch.device) -> Rules:
    return RULES[kind(device)]


def fused_widths(device: torch.device) -> tuple[int, ...]:
    """The widths of the fused kernels that a device has by rule; none where PyTorch itself is to be asked, or there are
    none at all."""
    its = rules(device)
    if not its.fused_widths or os.environ.get(its.fused_off, "0") != "0":
        return ()
    return its.fused_widths if is_as_new(str(torch.__version__), its.fused_from) else ()


@cache
def is_as_new(version: str, wanted: str) -> bool:
    """Not so what was built on the way to the version that is wanted."""
    return TorchVersion(version) >= TorchVersion(wanted)


def switches() -> tuple[bool, ...]:
    """What of PyTorch's switches decides which kernel there is: of its fused kernels those that the user or the host
    has left on, and whether only deterministic ones may be taken, of which cuDNN's is none (`check_cudnn_deterministic`
    of ATen's transformers/cuda/sdp_utils.cpp)."""
    return tuple([switch() for switch in _SWITCHES])  # at every call: an iterator would take longer


def are_fused_kernels_off() -> bool:
    """Whether the user or the host has switched off all of PyTorch's."""
    return not any(switch() for switch in _FUSED)


_FUSED = [
    getattr(torch.backends.cuda, name)
    for name in ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")
    if hasattr(torch.backends.cuda, name)  # the last is newer than torch 2.1.2
]
_SWITCHES = [
    *_FUSED,
    getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled),
    getattr(torch._C, "_get_deterministic_algorithms_warn_only", torch.is_deterministic_algorithms_warn_only_enabled),
]


def threads(device: torch.device) -> int:
    """How many threads may share a call, each with a tile of its own."""
    return torch.get_num_threads() if rules(device).threads_share else 1


def tile_bytes(device: torch.device, least: bool = False) -> int:
    """The buffers of scores that automatic sizes aim for, all threads' together; or the `least` that is efficient."""
    return (rules(device).least_tile_bytes if least else rules(device).tile_bytes) * threads(device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, maxima, sums and accumulators are kept: float64 for float64 input, else float32.

    q.k overflows fp16 at 65504 (SD 2.1 768 gives black images), and rounding scores to half costs up to 1,000 times
    the error of a fused kernel, which keeps them in float32 as well.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def free_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on `device` can count on, including what PyTorch's allocator holds but does not use.

    Never raises: a device that does not answer is taken to have `UNKNOWN_FREE_BYTES`.
    """
    return _told(_FREE, device)


def total_bytes(device: torch.device) -> int:
    """Bytes that there are on `device`, whoever has them: a number that does not change while a process runs.

    Never raises: a device that does not answer is taken to have `UNKNOWN_FREE_BYTES`.
    """
    return _told(_TOTAL, device)


def _told(asked: Mapping[str, Callable[[torch.device], float]], device: torch.device) -> int:
    try:
        return max(0, int(asked[device.type](device)))
    except Exception:  # also where nobody can be asked
        return UNKNOWN_FREE_BYTES


def _total_of_properties(device: torch.device) -> int:
    return getattr(torch, device.type).get_device_properties(device).total_memory


def _total_mps(device: torch.device) -> int:
    return torch.mps.recommended_max_memory()


def _total_directml(device: torch.device) -> int:
    return torch.dml.mem_get_info(device)[1]  # type: ignore[attr-defined]  # only in the amdgpu fork


def _total_cpu(device: torch.device) -> int:
    limits = [_host_bytes("MemTotal", "total", 2, "SC_PHYS_PAGES")]
    for limit, _, _ in _container_files():
        with contextlib.suppress(OSError, ValueError):
            limits.append(_number(limit))
    return min(limits)


def _free_cuda(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_mps(device: torch.device) -> int:
    # driver_allocated_memory() counts what the allocator caches, which is free for us: PyTorch #105839, web UI #11848.
    return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()


def _free_xpu(device: torch.device) -> int:
    allocated = torch.xpu.memory_allocated(device)
    with contextlib.suppress(AttributeError, RuntimeError):  # newer than torch 2.5, and not every driver answers it
        return torch.xpu.mem_get_info(device)[0] + torch.xpu.memory_reserved(device) - allocated
    return torch.xpu.get_device_properties(device).total_memory - allocated


def _free_directml(device: torch.device) -> int:
    return torch.dml.mem_get_info(device)[0]  # type: ignore[attr-defined]  # only in the amdgpu fork


def _free_cpu(device: torch.device) -> float:
    return min(_free_host(), _free_container())


def _free_host() -> int:
    return _host_bytes("MemAvailable", "available", 3, "SC_AVPHYS_PAGES")


def _host_bytes(linux: str, psutils: str, windows: int, pages: str) -> int:
    """What the computer tells of its memory, by the name that each way of asking has for it."""
    try:
        with open("/proc/meminfo", "rb") as lines:
            for line in lines:
                if line.startswith(f"{linux}:".encode()):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    with contextlib.suppress(ImportError):
        import psutil  # the web UI has it; the library must not need it

        return getattr(psutil.virtual_memory(), psutils)
    if (told := _memory_status(windows)) is not None:
        return told
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS no such name
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return UNKNOWN_FREE_BYTES


def _memory_status(field: int) -> int | None:
    """A field of Windows' MEMORYSTATUSEX: 2 is the physical memory, 3 what of it is available. None elsewhere."""
    if not hasattr(ctypes, "windll"):
        return None
    status = struct.Struct("=II7Q")
    buffer = ctypes.create_string_buffer(status.pack(status.size, *[0] * 8), status.size)
    return status.unpack(buffer.raw)[field] if ctypes.windll.kernel32.GlobalMemoryStatusEx(buffer) else None


def _free_container() -> float:
    """What the process's control group leaves of its limit; infinite where there is none."""
    free = float("inf")
    for limit, used, statistics in _container_files():
        with contextlib.suppress(OSError, ValueError):
            # "max" is a ValueError: no limit at this level.
            free = min(free, _number(limit) - _number(used) + _reclaimable_bytes(statistics))
    return free


@lru_cache(maxsize=1)
def _container_files() -> tuple[tuple[str, str, str], ...]:
    """(limit, use, statistics) files of every control group above this process that can limit memory, v2 and v1."""
    found = []
    try:
        with open("/proc/self/cgroup") as lines:
            groups = [line.rstrip("\n").split(":", 2) for line in lines]
    except OSError:
        return ()
    for _, controllers, path in groups:
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):  # inside a container the group's own folder is the root
            folder = os.path.join(root, *parts[:depth])
            if os.path.exists(os.path.join(folder, names[0])):
                limit, used, statistics = (os.path.join(folder, name) for name in (*names, "memory.stat"))
                found.append((limit, used, statistics))
    return tuple(found)


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _reclaimable_bytes(path: str) -> int:
    """What the kernel gives back on demand: pages of files, recently used ones too (a checkpoint that was read twice),
    and its own caches of names. Pages of tmpfs count as anonymous ones here, as they should.

    A group's statistics in version 1 tell its own pages and, as total_…, those of the groups below it, which its use
    counts as well.
    """
    found = {}
    with contextlib.suppress(OSError), open(path) as lines:
        for line in lines:
            name, _, number = line.partition(" ")
            found[name] = number
    return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in RECLAIMABLE)


RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # cgroup-v2.rst and cgroup-v1/memory.rst of Linux

_FREE = {
    "cuda": _free_cuda,
    "mps": _free_mps,
    "xpu": _free_xpu,
    "privateuseone": _free_directml,
    "cpu": _free_cpu,
}

_TOTAL = {
    "cuda": _total_of_properties,
    "mps": _total_mps,
    "xpu": _total_of_properties,
    "privateuseone": _total_directml,
    "cpu": _total_cpu,
}

# How devices say that they are out of memory where they raise no error class of their own, in lower case. What says
# that a device is lost, an address illegal, an argument invalid or a kernel too large must match none of them.
OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA, HIP, XPU and MPS by way of PyTorch: c10/{cuda,xpu}/*CachingAllocator.cpp, MPSAllocator.mm
    "out_of_memory",  # CUDA_ERROR_OUT_OF_MEMORY: the driver itself, and ZLUDA
    "outofmemory",  # hipErrorOutOfMemory; Metal's kIOGPUCommandBufferCallbackErrorOutOfMemory
    "nvml_success == r internal assert failed",  # an out-of-memory whose report failed: PyTorch #112377
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, hipBLAS: a failed cudaMalloc, by NVIDIA's manual
    "_allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_{HOST,DEVICE}_ALLOCATION_FAILED: cudnn_graph.h; ZLUDA too
    "rocblas_status_memory_error",  # ROCm/rocBLAS, rocblas-types.h
    "miopenstatusallocfailed",  # ROCm/MIOpen, src/handle_api.cpp
    "out_of_host_memory",  # UR_, PI_, ZE_ and CL_: unified-runtime's ur_api.h, oneDNN's src/xpu
    "out_of_device_memory",
    "mem_object_allocation_failure",
    "error_out_of_resources",  # older Level Zero plugins say so of device memory: ipex #359, SD.Next #1526
    "cl_out_of_resources",  # oneDNN's src/xpu/ocl/utils_shared.cpp takes it for one
    "allocation is out of device memory",  # Intel's extension for PyTorch
    "can not allocate memory block",  # the same, of blocks over 4 GiB
    "could not create a memory object",  # oneDNN, dnnl.hpp, which hides the status
    "invalid buffer size",  # MPS, MPSAllocator.mm
    "could not allocate tensor",  # DirectML: amdgpu fork #414
    "8007000e",  # DirectML, E_OUTOFMEMORY, whose words Windows translates: diffusers #791
    "can't allocate memory",  # CPU: c10/core/impl/alloc_cpu.cpp
    "could not allocate memory",
    "cannot allocate memory",  # the C library
    "not enough memory",  # CPU and DirectML on Windows
    "std::bad_alloc",
    "bad allocation",  # the same from Microsoft's compiler
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's way of saying that an allocation failed."""
    classes = (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError), torch.cuda.OutOfMemoryError)
    if isinstance(error, classes):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def is_captured() -> bool:
    """Whether a CUDA graph is being captured: an error ends that, and so does a look at a result."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def release_cached(device: torch.device) -> None:
    """Give cached but unused memory back to the device, where its allocator keeps any."""
    cache = {"cuda": torch.cuda, "mps": getattr(torch, "mps", None), "xpu": getattr(torch, "xpu", None)}
    with contextlib.suppress(Exception):  # after an out-of-memory, failing to tidy up must not hide it
        if (module := cache.get(device.type)) is not None:
            module.empty_cache()


def check_room(bytes_: int, device: torch.device) -> None:
    """Nothing, or an out-of-memory where so many bytes cannot be had now, before a kernel asks for them.

    Only the processor needs it: for a new shape oneDNN writes a kernel's code to where it could get no memory
    (`Xbyak::CodeArray::db`, seen with torch 2.1.2), and that ends the process. Nothing is written to what is asked for
    here: it takes a few microseconds, and no memory.

    Raises:
        MemoryError: they cannot be had.
    """
    if device.type == "cpu":
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
        try:
            mmap.mmap(-1, bytes_, **private).close()
        except OSError as error:
            raise MemoryError(f"can't allocate memory: {bytes_ / MIB:.0f} MiB are not to be had ({error})") from error


def give_back_freed_memory() -> None:
    """glibc keeps what was freed, and what it keeps would pass for memory that is in use."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off on `device`; operators then run in the dtypes they are given.

    Under autocast a plain `bmm` is cast to half but `bmm(out=)` is not, so a kernel that mixes them fails.
    """
    if not autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_modes() -> contextlib.AbstractContextManager[object]:
    """What counts, traces or replaces operators sees none of them; torch 2.0 cannot do without."""
    return getattr(torch.utils._python_dispatch, "_disable_current_modes", contextlib.nullcontext)()  # private


def autocast_enabled(device_type: str) -> bool:
    """Whether PyTorch would cast operators' arguments on such a device."""
    try:
        return torch.is_autocast_enabled(device_type)
    except (TypeError, RuntimeError):  # torch before 2.4 takes no argument; some devices have no autocast
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """What PyTorch casts to on such a device where autocast is on."""
    try:
        return torch.get_autocast_dtype(device_type)
    except AttributeError:  # newer than torch 2.3
        return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()

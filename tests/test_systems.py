"""What only some systems have is asked for before it is used: Windows has no os.sysconf, macOS no /proc."""

from __future__ import annotations

import ast
import builtins
import ctypes
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib_subquad import device as devices
from lib_subquad import identity
from lib_subquad.lab import machine

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "install.py",
    *(path for folder in ("lib_subquad", "scripts", "demo", "tools") for path in sorted((ROOT / folder).rglob("*.py"))),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# By the "Availability" lines of Python's documentation: what Windows lacks, or macOS, or everything but Windows.
ONLY_SOME_SYSTEMS = {
    "os": """
        chown chroot confstr confstr_names copy_file_range ctermid eventfd fchdir fchmod fchown fork forkpty fpathconf
        fstatvfs geteuid getegid getgid getgrouplist getgroups getloadavg getpgid getpgrp getpriority getrandom
        getresgid getresuid getsid getuid getxattr initgroups killpg lchown listxattr lockf major makedev
        memfd_create minor mkfifo mknod nice openpty pathconf pathconf_names pidfd_open pipe2 plock posix_fadvise
        posix_fallocate posix_openpt posix_spawn pread preadv pwrite pwritev register_at_fork removexattr
        sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid setpriority
        setregid setresgid setresuid setreuid setsid setuid setxattr splice startfile statvfs sync sysconf
        sysconf_names tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev O_ASYNC O_BINARY O_CLOEXEC
        O_DIRECT O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WEXITSTATUS WIFEXITED WIFSIGNALED WNOHANG WTERMSIG
    """,
    "signal": """
        SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGPWR SIGQUIT SIGSTOP SIGSYS SIGTRAP
        SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ CTRL_C_EVENT
        CTRL_BREAK_EVENT alarm getitimer pause pidfd_send_signal pthread_kill pthread_sigmask setitimer siginterrupt
        sigpending sigtimedwait sigwait sigwaitinfo
    """,
    "time": """
        clock_getres clock_gettime clock_gettime_ns clock_settime clock_settime_ns pthread_getcpuclockid tzset
        CLOCK_MONOTONIC CLOCK_MONOTONIC_RAW CLOCK_BOOTTIME CLOCK_PROCESS_CPUTIME_ID CLOCK_REALTIME
        CLOCK_THREAD_CPUTIME_ID
    """,
    "select": "devpoll epoll kqueue poll",
    "socket": "AF_UNIX AF_NETLINK AF_PACKET sethostname",
    "sys": "getwindowsversion winver dllhandle abiflags",
    "ctypes": "windll oledll WinDLL WinError FormatError GetLastError WINFUNCTYPE",
    "subprocess": "STARTUPINFO CREATE_NEW_CONSOLE CREATE_NEW_PROCESS_GROUP CREATE_NO_WINDOW",
}
ONLY_SOME_SYSTEMS = {module: set(names.split()) for module, names in ONLY_SOME_SYSTEMS.items()}
MODULES = set(
    "_winapi curses fcntl grp msvcrt nt posix pty pwd readline resource spwd syslog termios tty winreg winsound".split()
)
FOLDERS = ("/proc/", "/sys/", "/dev/")
TELLS = ("sys.platform", "os.name", "platform.system")


# ------------------------------------------------------------------------------------------------------ the checker


def unguarded(source: str) -> list[str]:
    """Each use of what only some systems have that stands neither in a `try` for its absence nor behind a question."""
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        for what, absence in _uses(node):
            if not _guarded(node, what, absence, parents):
                found.append(f"line {node.lineno}: {what}")
    return found


def _uses(node):
    """(what is used, the exceptions that tell of its absence)."""
    if isinstance(node, ast.Attribute) and node.attr in ONLY_SOME_SYSTEMS.get(ast.unparse(node.value), ()):
        yield ast.unparse(node), {"AttributeError"}
    if isinstance(node, ast.Import):
        for name in node.names:
            if name.name in MODULES:
                yield name.name, {"ImportError", "ModuleNotFoundError"}
    if isinstance(node, ast.ImportFrom):
        for name in node.names:
            if node.module in MODULES or name.name in ONLY_SOME_SYSTEMS.get(node.module, ()):
                yield f"{node.module}.{name.name}", {"ImportError"}
    if isinstance(node, ast.Call):
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
        called = ast.unparse(node.func)
        if called == "open" and isinstance(first, str) and first.startswith(FOLDERS):
            yield first, {"OSError", "FileNotFoundError"}
        if called.endswith("CDLL") and first is None:
            yield "CDLL(None)", {"TypeError"}
        if any(keyword.arg == "preexec_fn" for keyword in node.keywords):
            yield "preexec_fn", {"ValueError"}


def _guarded(node, what: str, absence: set[str], parents) -> bool:
    caught = {*absence, "Exception"}
    inner, outer = node, parents.get(node)
    while outer is not None:
        if isinstance(outer, ast.Try) and inner in outer.body:
            if any(caught & _names(handler.type) for handler in outer.handlers):
                return True
        if isinstance(outer, ast.With):
            items = outer.items[: outer.items.index(inner)] if inner in outer.items else outer.items
            suppressed = (item.context_expr for item in items if isinstance(item.context_expr, ast.Call))
            if any("suppress" in ast.unparse(call.func) and caught & _names(*call.args) for call in suppressed):
                return True
        if isinstance(outer, (ast.If, ast.IfExp)) and inner is not outer.test and _asks(outer.test, what):
            return True
        if isinstance(outer, ast.BoolOp) and any(_asks(value, what) for value in outer.values if value is not inner):
            return True
        if isinstance(getattr(outer, "body", None), list) and inner in outer.body:
            before = outer.body[: outer.body.index(inner)]
            if any(isinstance(step, ast.If) and _asks(step.test, what) and _leaves(step) for step in before):
                return True
        inner, outer = outer, parents.get(outer)
    return False


def _names(*nodes) -> set[str]:
    return {inner.id for node in nodes if node is not None for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _asks(test, what: str) -> bool:
    """Whether a condition asks for the system, or for the very thing."""
    module, _, name = what.rpartition(".")
    words = ast.unparse(test)
    return any(tell in words for tell in TELLS) or f"hasattr({module}, {name!r})" in words


def _leaves(step: ast.If) -> bool:
    return isinstance(step.body[-1], (ast.Return, ast.Raise, ast.Continue))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_only_some_systems_have_is_asked_for_first(path):
    assert unguarded(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.sysconf('SC_PAGE_SIZE')",
        "import os\ntry:\n    x = 1\nexcept AttributeError:\n    os.getloadavg()",
        "import os\nwith contextlib.suppress(OSError):\n    os.getloadavg()",
        "import os\nif hasattr(os, 'fork'):\n    os.getuid()",
        "import os\nif hasattr(os, 'fork'):\n    pass\nos.fork()",
        "import resource",
        "def f():\n    from fcntl import flock",
        "from signal import SIGKILL",
        "open('/proc/stat')",
        "with open('/proc/stat') as file, contextlib.suppress(OSError):\n    pass",
        "ctypes.CDLL(None).malloc_trim(0)",
        "ctypes.windll.kernel32",
        "subprocess.run([], preexec_fn=f)",
    ],
)
def test_the_checker_finds_it(source):
    assert len(unguarded(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.path.join('a', 'b'), os.cpu_count(), os.getpid()",
        "try:\n    os.sysconf('x')\nexcept (OSError, AttributeError):\n    pass",
        "with contextlib.suppress(AttributeError, ValueError):\n    os.sysconf('x')",
        "with contextlib.suppress(OSError), open('/proc/stat') as file:\n    pass",
        "load = os.getloadavg() if hasattr(os, 'getloadavg') else None",
        "load = hasattr(os, 'getloadavg') and os.getloadavg()",
        "if sys.platform == 'linux':\n    ctypes.CDLL(None).malloc_trim(0)",
        "def f():\n    if sys.platform != 'linux':\n        return\n    import resource\n    resource.getpagesize()",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "def f():\n    if not hasattr(ctypes, 'windll'):\n        return None\n    return ctypes.windll.kernel32",
        "ctypes.CDLL('libc.so.6')",
    ],
)
def test_the_checker_lets_pass_what_asks(source):
    assert unguarded(source) == []


# ------------------------------------------------------------------------------------- texts, which Windows encodes


def of_the_systems_encoding(source: str) -> list[str]:
    """Each text read, written, or taken from a program in the encoding of the system: on Windows that is not UTF-8."""
    found = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of_a_program = "text" in keywords and name in ("run", "Popen", "check_output")
        if "encoding" not in keywords and (name in ("read_text", "write_text") or of_a_program):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


@pytest.mark.parametrize("path", sorted({*SOURCES, *TESTS}), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_are_utf_8_on_every_system(path):
    assert of_the_systems_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("call", ["path.read_text({})", "path.write_text('×', {})", "run([], text=True, {})"])
def test_the_systems_encoding_is_found(call):
    assert len(of_the_systems_encoding(call.format(""))) == 1
    assert of_the_systems_encoding(call.format("encoding='utf-8'")) == []


# ------------------------------------------------------------------------------------- on a system that lacks them


@pytest.fixture
def bare_system(monkeypatch):
    """No /proc, no psutil and no os.sysconf, as on Windows without psutil."""
    real = builtins.open

    def opened(path, *arguments, **keywords):
        if str(path).startswith(FOLDERS):
            raise FileNotFoundError(path)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    return monkeypatch


def test_free_memory_is_a_guess_where_nothing_tells(bare_system):
    bare_system.delattr(ctypes, "windll", raising=False)
    assert devices._free_host() == devices.UNKNOWN_FREE_BYTES


@pytest.mark.parametrize("answers", [True, False])
def test_free_memory_is_asked_of_windows(bare_system, answers):
    def status(buffer):
        assert len(buffer) == 64 and struct.unpack_from("=I", buffer)[0] == 64  # MEMORYSTATUSEX, its first field
        if answers:
            struct.pack_into("=II7Q", buffer, 0, 64, 60, 8 << 30, 3 << 30, 9 << 30, 4 << 30, 1 << 47, 1 << 46, 0)
        return int(answers)

    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=status))
    bare_system.setattr(ctypes, "windll", windows, raising=False)
    assert devices._free_host() == (3 << 30 if answers else devices.UNKNOWN_FREE_BYTES)


def test_what_the_processors_do_is_not_told(bare_system):
    assert machine.processor_seconds() is None and machine.load() is None and identity.processor.__wrapped__()


def test_processor_seconds_need_sysconf(monkeypatch, tmp_path):
    stat, real = tmp_path / "stat", builtins.open
    stat.write_text("cpu 1 2 3 4 5 6 7 8 9\n", encoding="utf-8")
    monkeypatch.setattr(builtins, "open", lambda path, *more: real(stat if path == "/proc/stat" else path, *more))
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setitem(sys.modules, "psutil", None)  # which is asked next
    assert machine.processor_seconds() is None

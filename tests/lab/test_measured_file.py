"""The file of what was measured: whole or not there, whatever ends in the middle; and never worth an image."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lib_subquad import Settings, attention, plan
from lib_subquad.engines import order
from lib_subquad.engines.table import SMALLEST_CHUNK, Class, Found, Machine, Table, class_of
from lib_subquad.lab import whole
from lib_subquad.lab.measured import file
from lib_subquad.problem import Problem

SHAPE = (1, 2, 128, 8)
CPU = torch.device("cpu")
PROBLEM = Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, "cpu")
HERE = Machine("a card", "a driver", "2.13.0", "1.1.0", "one, two")
EXAMPLES = int(os.environ.get("SUBQUAD_FUZZ_EXAMPLES", "2000"))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a copy of this process")


@pytest.fixture(autouse=True)
def by_the_rules():
    before = order.table()
    order.go_by(Table())
    file._warn_once.cache_clear()
    yield
    order.go_by(before)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / file.NAME


def some(count: int, first: int = 0) -> dict[Class, Found]:
    return {calls(number): Found("one", 64 + number, 64, 1.5) for number in range(first, first + count)}


def calls(number: int) -> Class:
    return Class("float16", "float16", number, 40, "none", 4, 12, 12)


def in_the_file(path: Path) -> Table:
    """What it holds; raises where it is broken."""
    return Table.from_json(path.read_text(encoding="utf-8"))


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# ------------------------------------------------------------------------------------------------------- as it goes


def test_what_is_added_is_gone_by_and_kept(path, caplog):
    assert file.add(path, HERE, some(2)) and file.add(path, HERE._replace(torch="2.0"), some(1))
    expected = order.table()
    assert len(expected.machines) == 2 and in_the_file(path) == expected
    order.go_by(Table())
    assert file.load(path) == order.table() == expected
    assert file.forget(path, HERE) and in_the_file(path) == order.table() and len(order.table().machines) == 1
    assert file.forget(path) and in_the_file(path) == order.table() == Table()
    assert lines(caplog) == []


def test_without_a_file_it_is_gone_by(caplog):
    assert not file.add(None, HERE, some(1)) and order.table().found(HERE, calls(0))
    assert not file.forget(None, HERE) and order.table() == Table() and lines(caplog) == []


def test_no_file_is_no_fault(path, caplog):
    assert file.load(path) == Table() and lines(caplog) == []


def test_what_another_has_found_meanwhile_is_kept(path):
    file.add(path, HERE, some(1))
    path.write_text(Table().with_found(HERE, some(3, first=5)).to_json(), encoding="utf-8")
    file.add(path, HERE, some(1, first=1))
    assert set(in_the_file(path).machines[HERE]) == {*some(3, first=5), calls(1)}


def test_a_folder_that_is_not_there_is_made(tmp_path):
    path = tmp_path / "subquad" / "deep" / file.NAME
    assert file.add(path, HERE, some(1)) and in_the_file(path) == order.table()


def test_a_path_of_other_letters(tmp_path, caplog):
    path = tmp_path / "Bilder – ärger, 画像 [1]*" / "gemessen [ä].json"
    assert file.add(path, HERE, some(1)) and file.read(path) == order.table() and lines(caplog) == []
    (path.parent / f"{path.name}.123.tmp").write_text("left by a crash", encoding="utf-8")
    file.add(path, HERE, some(1, first=1))
    assert len(in_the_file(path).machines[HERE]) == 2
    assert sorted(it.name for it in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


# --------------------------------------------------------------------------------------------- what ends in the middle


def child(work) -> int:
    """The process, a copy of this one, that does `work()`."""
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_table(path):
    """A hundred times or more, at any moment; the reader finds what was there before or after a whole write."""
    dice, most = random.Random(0), 100
    legal = {Table({HERE: some(count)}).to_json() for count in range(1, most + 1)}
    file.add(path, HERE, some(1))

    def write() -> None:
        while True:
            for count in range(1, most + 1):
                file._change(path, lambda table, count=count: Table({HERE: some(count)}), "")

    left = 0
    for times in range(2000):
        if times >= 100 and left:  # some were killed in the middle of it
            break
        pid = child(write)
        time.sleep(dice.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert path.read_text(encoding="utf-8") in legal
        left += len(list(path.parent.glob("*.tmp")))
    assert left
    assert file.add(path, HERE, some(1, first=200)) and calls(200) in in_the_file(path).machines[HERE]
    assert sorted(it.name for it in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_that_write_at_once_lose_nothing(path):
    def write(first: int) -> None:
        for number in range(50):
            file.add(path, HERE, some(1, first=first + number))

    for pid in [child(lambda first=first: write(first)) for first in (0, 100)]:
        assert os.waitpid(pid, 0)[1] == 0
    assert set(in_the_file(path).machines[HERE]) == {*some(50), *some(50, first=100)}
    assert sorted(it.name for it in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_lock_of_a_process_that_is_dead_holds_nobody_up(path, monkeypatch):
    monkeypatch.setattr(file, "PATIENCE", 0)  # who has to wait gives up at once

    def hold() -> None:
        with file._alone(path):
            path.with_name("held").touch()
            time.sleep(600)

    pid = child(hold)
    while not path.with_name("held").exists():
        time.sleep(0.01)
    with open(f"{path}.lock", "ab") as lock:
        assert not file._locked(lock)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(f"{path}.lock", "ab") as lock:
        assert file._locked(lock)


def test_one_that_holds_the_lock_for_ever_costs_patience_and_no_more(path, monkeypatch):
    monkeypatch.setattr(file, "PATIENCE", 0.01)
    with file._alone(path):
        assert file.add(path, HERE, some(1)) and in_the_file(path) == order.table()


@pytest.mark.parametrize("why", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.skipif(file.fcntl is None, reason="Windows has another function")
def test_a_disk_without_locks_holds_nobody_up(why, path, monkeypatch):
    def flock(lock, how):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(file.fcntl, "flock", flock)
    monkeypatch.setattr(file, "PATIENCE", 600)
    assert file.add(path, HERE, some(1)) and in_the_file(path) == order.table()


def test_windows_has_another_lock(path, monkeypatch):
    """Played: the module of another system, whose lock of a byte says that another has it, and then does not."""
    answers = [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EDEADLK, "Resource deadlock avoided")]
    locked = []

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, how, count):
            if answers:
                raise answers.pop()
            locked.append((how, count))

    monkeypatch.setattr(file, "fcntl", None)
    monkeypatch.setattr(file, "msvcrt", Msvcrt, raising=False)
    assert file.add(path, HERE, some(1)) and in_the_file(path) == order.table()
    assert locked == [(2, 1)]


# ----------------------------------------------------------------------------------------------- what cannot be written


def not_kept(path, caplog, why: str) -> None:
    """A finding is gone by, one line says why it is not kept, and twice is said once."""
    for number in range(2):
        assert not file.add(path, HERE, some(1, first=number)) and order.table().found(HERE, calls(number))
    assert lines(caplog) == [f"[subquad] what was measured is not kept: {path.name} cannot be written ({why})"]


@pytest.mark.parametrize(
    "content", [b'{"CLIP_stop_at_last_layers": 2}', b"once upon a time", b"\xff\x00", b'{"format": 99}']
)
def test_a_file_of_another_program_stays_as_it_is(tmp_path, caplog, content):
    """Whoever names one for a table has made a mistake."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert file.read(path) == Table()
    order.go_by(Table())
    assert file.forget(path) is False and file.forget(path, HERE) is False and file.add(path, HERE, some(1)) is False
    assert path.read_bytes() == content
    assert "is no file of measurements, and stays as it is" in lines(caplog)[-1]


def test_where_there_is_nothing_to_forget_nothing_is_written(path):
    order.go_by(Table())
    assert file.forget(path) and file.forget(path, HERE) and not list(path.parent.iterdir())
    path.write_text("broken", encoding="utf-8")
    assert file.forget(path) and path.read_text(encoding="utf-8") == "broken"


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(function, path, monkeypatch, caplog):
    file.add(path, HERE, some(1))
    before = path.read_bytes()

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    if function == "write":
        monkeypatch.setattr(Table, "to_json", full)  # what is written where it is written
    else:
        monkeypatch.setattr(os, function, full)
    not_kept(path, caplog, "No space left on device")
    assert path.read_bytes() == before
    assert sorted(it.name for it in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_disk_that_is_really_full(path, monkeypatch, caplog):
    file.add(path, HERE, some(1))
    before, opened = path.read_bytes(), open

    def on_a_full_disk(name, mode="r", **keywords):
        return opened("/dev/full", "wb", **keywords) if mode == "xb" else opened(name, mode, **keywords)

    monkeypatch.setattr(whole, "open", on_a_full_disk, raising=False)
    not_kept(path, caplog, "No space left on device")
    assert path.read_bytes() == before


def test_windows_lets_nobody_replace_a_file_that_is_read(path, monkeypatch, caplog):
    replace, refusals = os.replace, [PermissionError(errno.EACCES, "Access is denied")] * 3

    def while_it_is_read(*arguments):
        if refusals:
            raise refusals.pop()
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", while_it_is_read)
    assert file.add(path, HERE, some(1)) and in_the_file(path) == order.table()
    refusals += [PermissionError(errno.EACCES, "Access is denied")] * 10**6
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert not file.add(path, HERE, some(1, first=1))
    assert lines(caplog) == [
        f"[subquad] what was measured is not kept: {path.name} cannot be written (Access is denied)"
    ]
    assert list(path.parent.glob("*.tmp")) == []


@pytest.mark.skipif(sys.platform == "win32" or os.name == "posix" and os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written(path, caplog):
    os.chmod(path.parent, 0o500)
    try:
        not_kept(path, caplog, "Permission denied")
    finally:
        os.chmod(path.parent, 0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can make a file")
def test_a_folder_in_which_no_file_can_be_made(caplog):
    not_kept(Path("/proc") / file.NAME, caplog, "No such file or directory")
    assert not list(Path("/proc").glob(f"{file.NAME}*"))


def test_a_folder_that_is_a_file(tmp_path, caplog):
    (tmp_path / "folder").write_text("a file", encoding="utf-8")
    path = tmp_path / "folder" / file.NAME
    assert not file.add(path, HERE, some(1)) and len(lines(caplog)) == 1
    assert file.read(path) == Table()


def test_what_cannot_be_read_for_a_moment_is_not_written_anew(path, monkeypatch, caplog):
    """A scanner of viruses holds it, or the disk fails."""
    file.add(path, HERE, some(3))
    before, opened = path.read_bytes(), open

    def held(name, mode="r", **keywords):
        if mode == "rb":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, mode, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(file, "open", held, raising=False)
        assert file.read(path) == Table()
        assert not file.add(path, HERE, some(1, first=7))
    assert path.read_bytes() == before and len(lines(caplog)) == 2
    assert file.add(path, HERE, some(1, first=8)) and len(in_the_file(path).machines[HERE]) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe in a folder")
def test_a_pipe_is_not_waited_for(path, caplog):
    os.mkfifo(path)
    assert file.load(path) == Table() and "it is no file" in lines(caplog)[0]


# ------------------------------------------------------------------------------------------------------ hostile tables


def test_a_file_of_a_gigabyte_is_not_read_whole(path, caplog):
    with open(path, "wb") as hole:
        hole.truncate(1 << 30)
    assert file.load(path) == Table()
    path.unlink()
    assert len(lines(caplog)) == 1 and "it is larger than" in lines(caplog)[0]


SEED = json.loads(
    Table()
    .with_found(order.machine(CPU), {class_of(PROBLEM): Found(order.names()[-1], 64, 64, 2.0)})
    .with_found(HERE, some(2))
    .to_json()
)
ODD = [
    None, True, False, 0, -1, 1, 2, 63, 64, 10**6, 2**63, -(2**70), 10**300, 0.5, 1e308, float("inf"), float("nan"), "",
    "sage", "automatic", "../../etc/passwd", "C:\\Users\\somebody", "\x00", "a\nb\r\x1b[2J", "\ud800", "\u202e",
    "x" * 5000, [], {}, [[]], {"": {}}, [None] * 20, "1", "float16", "none", "portable", "fused",
]  # fmt: skip


def steps(node, path=()):
    """Where something is, in all of a JSON's tree."""
    yield path
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from steps(inner, (*path, key))


def mutated(dice: random.Random) -> str:
    """A good table of which a few things are odd."""
    tree = json.loads(json.dumps(SEED))
    for _ in range(dice.randint(1, 3)):
        if not (ways := list(steps(tree))[1:]):
            break
        *way, last = dice.choice(ways)
        at = tree
        for step in way:
            at = at[step]
        what = dice.randrange(4)
        if what == 0 and isinstance(at, dict):
            del at[last]
        elif what == 1 and isinstance(at, list):
            at += [at[last]] * dice.choice((1, 20, 300))
        else:
            at[last] = copy.deepcopy(dice.choice(ODD))
    return json.dumps(tree, ensure_ascii=dice.random() < 0.7)


def deep(dice: random.Random) -> str:
    brackets = dice.choice(("[]", '{"a":|}'.split("|")))
    depth = dice.choice((10, 900, 1100, 5000))
    return brackets[0] * depth + dice.choice(("", "1", "null")) + brackets[1] * dice.choice((depth, depth - 1, 0))


def hostile(dice: random.Random) -> bytes:
    good = json.dumps(SEED)
    kind = dice.randrange(20)
    if kind < 2:
        return dice.randbytes(dice.randrange(200))
    if kind < 5:  # bytes of a good one
        content = bytearray(good.encode())
        for _ in range(dice.randint(1, 5)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        return bytes(content)
    if kind < 6:
        return good.encode()[: dice.randrange(len(good))]
    if kind < 7:
        return deep(dice).encode()
    if kind < 8:  # the same name twice
        return good.replace('"format"', f'"format": {dice.choice((1, 2, "[]"))}, "format"', 1).encode()
    if kind < 9:
        return good.replace("64", "9" * dice.choice((5, 21, 5000)), 1).encode(
            dice.choice(("utf-8", "utf-16", "utf-8-sig"))
        )
    return mutated(dice).encode("utf-8", "surrogatepass")


def test_hostile_tables_change_nothing_but_a_line_in_the_log(path, caplog):
    caplog.set_level(logging.WARNING, logger="subquad")
    dice = random.Random(15)
    arguments = (SHAPE, SHAPE, SHAPE, torch.float32, "cpu")
    by_rules = plan(*arguments)
    refused = taken = 0
    for _ in range(EXAMPLES):
        path.write_bytes(hostile(dice))
        caplog.clear()
        file._warn_once.cache_clear()
        held = file.load(path)
        made = plan(*arguments)
        if said := lines(caplog):
            refused += 1
            assert held == Table() and made == by_rules
            assert len(said) == 1 and said[0].isprintable() and len(said[0]) < 300 and str(path.parent) not in said[0]
            continue
        taken += 1
        assert Table.from_json(held.to_json()) == held
        assert order.named(made.engine).EXACT
        found = order.found(PROBLEM)
        if found is None or found.margin <= 1:
            assert made == by_rules
        else:  # what an honest file may say as well
            assert made.engine in (found.engine, by_rules.engine)
            assert min(made.query_chunk, made.kv_chunk) >= SMALLEST_CHUNK
    assert refused > EXAMPLES / 2 and taken > EXAMPLES / 50


def test_a_table_of_whatever_tile_gives_the_right_result(path, reference):
    dice, given = random.Random(0), torch.randn(3, *SHAPE)
    for _ in range(50):
        tile = (dice.choice((0, 64, 65, 4096, 16384)) for _ in range(2))
        file.add(path, order.machine(CPU), {class_of(PROBLEM): Found(dice.choice(order.names()), *tile, 1e6)})
        found = attention(*given, settings=Settings())
        torch.testing.assert_close(found.double(), reference(*given), atol=1e-5, rtol=0)

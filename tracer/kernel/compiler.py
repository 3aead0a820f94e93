"""From bpf/ to instructions: bcc compiles, and what it made may be kept for the next start.

Runs in the loader child only, as bcc maps LLVM (about 150 MB, never given back). What differs from run to run (map
descriptors, the node's namespace, ...) is not compiled in: the instructions hold symbols for it, which
`tracer.kernel.symbols` replaces. So they depend on the sources, the compiler, the kernel's layout and the options that
are -D switches, and a file of them may be used again for as long as those are the same.
"""

import hashlib
import importlib.util
import json
import os
import stat
from pathlib import Path
from typing import Any

from tracer.errors import TracerError
from tracer.kernel import btf, symbols

#: The functions of bpf/tracer.c.
PROGRAMS = (
    "socket_state",
    "socket_state_again",
    "socket_destroyed",
    "socket_released",
    "conntrack_events",
    "bpf_iter__tcp",
    "bpf_iter__udp",
    "connect_enters",
    "connect_exits",
)


def source_directory() -> Path:
    """Where bpf/ is: inside the installed package, or beside it in a source tree.

    Raises:
        TracerError: neither.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "tracer.c").is_file():
            return candidate
    raise TracerError(f"The BPF sources were not found beside {package}: install vip-tracer again.")


def flags(switches: dict[str, int]) -> list[str]:
    """Compiler flags for bpf/tracer.c.

    Raises:
        TracerError: the kernel lacks a field that the programs read.
    """
    constants = {**btf.defines(), **symbols.defines(), **switches}
    return [
        f"-I{source_directory()}",
        "-DCONFIG_BPF_SYSCALL=1",
        "-DPAGE_SIZE=4096",  # bcc's headers want one; nothing here uses it
        "-Wno-everything",  # bcc's own headers, compiled without a kernel tree; ours are linted by clang itself
        *(f"-D{name}={value}" for name, value in sorted(constants.items())),
    ]


def programs(switches: dict[str, int], cache: Path | None) -> dict[str, bytes]:
    """The instructions of each of `PROGRAMS`, with symbols in them.

    Args:
        switches: the options that the sources ask for by #if, by name.
        cache: a directory of this user's, where compiled programs are kept; None: compile.

    Raises:
        TracerError: no bcc, no BTF, sources that do not compile, a cache that others may write to.
    """
    arguments = flags(switches)
    if cache is None:
        return _compile(arguments)
    kept = _private(cache) / f"{_key(arguments)}.programs"
    found = _read(kept)
    if found is None:
        found = _compile(arguments)
        _write(kept, found)
    return found


def _compile(arguments: list[str]) -> dict[str, bytes]:
    os.environ["BCC_KERNEL_SOURCE"] = str(source_directory())
    bcc = _import_bcc()
    try:
        module = bcc.BPF(src_file=bytes(source_directory() / "tracer.c"), cflags=arguments)
        return {name: module.dump_func(name.encode()) for name in PROGRAMS}
    except Exception as error:  # bcc raises nothing narrower
        raise TracerError(f"The BPF programs could not be compiled: {error}. See 'vip-tracer doctor'.") from error


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise TracerError(
            f"BPF's Python bindings cannot be imported ({error}): install them with "
            "'apt-get install python3-bpfcc' and run vip-tracer with the system's Python or a venv made with "
            "--system-site-packages (PyPI's 'bcc' is something else)."
        ) from error
    if not hasattr(bcc, "BPF"):
        raise TracerError(
            "The module 'bcc' that Python finds is not BPF's: 'pip uninstall bcc; apt-get install python3-bpfcc'."
        )
    return bcc


def _key(arguments: list[str]) -> str:
    """What the instructions depend on, as a file name."""
    directory = source_directory()
    digest = hashlib.sha256("\0".join(flag for flag in arguments if not flag.startswith("-I")).encode())
    files = sorted(path for path in directory.rglob("*.[ch]"))
    compiler = importlib.util.find_spec("bcc")
    if compiler is not None and compiler.origin is not None:  # its version is in a module of its own
        files += sorted(Path(compiler.origin).parent.glob("version.py"))
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def _private(cache: Path) -> Path:
    """The directory, made if need be. What lies in it is loaded into the kernel, so nobody else may write there."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
    except OSError as error:
        raise TracerError(
            f"Compiled programs cannot be kept in {cache} ({error.strerror}): choose another directory, or none."
        ) from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise TracerError(
            f"Others may write to {cache}, and what lies there is loaded into the kernel: choose a directory of your "
            "own for compiled programs, or 'chmod go-w' it."
        )
    return cache


def _read(path: Path) -> dict[str, bytes] | None:
    """What was kept; None if it was not, or not wholly."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(body).hexdigest().encode():
        return None
    return {name: bytes.fromhex(text) for name, text in json.loads(body).items()}


def _write(path: Path, instructions: dict[str, bytes]) -> None:
    body = json.dumps({name: code.hex() for name, code in instructions.items()}).encode()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise TracerError(
            f"Compiled programs cannot be kept in {path.parent} ({error.strerror}): free space there, choose another "
            "directory, or none."
        ) from error

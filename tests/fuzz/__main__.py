"""Coverage-guided fuzzing of all targets, one after the other: ``make fuzz``.

    FUZZ_SECONDS=3600 python -m tests.fuzz [TARGET...]

Each target is a process of its own, so that a crash of native code is a finding like any other. What it found out on
the way stays in build/fuzz/<target>/ for the next time. An input that broke something is said, and kept there as
crash-*: put it into tests/fuzz/corpus/<target>/ when it is mended. Exit code 1 if there was any.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.targets import TARGETS, examples

BUILD = Path(__file__).resolve().parents[2] / "build" / "fuzz"
#: The longest input, and how long one may take.
BYTES, SECONDS = 8192, 25


def follow(name: str) -> None:
    """In the child: never returns."""
    import atheris

    with atheris.instrument_imports(include=["tracer"], enable_loader_override=False):
        for module in sorted(Path(__file__).resolve().parents[2].glob("tracer/[!_]*/*.py")):
            if module.parent.name in ("kernel", "naming", "store", "cli"):
                __import__(f"tracer.{module.parent.name}.{module.stem}".removesuffix(".__init__"))
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


def fuzz(name: str, seconds: int) -> bool:
    """Runs one target for so long; false if it broke."""
    corpus = BUILD / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(examples(name)):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-max_len={BYTES}", f"-timeout={SECONDS}", "-rss_limit_mb=1500"]
    options += [f"-artifact_prefix={corpus}/", "-print_final_stats=1", "-verbosity=0"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options, str(corpus)],
        cwd=BUILD.parents[1],
        env={**os.environ, "VIP_TRACER_FUZZ_TARGET": name},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    runs = [line.split()[-1] for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    print(f"{name:<10} {(runs or ['?'])[0]:>10} runs  {'ok' if done.returncode == 0 else 'BROKEN'}", flush=True)
    if done.returncode:
        print(done.stdout[-6000:] + done.stderr[-6000:], flush=True)
    return done.returncode == 0


def main() -> None:
    child = os.environ.get("VIP_TRACER_FUZZ_TARGET")
    if child:
        follow(child)
    names = sys.argv[1:] or list(TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        sys.exit(f"No such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}.")
    seconds = max(1, int(os.environ.get("FUZZ_SECONDS", "3600")) // len(names))
    broken = [name for name in names if not fuzz(name, seconds)]
    if broken:
        sys.exit(f"Broken: {', '.join(broken)}.")


if __name__ == "__main__":
    main()

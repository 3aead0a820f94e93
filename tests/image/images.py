"""Images built from deploy/Dockerfile by podman, on a base that debootstrap makes, and containers of them.

No registry is asked for the base. Everything podman keeps is in one directory, which `close` empties and unmounts.
"""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/base:latest"
#: What Debian's slim images leave out.
_SLIM = ("path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/doc/*",
         "path-include=/usr/share/doc/*/copyright")  # fmt: skip
_HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"
#: Where this machine's certificates are seen while an image is built.
_CERTIFICATES = "/run/certificates.pem"
#: The parent of its containers' cgroups. runc, as crun 1.8 does not take a mixture of cgroup versions.
_CGROUP = "vip-tracer-image-test"
#: What podman makes wherever its storage is.
_FIXED = Path("/dev/shm/libpod_lock"), Path("/var/lib/containers/cache")


class Images:
    """Podman with a storage of its own, below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made = [path for path in _FIXED if not path.exists()]
        self._podman = [
            "podman", "--root", str(directory / "storage"), "--runroot", str(directory / "run"),
            "--tmpdir", str(directory / "tmp"), "--runtime", "runc", "--storage-driver", "overlay",
            "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--log-level", "error",
        ]  # fmt: skip

    def __call__(self, *arguments: str | Path, timeout: float = 120) -> str:
        """A podman command's output; AssertionError with what it said if it fails."""
        done = self._done(self.command(*arguments), timeout)
        assert done.returncode == 0, f"podman {arguments[0]}: {(done.stdout + done.stderr)[-3000:]}"
        return done.stdout

    def command(self, *arguments: str | Path) -> list[str]:
        """The words of a podman command."""
        return [*self._podman, *map(str, arguments)]

    def make_base(self) -> None:
        """Debian, as small as its slim image, from its archive by this machine's own configuration."""
        tar = self.directory / "base.tar"
        options = [f"--dpkgopt={option}" for option in _SLIM]
        made = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=usr-is-merged", f"--hook-dir={_HOOKS}"]
        done = self._done([*made, *options, "bookworm", str(tar)], 600)
        assert done.returncode == 0, done.stderr[-3000:]
        self("import", tar, BASE, timeout=300)
        tar.unlink()

    def build(self, target: str, tag: str) -> None:
        """One target of the Dockerfile. pip is configured as it is on this machine."""
        with_pip: list[str] = []
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            config = self.directory / "pip.conf"
            config.write_text(f"[global]\ncert = {_CERTIFICATES}\n")
            with_pip = ["--volume", f"{config}:/etc/pip.conf:ro", "--volume", f"{certificates}:{_CERTIFICATES}:ro"]
        self(
            "build", "--isolation", "chroot", "--network", "host", *with_pip, "--build-arg", f"BASE={BASE}",
            "--file", ROOT / "deploy" / "Dockerfile", "--target", target, "--tag", tag, ROOT, timeout=1200,
        )  # fmt: skip

    def describe(self, tag: str) -> dict[str, Any]:
        """What podman knows of an image."""
        (found,) = json.loads(self("image", "inspect", tag))
        return dict(found)

    def run(
        self,
        tag: str,
        pod: Mapping[str, Any],
        container: Mapping[str, Any],
        variables: Mapping[str, str],
        mounts: Mapping[str, Path],
        network: str = "none",
    ) -> list[str]:
        """The command that runs a container as a kubelet would by this specification, in the foreground.

        `mounts`: the directory for each of its volumes, by name. `network` stands for the host's, as podman has it.
        """
        security = container["securityContext"]
        command = [network if word == "none" else word for word in self.plain()]
        command += ["--user", f"{security['runAsUser']}:{security['runAsGroup']}"]
        command += ["--pid", "host"] if pod.get("hostPID") else []
        if security.get("privileged"):
            command += ["--privileged"]
        for capability in security.get("capabilities", {}).get("drop", []):
            command += ["--cap-drop", capability]
        for capability in security.get("capabilities", {}).get("add", []):
            command += ["--cap-add", capability]
        if security.get("allowPrivilegeEscalation") is False:
            command += ["--security-opt", "no-new-privileges"]
        if security["readOnlyRootFilesystem"]:
            command += ["--read-only", "--read-only-tmpfs=false"]
        command += ["--memory", container["resources"]["limits"]["memory"].lower().removesuffix("i")]
        for name, value in variables.items():
            command += ["--env", f"{name}={value}"]
        for mount in container["volumeMounts"]:
            if mount["name"] in mounts:
                command += ["--volume", f"{mounts[mount['name']]}:{mount['mountPath']}"]
        program, *own = container.get("command", ["vip-tracer"])
        return self.command(*command, "--entrypoint", program, tag, *own)

    def plain(self, *arguments: str) -> list[str]:
        """The words that run a container without a network, in the foreground."""
        return ["run", "--rm", *_limits(), "--cgroup-parent", f"/{_CGROUP}", "--network", "none", *arguments]

    def close(self) -> None:
        """Ends its containers; unmounts and removes all that it kept."""
        for arguments in (("rm", "--all", "--force", "--time", "0"), ("image", "umount", "--all")):
            subprocess.run(self.command(*arguments), capture_output=True, check=False, timeout=120)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for where in reversed([mount for mount in mounts if Path(mount).is_relative_to(self.directory)]):
            subprocess.run(["umount", where], check=True)
        for made in Path("/sys/fs/cgroup").glob(f"**/{_CGROUP}"):
            for inside in made.glob("*/"):  # conmon's
                inside.rmdir()
            made.rmdir()
        shutil.rmtree(self.directory)
        for path in self._made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _done(self, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Without what systemd or a user's session says of where podman keeps things; with its temporary files here."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "CONTAINER", "STORAGE"))}
        kept["TMPDIR"] = str(self.directory)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=kept)


def _limits() -> list[str]:
    """Below those of this process: to raise them, as podman would, takes a privilege that some machines are without."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]

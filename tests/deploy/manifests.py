"""The manifests as an operator applies them: files as they are, overlays as kubectl builds them."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

Raw = dict[str, Any]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = ("daemonset.yaml", "compact-and-report.yaml")
OVERLAYS = ("base", "least-privilege")


@functools.cache
def text(name: str) -> str:
    """A file's text, or what kubectl makes of a kustomization."""
    if name.endswith(".yaml"):
        return (DEPLOY / name).read_text(encoding="utf-8")
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", DEPLOY / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def documents(name: str) -> list[Raw]:
    """Every object of it."""
    return [document for document in yaml.safe_load_all(text(name)) if document is not None]


def one(name: str, kind: str) -> Raw:
    """Its only object of a kind."""
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def container(name: str, which: str) -> Raw:
    """A container of its DaemonSet."""
    pod = one(name, "DaemonSet")["spec"]["template"]["spec"]
    (found,) = (made for made in pod["containers"] if made["name"] == which)
    return found


def pods(name: str) -> dict[str, Raw]:
    """Every pod's specification, by the name of what makes it."""
    found = {}
    for document in documents(name):
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            found[document["metadata"]["name"]] = spec["template"]["spec"]
    return found


def variables(name: str, made: Raw) -> dict[str, str]:
    """A container's environment; what only a cluster can tell is empty."""
    found: dict[str, str] = {}
    for source in made.get("envFrom", []):
        if "configMapRef" in source:
            (config,) = (
                document
                for document in documents(name)
                if document["kind"] == "ConfigMap" and document["metadata"]["name"] == source["configMapRef"]["name"]
            )
            found |= config["data"]
    return found | {entry["name"]: entry.get("value", "") for entry in made.get("env", [])}

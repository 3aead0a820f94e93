"""The manifests fit Kubernetes' schemas, and the program: each option, right and file that they name is there."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
from deploy.manifests import DEPLOY, FILES, OVERLAYS, container, documents, one, pods, text, variables

from tracer.cli import main
from tracer.kernel.handover import TIMEOUT_S
from tracer.naming.api import PATHS

EVERYTHING = FILES + OVERLAYS
PODS = [(name, owner) for name in EVERYTHING for owner in pods(name)]
CONTAINERS = [(name, owner, made["name"]) for name, owner in PODS for made in pods(name)[owner]["containers"]]
#: Variables of the manifests that are no options.
OTHERS = {"DESTINATION"}


def the(name: str, owner: str, which: str) -> dict[str, Any]:
    (found,) = (made for made in pods(name)[owner]["containers"] if made["name"] == which)
    return found


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_every_object_fits_the_real_schemas(name: str, version: str) -> None:
    # A field that a version does not know is an error too. The overlay needs 1.30, for appArmorProfile.
    oldest = "1.30" if name == "least-privilege" else "1.27"
    wanted = oldest if version == "oldest" else kubernetes_validate.latest_version()
    for document in documents(name):
        kubernetes_validate.validate(document, wanted, strict=True)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_validation_sees_what_is_wrong(name: str) -> None:
    for spoil in ({"spec": {"nonsense": 1}}, {"metadata": {"name": 1}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(documents(name)[-1] | spoil, "1.30", strict=True)


def options(command: str) -> dict[str, click.Option]:
    """The command's options by variable."""
    found = {}
    for option in main.commands[command].params:
        if isinstance(option, click.Option):
            found[f"VIP_TRACER_{command}_{option.name}".upper()] = option
            if isinstance(option.envvar, str):
                found[option.envvar] = option
    return found


def call(made: dict[str, Any]) -> list[str]:
    """The arguments that a container gives to vip-tracer: by itself, or through a shell."""
    command = made.get("command", [])
    if command[:2] == ["/bin/sh", "-c"]:
        said = command[2]
        subprocess.run(["/bin/sh", "-n", "-c", said], check=True)
        _, found, arguments = said.partition("exec vip-tracer ")
        assert found, said
        return shlex.split(arguments)
    assert command in ([], ["vip-tracer"])
    return list(made["args"])


@pytest.mark.parametrize(("name", "owner", "which"), CONTAINERS)
def test_every_argument_and_variable_of_a_container_is_an_option(name: str, owner: str, which: str) -> None:
    made = the(name, owner, which)
    given = variables(name, made)
    command, *arguments = [
        re.sub(r"\$\{([A-Z_]+):\?.*\}", lambda at: f"of {given[at[1]]}", word) for word in call(made)
    ]
    known = options(command)
    every = {variable for each in main.commands for variable in options(each)}
    assert set(given) - every - OTHERS == set()
    mine = {variable: value for variable, value in given.items() if variable in known}
    # As click reads them, with their types.
    context = click.Context(main.commands[command], info_name=command)
    for variable, value in mine.items():
        if value:
            known[variable].type_cast_value(context, value)
    missing = [option.opts[0] for variable, option in known.items() if option.required and variable not in given]
    assert all(any(word == option or word.startswith(f"{option}=") for word in arguments) for option in missing)
    values, left, _ = main.commands[command].make_parser(context).parse_args(arguments)
    assert left == []
    for param in main.commands[command].params:
        if isinstance(param, click.Option) and isinstance(values.get(param.name), str):
            param.type_cast_value(context, values[param.name])


def test_the_agents_rights_are_what_it_asks_for() -> None:
    """That it asks for these and no others: tests/deploy/test_rights.py."""
    role = one("daemonset.yaml", "ClusterRole")
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == set(PATHS)
    for rule in role["rules"]:
        (group,), (resource,) = rule["apiGroups"], rule["resources"]
        assert PATHS[resource].startswith(f"/apis/{group}/" if group else "/api/")
        assert rule["verbs"] == ["list", "watch"]
    binding = one("daemonset.yaml", "ClusterRoleBinding")
    account = one("daemonset.yaml", "ServiceAccount")["metadata"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    assert pods("daemonset.yaml")["vip-tracer"]["serviceAccountName"] == account["name"]


@pytest.mark.parametrize("name", ["daemonset.yaml", *OVERLAYS])
def test_the_privileged_container_has_no_credentials_and_the_exporter_no_privilege(name: str) -> None:
    agent, export = container(name, "agent"), container(name, "export")
    assert not any("secretRef" in source for source in agent.get("envFrom", []))
    assert not any("secretKeyRef" in entry.get("valueFrom", {}) for entry in agent["env"])
    volumes = {volume["name"]: volume for volume in pods(name)["vip-tracer"]["volumes"]}
    mounted = {made["name"]: {mount["name"] for mount in made["volumeMounts"]} for made in (agent, export)}
    assert {which for which, volume in volumes.items() if "hostPath" in volume} == {"data"}
    assert mounted["agent"] & mounted["export"] == {"data"}
    assert "api" in mounted["agent"]
    assert mounted["agent"] | mounted["export"] == set(volumes)
    security = export["securityContext"]
    assert security["runAsNonRoot"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not security["allowPrivilegeEscalation"]
    assert not pods(name)["vip-tracer"]["automountServiceAccountToken"]
    assert agent["securityContext"]["runAsGroup"] == security["runAsGroup"]


@pytest.mark.parametrize(("name", "owner", "which"), CONTAINERS)
def test_every_container_is_bounded(name: str, owner: str, which: str) -> None:
    made, pod = the(name, owner, which), pods(name)[owner]
    assert made["securityContext"]["readOnlyRootFilesystem"]
    assert pod["enableServiceLinks"] is False
    assert {"memory"} <= set(made["resources"]["limits"])
    assert {"memory", "cpu"} <= set(made["resources"]["requests"])
    assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
    if which != "agent":
        assert made["securityContext"]["runAsNonRoot"]
        assert made["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_agent_is_waited_for() -> None:
    """A start may take as long as the loader is waited for; then the agent says itself what is wrong."""
    agent = container("daemonset.yaml", "agent")
    probe = agent["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > TIMEOUT_S
    ports = {port["name"]: port["containerPort"] for port in agent["ports"]}
    listens = variables("daemonset.yaml", agent)["VIP_TRACER_AGENT_LISTEN"]
    for which in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert listens.endswith(f":{ports[agent[which]['httpGet']['port']]}")


def test_the_pod_is_given_longer_than_the_exporter_takes_to_end() -> None:
    (grace,) = (option for option in main.commands["export"].params if option.name == "grace")
    context = click.Context(main.commands["export"], info_name="export")
    seconds = grace.type_cast_value(context, grace.get_default(context))
    assert pods("daemonset.yaml")["vip-tracer"]["terminationGracePeriodSeconds"] > 2 * seconds


def test_the_pod_monitor_finds_what_the_daemon_set_offers() -> None:
    """As the job that the alerts and the dashboard name."""
    (monitor,) = documents("alerts/podmonitor.yaml")
    template = one("daemonset.yaml", "DaemonSet")["spec"]["template"]
    labels, about = template["metadata"]["labels"], template["metadata"]["annotations"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert labels[monitor["spec"]["jobLabel"]] == "vip-tracer"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = {port["name"]: str(port["containerPort"]) for port in container("daemonset.yaml", "agent")["ports"]}
    assert ports[endpoint["port"]] == about["prometheus.io/port"]
    assert endpoint["path"] == about["prometheus.io/path"]


def test_the_overlay_changes_the_agents_security_alone() -> None:
    plain, least = documents("base"), documents("least-privilege")
    for document in (plain, least):
        for each in document:
            if each["kind"] == "DaemonSet":
                del each["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    assert plain == least
    assert container("base", "agent")["securityContext"]["privileged"]
    assert "privileged" not in container("least-privilege", "agent")["securityContext"]


def test_the_base_is_the_plain_file() -> None:
    """Whoever applies the file and whoever applies the kustomization have the same."""

    def key(document: dict[str, Any]) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(documents("base"), key=key) == sorted(documents("daemonset.yaml"), key=key)
    assert (DEPLOY / "daemonset.yaml").resolve() == DEPLOY / "base" / "daemonset.yaml"


def test_every_pod_has_the_images_of_the_dockerfile() -> None:
    said = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    tagged = set(re.findall(r"-t (\S+)", said))
    images = {made["image"] for name, owner in PODS for made in pods(name)[owner]["containers"]}
    assert images == tagged
    version = re.search(r'__version__ = "(.*)"', (DEPLOY.parent / "tracer" / "version.py").read_text())
    assert version is not None
    assert {image.rpartition(":")[2] for image in images} == {version[1]}


@pytest.mark.parametrize("path", [*sorted(DEPLOY.rglob("*.yaml"))], ids=lambda path: str(path.relative_to(DEPLOY)))
def test_what_the_comments_name_is_there(path: Path) -> None:
    named = re.findall(r"#.*?\b((?:docs|tests|deploy)/[\w./-]*\w)", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (DEPLOY.parent / name).exists()] == []
    assert "\t" not in text("daemonset.yaml")

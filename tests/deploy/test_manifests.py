"""The manifests in deploy/: valid for Kubernetes, and in keeping with our command line, server and image."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field

import atom_jax
from atom_jax.server.app import create_app
from atom_jax.server.service import Service
from atom_jax_cli import app
from tests.atom_jax.conftest import tokenizer  # noqa: F401
from tests.atom_jax.server.fake import FakeEngine, config, served

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
FOLDERS = ("one-gpu", "tensor-parallel", "multi-host", "gateway")
# preStop's sleep is there since 1.30.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
# What LeaderWorkerSet puts into the environment of a pod, in the second pod of a group of two.
GROUP = {"LWS_LEADER_ADDRESS": "atom-jax-0.atom-jax.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str
    labels: dict[str, str] = {}


class Reference(Strict):
    group: str
    kind: str
    name: str


class PoolReference(Strict):
    group: Literal["inference.networking.k8s.io"]
    name: str


class Listener(Strict):
    name: str
    port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["HTTP"]


class GatewaySpec(Strict):
    gatewayClassName: str
    listeners: list[Listener]


class PathValue(Strict):
    type: Literal["PathPrefix", "Exact"]
    value: Annotated[str, Field(pattern="^/")]


class RouteMatch(Strict):
    path: PathValue


class Timeouts(Strict):
    request: Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]


class RouteRule(Strict):
    matches: list[RouteMatch]
    backendRefs: list[Reference]
    timeouts: Timeouts


class RouteSpec(Strict):
    parentRefs: list[Reference]
    rules: list[RouteRule]


class Selector(Strict):
    matchLabels: dict[str, str]


class PortNumber(Strict):
    number: Annotated[int, Field(ge=1, le=65535)]


class PickerReference(Strict):
    name: str
    port: PortNumber
    failureMode: Literal["FailOpen", "FailClose"]


class PoolSpec(Strict):
    selector: Selector
    targetPorts: Annotated[list[PortNumber], Field(min_length=1, max_length=8)]
    endpointPickerRef: PickerReference


class ObjectiveSpec(Strict):
    priority: int
    poolRef: PoolReference


class RollingUpdate(Strict):
    maxSurge: int
    maxUnavailable: int


class RolloutStrategy(Strict):
    type: Literal["RollingUpdate"]
    rollingUpdateConfiguration: RollingUpdate


class LeaderWorkerTemplate(Strict):
    size: int
    restartPolicy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
    leaderTemplate: dict[str, Any]  # pod templates, which Kubernetes' own schema has
    workerTemplate: dict[str, Any]


class GroupSpec(Strict):
    replicas: int
    rolloutStrategy: RolloutStrategy
    startupPolicy: Literal["LeaderCreated", "LeaderReady"]
    leaderWorkerTemplate: LeaderWorkerTemplate


# The custom resources that we use, by hand: the fields that we set, as their definitions have them.
CUSTOM: dict[tuple[str, str], type[Strict]] = {
    ("gateway.networking.k8s.io/v1", "Gateway"): GatewaySpec,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): RouteSpec,
    ("inference.networking.k8s.io/v1", "InferencePool"): PoolSpec,
    ("llm-d.ai/v1alpha2", "InferenceObjective"): ObjectiveSpec,
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): GroupSpec,
}


def written(folder: str) -> list[dict]:
    """The objects in the files of a folder and of those that it builds on, without its patches."""
    kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    found = []
    for resource in kustomization["resources"]:
        path = FOLDER / folder / resource
        if path.is_dir():
            found += written(path.resolve().name)
        else:
            found += yaml.safe_load_all(path.read_text())
    return found


def rendered(folder: str) -> list[dict]:
    """The objects that ``kubectl apply -k`` would create."""
    command = ["kubectl", "kustomize", str(FOLDER / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def deployment(template: dict) -> dict:
    labels = template["metadata"]["labels"]
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}


def check(manifest: dict, version: str) -> None:
    spec = CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
    if spec is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    Metadata.model_validate(manifest["metadata"])
    checked = spec.model_validate(manifest["spec"])
    if isinstance(checked, GroupSpec):
        group = checked.leaderWorkerTemplate
        for template in (group.leaderTemplate, group.workerTemplate):
            kubernetes_validate.validate(deployment(template), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_are_valid(folder, version):
    for manifest in written(folder):
        check(manifest, version)


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_kubectl_renders_is_valid(folder):
    for manifest in rendered(folder):
        check(manifest, VERSIONS[-1])


def test_the_check_finds_faults():
    (good,) = (each for each in written("one-gpu") if each["kind"] == "Deployment")
    good["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        check(good, VERSIONS[0])


def pods(manifests: list[dict]) -> list[dict]:
    """The templates of all pods."""
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            found.append(manifest["spec"]["template"])
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            found += [group["leaderTemplate"], group["workerTemplate"]]
    return found


def servers(manifests: list[dict]) -> list[dict]:
    """The templates of the pods that run our image."""
    return [pod for pod in pods(manifests) if pod["spec"]["containers"][0]["image"].startswith("atom-jax:")]


def options(container: dict) -> dict[str, Any]:
    """The options of ``atom-jax serve`` in a container, read by our command line."""
    program, *arguments = (
        re.sub(r"\$\((\w+)\)", lambda name: GROUP[name[1]], each) for each in container["args"]
    )
    assert program == "serve"
    command = typer.main.get_group(app).commands["serve"]
    with command.make_context("serve", arguments) as context:
        return context.params


@pytest.mark.parametrize(
    "folder",
    [
        "one-gpu",
        pytest.param("tensor-parallel", marks=needs_kubectl),
        "multi-host",
    ],
)
def test_command_lines_are_ours(folder):
    manifests = rendered(folder) if folder == "tensor-parallel" else written(folder)
    for pod in servers(manifests):
        (container,) = pod["spec"]["containers"]
        found = options(container)
        assert found["host"] == "0.0.0.0"
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        assert ports.get("http", found["port"]) == found["port"]
        drain = found["drain_delay"] + found["drain_timeout"]
        assert found["drain_delay"] >= 10 and pod["spec"]["terminationGracePeriodSeconds"] >= drain + 10
        if "readinessProbe" not in container:  # a worker, which ends after its leader
            assert container["lifecycle"]["preStop"]["sleep"]["seconds"] >= drain


def test_drain_options_are_ours():
    """As above for all servers, without the options that are not there yet."""
    for folder in ("one-gpu", "multi-host"):
        for pod in servers(written(folder)):
            container = pod["spec"]["containers"][0]
            later = ("--tensor-parallel", "--coordinator-address", "--num-processes", "--process-id")
            known = [each for each in container["args"] if not each.startswith(later)]
            found = options(container | {"args": known})
            assert found["drain_delay"] == 15 and found["drain_timeout"] == 300 and found["port"] == 8000


@pytest.fixture(scope="module")
def routes(tokenizer):  # noqa: F811
    application = create_app(Service(config(), FakeEngine(), served(tokenizer)))
    return {getattr(route, "path", "") for route in application.routes}


@pytest.mark.parametrize("folder", ["one-gpu", "multi-host"])
def test_probes_are_routes_of_the_server(folder, routes):
    container = servers(written(folder))[0]["spec"]["containers"][0]
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
    }
    # A server that starts or drains is alive, but not ready.
    assert paths == {"startup": "/live", "liveness": "/live", "readiness": "/health"}
    assert set(paths.values()) <= routes
    named = {port["name"] for port in container["ports"]}
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} <= named


@pytest.mark.parametrize("folder", ["one-gpu", "multi-host"])
def test_pods_suit_the_image(folder):
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)
    cache, home = (re.findall(rf"{name}=(\S+)", dockerfile)[0] for name in ("XDG_CACHE_HOME", "HOME"))
    for pod in servers(written(folder)):
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert container["image"] == f"atom-jax:{atom_jax.__version__}"
        assert spec["securityContext"]["runAsUser"] == int(user) > 0
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in spec["volumes"]}
        assert not mounts[cache].get("readOnly") and not mounts[home].get("readOnly")
        assert Path(container["args"][1]).is_relative_to("/models") and mounts["/models"]["readOnly"]
        claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]} - {
            None
        }
        assert claims == {each["metadata"]["name"] for each in written("shared") if "Claim" in each["kind"]}


def test_selectors_find_the_servers():
    manifests = {
        (each["kind"], each["metadata"]["name"]): each["spec"]
        for each in written("gateway")
        if "spec" in each
    }
    service, budget = (written("shared")[index]["spec"] for index in (0, 1))
    pool = manifests["InferencePool", "atom-jax"]
    labels = service["selector"]
    assert labels == budget["selector"]["matchLabels"] == pool["selector"]["matchLabels"]
    for folder in ("one-gpu", "multi-host"):
        leader, *workers = servers(written(folder))
        assert labels.items() <= leader["metadata"]["labels"].items()
        assert not any(labels.items() <= worker["metadata"]["labels"].items() for worker in workers)
        ports = {port["name"]: port["containerPort"] for port in leader["spec"]["containers"][0]["ports"]}
        assert ports[service["ports"][0]["targetPort"]] == pool["targetPorts"][0]["number"]


def test_the_gateway_leads_to_the_pool_and_its_picker():
    manifests = {(each["kind"], each["metadata"]["name"]): each for each in written("gateway")}
    route = manifests["HTTPRoute", "atom-jax"]["spec"]
    for reference in (*route["parentRefs"], *(ref for rule in route["rules"] for ref in rule["backendRefs"])):
        target = manifests[reference["kind"], reference["name"]]
        assert target["apiVersion"].startswith(reference["group"])
    picker = manifests["InferencePool", "atom-jax"]["spec"]["endpointPickerRef"]
    service = manifests["Service", picker["name"]]["spec"]
    (pod,) = pods(list(manifests.values()))
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert [port["port"] for port in service["ports"]] == [picker["port"]["number"]]
    container = pod["spec"]["containers"][0]
    flags = dict(flag.split("=") for flag in container["args"])
    assert ("InferencePool", flags["--pool-name"]) in manifests
    assert (
        "InferencePool",
        manifests["InferenceObjective", "background"]["spec"]["poolRef"]["name"],
    ) in manifests
    generated = yaml.safe_load((FOLDER / "gateway" / "kustomization.yaml").read_text())["configMapGenerator"][
        0
    ]
    assert pod["spec"]["volumes"][0]["configMap"]["name"] == generated["name"]
    file = Path(flags["--config-file"])
    assert file.is_relative_to(container["volumeMounts"][0]["mountPath"]) and generated["files"] == [
        file.name
    ]
    weights = yaml.safe_load((FOLDER / "gateway" / file.name).read_text())
    named = {plugin["type"] for plugin in weights["plugins"]}
    assert {use["pluginRef"] for use in weights["schedulingProfiles"][0]["plugins"]} == named


def test_the_image_is_pinned_small_and_has_no_root(routes):
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*:", last, re.MULTILINE)
    assert all("--no-cache-dir" in line for line in text.splitlines() if "pip install" in line)
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", last)
    assert path in routes
    assert f"-t atom-jax:{atom_jax.__version__} " in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    context = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name}" for name in [*packages, "pyproject.toml", "README.md", "LICENSE"]} <= set(context)

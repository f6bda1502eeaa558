"""The manifests are what Kubernetes publishes its objects to be, fit together, and name commands that there are."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from skippipe_plugin.cli import _parser
from skippipe_plugin.engine.secret import SECRET_VARIABLE
from skippipe_plugin.sources.choose import WORKERS_VARIABLE, SourceName, make_source
from skippipe_plugin.sources.kubernetes import PORT, KubernetesSource

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
SCHEMAS = json.loads((Path(__file__).parent / "kubernetes-1.34.json").read_text())
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}


def schema_of(manifest: Any) -> dict[str, Any]:
    version = "io.k8s.api." + {"v1": "core.v1"}.get(manifest["apiVersion"], manifest["apiVersion"].replace("/", "."))
    name = f"{version.replace('networking.k8s.io', 'networking')}.{manifest['kind']}"
    return {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]}


def check(manifest: Any) -> None:
    jsonschema.Draft202012Validator(schema_of(manifest)).validate(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str) -> None:
    check(MANIFESTS[name])


@pytest.mark.parametrize("change", ['"replica": 3', '"replicas": "three"', '"template": {"spec": {"container": []}}'])
def test_the_schemas_find_mistakes(change: str) -> None:
    manifest = json.loads(json.dumps(MANIFESTS["workers"]))
    manifest["spec"] |= json.loads(f"{{{change}}}")
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def container(name: str) -> Any:
    (only,) = MANIFESTS[name]["spec"]["template"]["spec"]["containers"]
    return only


def test_workers_find_the_driver_through_the_service() -> None:
    service, labels = MANIFESTS["service"], MANIFESTS["driver"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels
    program, *arguments = container("workers")["command"]
    options = _parser().parse_args(arguments)
    assert (program, options.join) == ("skippipe", f"{service['metadata']['name']}:{PORT}")
    assert [port["port"] for port in service["spec"]["ports"]] == [PORT]


def test_all_pods_know_the_same_secret_and_run_the_same_image() -> None:
    secret = MANIFESTS["secret"]
    for name in ("driver", "workers"):
        variables = {each["name"]: each for each in container(name)["env"]}
        reference = variables[SECRET_VARIABLE]["valueFrom"]["secretKeyRef"]
        assert reference["name"] == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]
    assert container("driver")["image"] == container("workers")["image"]


def test_the_driver_takes_workers_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    (chosen,) = [each["value"] for each in container("driver")["env"] if each["name"] == WORKERS_VARIABLE]
    assert chosen in SourceName.__args__
    source = make_source(chosen)
    assert isinstance(source, KubernetesSource)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert source.open() == ("127.0.0.1", PORT)


def test_the_driver_claims_what_there_is() -> None:
    (volume,) = MANIFESTS["driver"]["spec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == MANIFESTS["checkpoints"]["metadata"]["name"]


def test_the_image_copies_files_that_there_are() -> None:
    lines = [line.split() for line in (FOLDER / "Containerfile").read_text().splitlines()]
    sources = [line[1] for line in lines if line[:1] == ["COPY"]]
    assert sources
    assert all((FOLDER.parents[1] / name).exists() for name in sources)

"""Validates deploy/: what kustomize makes of deploy/kubernetes, strictly against the schemas of Kubernetes; and the compose file's references.

    python tests/manifests.py KUSTOMIZE      needs the packages kubernetes-validate and pyyaml
"""

import pathlib
import subprocess
import sys

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent / "deploy"
VERSIONS = ["1.30", "1.33"]
EXPECTED = {
    ("StatefulSet", "aviary"), ("Service", "aviary"), ("Service", "aviary-data"), ("PodDisruptionBudget", "aviary"), ("Namespace", "aviary"),
    ("Deployment", "model-stable"), ("Deployment", "model-canary"), ("Service", "model-stable"), ("Service", "model-canary"),
    ("HorizontalPodAutoscaler", "model-stable"), ("HorizontalPodAutoscaler", "model-canary"),
}


def restricted(pod, name):
    """Checks what the restricted pod security standard asks for."""
    assert pod["securityContext"]["runAsNonRoot"] is True, name
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"]["drop"] == ["ALL"], (name, container["name"])


def kubernetes(kustomize):
    built = subprocess.run([kustomize, "build", ROOT / "kubernetes"], check=True, capture_output=True, text=True).stdout
    objects = list(yaml.safe_load_all(built))
    for item in objects:
        for version in VERSIONS:
            kubernetes_validate.validate(item, version, strict=True)
        if "template" in item.get("spec", {}):
            restricted(item["spec"]["template"]["spec"], item["metadata"]["name"])
    found = {(item["kind"], item["metadata"]["name"]) for item in objects}
    assert EXPECTED <= found, f"missing: {EXPECTED - found}"
    broken = next(item for item in objects if item["kind"] == "StatefulSet")
    broken["spec"]["replikas"] = 3
    try:
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)
    except kubernetes_validate.ValidationError:
        pass
    else:
        raise AssertionError("a key that Kubernetes doesn't know was not refused")
    return len(objects)


def compose():
    whole = yaml.safe_load((ROOT / "compose" / "compose.yaml").read_text())
    services = whole["services"]
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            assert other in services, f"{name} depends on {other}, which is none"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in whole["volumes"] or (ROOT / "compose" / source).exists(), f"{name}: no volume {source}"
    return len(services)


objects, services = kubernetes(sys.argv[1]), compose()
print(f"{objects} objects of Kubernetes valid, {services} services of compose consistent")

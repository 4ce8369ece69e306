"""The Kubernetes manifests of deploy/: valid by the published schemas, and run as they stand.

check.py OPTIN_PROXY HELM KUSTOMIZE

What a container would run is run here: its arguments, environment, user, probes, and volumes as folders.
"""

import copy
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
from waiting import free_port, until

PROGRAM, HELM, KUSTOMIZE = sys.argv[1:4]
DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"
APPLICATION = """
apiVersion: apps/v1
kind: Deployment
metadata: { name: shop, labels: { optin-proxy: sidecar } }
spec:
  selector: { matchLabels: { app: shop } }
  template:
    metadata: { labels: { app: shop } }
    spec:
      containers:
        - { name: application, image: "registry.example/shop:1", env: [{ name: OWN, value: kept }] }
"""


def kustomized(mode):
    """What an application's own kustomization becomes that names the component, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        shutil.copytree(DEPLOY / "kubernetes" / mode, place / "optin-proxy")
        (place / "shop.yaml").write_text(APPLICATION)
        (place / "kustomization.yaml").write_text("resources: [shop.yaml]\ncomponents: [optin-proxy]\n")
        built = subprocess.run([KUSTOMIZE, "build", place], check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(built))


def rendered(mode, *more):
    arguments = [HELM, "template", "shop", DEPLOY / "helm" / "optin-proxy", "--set", f"mode={mode}", *more,
                 "--set", "application.image=registry.example/shop:1", "--set", "podMonitor.enabled=true"]
    return list(yaml.safe_load_all(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))


def one(documents, kind):
    (found,) = [it for it in documents if it["kind"] == kind]
    return found


class Pod:
    """Runs a pod's own containers here: its paths are in a folder, its ports are free ones."""

    def __init__(self, documents, upstream, authority):
        self.spec = one(documents, "Deployment")["spec"]["template"]["spec"]
        config = one(documents, "ConfigMap")
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.folder.chmod(0o755)
        self.ports = {8080: free_port(), 9901: free_port()}
        self.upstream = {"OPTIN_PROXY_UPSTREAM__URL": upstream, "OPTIN_PROXY_UPSTREAM__CA_FILE": authority,
                         "OPTIN_PROXY_LISTEN__ADDRESS": f"127.0.0.1:{self.ports[8080]}"}
        self.volumes = {}
        for volume in self.spec["volumes"]:
            place = self.folder / volume["name"]
            place.mkdir()
            if "emptyDir" in volume:
                place.chmod(0o777)
            else:
                assert volume["configMap"] == {"name": config["metadata"]["name"]}
            self.volumes[volume["name"]] = place
        self.write_config(config["data"]["proxy.toml"], "first")

    def write_config(self, content, name):
        """As the kubelet does it: a folder of its own, and a link that is swapped."""
        place = self.volumes["optin-proxy-config"]
        (place / f"..{name}").mkdir()
        (place / f"..{name}" / "proxy.toml").write_text(content)
        (place / "..data_tmp").symlink_to(f"..{name}")
        (place / "..data_tmp").rename(place / "..data")
        if not (place / "proxy.toml").is_symlink():
            (place / "proxy.toml").symlink_to("..data/proxy.toml")

    def here(self, container, text):
        mounts = sorted(container.get("volumeMounts", []), key=lambda it: -len(it["mountPath"]))
        for mount in mounts:
            text = text.replace(mount["mountPath"], str(self.volumes[mount["name"]]))
        for port, free in self.ports.items():
            text = re.sub(rf"\b{port}\b", str(free), text)
        return text

    def environment(self, container):
        variables = {it["name"]: self.here(container, it["value"]) for it in container.get("env", [])}
        return {"PATH": os.environ["PATH"], **variables}

    def start(self, container, **more):
        context = container["securityContext"]
        assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        identity = {"user": context["runAsUser"], "group": context["runAsGroup"], "extra_groups": []} if os.getuid() == 0 else {}
        arguments = [self.here(container, argument) for argument in container["args"]]
        return subprocess.Popen([PROGRAM, *arguments], env={**self.environment(container), **self.upstream},
                                cwd="/", text=True, **identity, **more)

    def container(self, name):
        return next(it for it in self.spec["initContainers"] if it["name"] == name)

    def probe(self, container, kind):
        get = container[kind]["httpGet"]
        port = next(it["containerPort"] for it in container["ports"] if it["name"] == get["port"])
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=5)
        try:
            connection.request("GET", get["path"], headers={"Host": "10.1.2.3:9901"})
            return connection.getresponse().status == 200
        except OSError:
            return False


def check(documents, mode, simulator):
    for document in documents:
        if document["kind"] != "PodMonitor":
            kubernetes_validate.validate(document, "1.31", strict=True)
    upstream, authority = simulator
    pod = Pod(documents, upstream, authority)
    names = [it["name"] for it in pod.spec["initContainers"]]
    assert names == (["optin-proxy-trust"] if mode == "https-proxy" else []) + ["optin-proxy"], names
    if mode == "https-proxy":
        printed = pod.start(pod.container("optin-proxy-trust"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output = printed.communicate(timeout=30)[0]
        assert printed.returncode == 0
        # What the manifest says is what the program says.
        application = pod.spec["containers"][0]
        told = {it["name"]: it["value"] for it in yaml.safe_load(output)}
        given = pod.environment(application)
        assert {name: given.get(name) for name in told} == told, (told, given)
    sidecar = pod.container("optin-proxy")
    assert sidecar["restartPolicy"] == "Always"
    running = pod.start(sidecar, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: pod.probe(sidecar, "startupProbe"), sidecar["startupProbe"]["failureThreshold"])
    assert pod.probe(sidecar, "readinessProbe") and pod.probe(sidecar, "livenessProbe")

    application = pod.spec["containers"][0]
    assert application["name"] == "application"
    environment = pod.environment(application)
    base = environment.get("CONSTANT_CONTACT_URL") or "https://api.constantcontact.com"
    assert (mode == "base-url") == base.startswith("http://")
    contact = (pathlib.Path(__file__).parents[1] / "corpus/in/equal-copies.xml").read_text()
    contact = re.sub(r"lists/\d+", "lists/1", contact)
    url = f"{base}/ws/customers/joesflowers/contacts/1"
    asked = ["curl", "-sS", "-i", "-u", "APIKEY%joesflowers:secret", "-X", "PUT", "-H", "Content-Type: application/atom+xml",
             "--data-binary", contact, url]
    answer = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=30)
    assert "optin-proxy: findings=" in answer.stdout, (answer.stdout, answer.stderr)

    # The ConfigMap changes: broken, it changes nothing; whole, it is heeded.
    def mode_now():
        connection = http.client.HTTPConnection("127.0.0.1", pod.ports[9901], timeout=5)
        connection.request("GET", "/config")
        return json.load(connection.getresponse())["sanitize"]["mode"]

    pod.write_config("[sanitize]\nmode = ", "second")
    pod.write_config('[sanitize]\nmode = "observe"\n', "third")
    until(lambda: mode_now() == "observe")
    running.send_signal(signal.SIGTERM)
    log = running.communicate(timeout=pod.spec["terminationGracePeriodSeconds"])[1]
    assert running.returncode == 0, log
    assert '"message":"stopped"' in log
    shutil.rmtree(pod.folder)


def main():
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    authority = folder / "api.pem"
    simulator = subprocess.Popen([PROGRAM, "simulate", "--tls", "--listen", "127.0.0.1:0", "--ca-out", authority],
                                 stdout=subprocess.PIPE, text=True)
    try:
        port = re.search(r":(\d+)", simulator.stdout.readline()).group(1)
        authority.chmod(0o644)
        told = (f"https://localhost:{port}", str(authority))
        for mode in ("base-url", "https-proxy"):
            for documents in (kustomized(mode), rendered(mode)):
                check(copy.deepcopy(documents), mode, told)
        assert not [it for it in rendered("base-url", "--set", "networkPolicy.enabled=false") if it and it["kind"] == "NetworkPolicy"]
        wrong = subprocess.run([HELM, "template", "x", DEPLOY / "helm" / "optin-proxy", "--set", "mode=other",
                                "--set", "application.image=x"], capture_output=True, text=True)
        assert wrong.returncode != 0 and "neither base-url nor https-proxy" in wrong.stderr, wrong.stderr
    finally:
        simulator.terminate()
        shutil.rmtree(folder)
    print("the manifests are valid and run as they stand")


main()

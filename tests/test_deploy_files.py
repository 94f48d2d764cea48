"""The image, the manifests and the batch script: what can be checked without Docker, Kubernetes and Slurm."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer

import headwater as hw
from headwater.cli.serve import app

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "deploy" / "kubernetes" / "headwater.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()

yaml = pytest.importorskip("yaml", reason="needs PyYAML")


def documents():
    """By kind and name."""
    found = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def jobs():
    """By name: the job's spec, the pod's spec and its one container."""
    found = {}
    for one in documents()["JobSet", "headwater"]["spec"]["replicatedJobs"]:
        job = one["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        found[one["name"]] = (job, job["template"]["spec"], container)
    return found


def environment(container):
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


# ── Kubernetes ──────────────────────────────────────────────────────────────────────────────────


def test_every_variable_of_the_manifest_is_an_option_of_its_node():
    commands = typer.main.get_command(app).commands
    for name, (_, _, container) in jobs().items():
        options = {f"HEADWATER_{one.name.upper()}" for one in commands[name].params}
        told = {one for one in environment(container) if one.startswith("HEADWATER_")}
        assert told - options == {"HEADWATER_TOKEN"}, name
        assert container["args"][:2] == ["serve", name]
        values = [re.sub(r"^\$\(\w+\)$", "0", one) for one in container["args"][2:]]
        commands[name].make_context(name, ["--workers", "1", *values] if name == "coordinator" else values)


def test_the_numbers_of_the_manifest_go_together():
    found = jobs()
    own = environment(found["coordinator"][2])
    assert (
        found["worker"][0]["completions"]
        == found["worker"][0]["parallelism"]
        == int(own["HEADWATER_WORKERS"])
    )
    servers = int(own["HEADWATER_SERVERS"]) * (1 + int(own["HEADWATER_REPLICAS"])) + 1
    assert found["server"][0]["completions"] == found["server"][0]["parallelism"] == servers
    jobset = documents()["JobSet", "headwater"]
    host = f"{jobset['metadata']['name']}-coordinator-0-0.{jobset['spec']['network']['subdomain']}:7000"
    assert own["HEADWATER_ADVERTISE"] == host
    for name in ("server", "worker"):
        assert environment(found[name][2])["HEADWATER_COORDINATOR"] == f"tcp:{host}"


def test_volumes_ports_probes_and_secrets_of_the_manifest_exist():
    kept = documents()
    claims = {name for kind, name in kept if kind == "PersistentVolumeClaim"}
    for name, (_, pod, container) in jobs().items():
        volumes = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod.get("volumes", ())}
        assert set(volumes.values()) <= claims
        assert {one["name"] for one in container.get("volumeMounts", ())} == volumes.keys()
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        own = environment(container)
        assert own["HEADWATER_HEALTH"] == f"0.0.0.0:{ports['health']}"
        assert own["HEADWATER_METRICS"] == f"0.0.0.0:{ports['metrics']}"
        probes = {kind: container[kind]["httpGet"] for kind in container if kind.endswith("Probe")}
        assert probes["livenessProbe"] == {"path": "/live", "port": "health"}
        assert name == "worker" or probes["readinessProbe"] == {"path": "/ready", "port": "health"}
        assert own["HEADWATER_TOKEN"] == {"secretKeyRef": {"name": "headwater", "key": "token"}}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["restartPolicy"] == "OnFailure"
    journal = environment(jobs()["coordinator"][2])["HEADWATER_JOURNAL"]
    assert journal.startswith("/journal/")
    (endpoint,) = kept["PodMonitor", "headwater"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    selected = kept["PodMonitor", "headwater"]["spec"]["selector"]["matchLabels"]
    for job, *_ in jobs().values():
        assert selected.items() <= job["template"]["metadata"]["labels"].items()


SPEC = {
    "JobSet": {"network", "successPolicy", "failurePolicy", "replicatedJobs"},
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PersistentVolumeClaim": {"accessModes", "resources"},
}
VERSIONS = {"JobSet": "jobset.x-k8s.io/v1alpha2", "PodMonitor": "monitoring.coreos.com/v1"}


def test_every_document_of_the_manifest_is_of_a_known_kind_and_version():
    for (kind, _), one in documents().items():
        assert one["apiVersion"] == VERSIONS.get(kind, "v1")
        assert set(one["spec"]) <= SPEC[kind]
        assert one.keys() == {"apiVersion", "kind", "metadata", "spec"}


def misfits(models, value, kind, path):
    """Where `value` is not what Kubernetes' own model `kind` says: unknown fields, wrong types."""
    if (inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind)) is not None:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [
            one for at, item in enumerate(value) for one in misfits(models, item, inner[1], f"{path}[{at}]")
        ]
    if (inner := re.fullmatch(r"[Dd]ict[\[(](\w+), (.*)[\])]", kind)) is not None:
        return [
            one for key, item in value.items() for one in misfits(models, item, inner[2], f"{path}.{key}")
        ]
    plain = {"str": str, "int": int, "bool": bool, "float": float, "object": object, "datetime": str}
    if kind in plain:
        return [] if isinstance(value, plain[kind]) else [f"{path}: {value!r} is no {kind}"]
    model = getattr(models, kind)
    named = {json: name for name, json in model.attribute_map.items()}
    found = [f"{path}: {key} is no field of {kind}" for key in value if key not in named]
    for key, item in value.items():
        if key in named:
            found += misfits(models, item, model.openapi_types[named[key]], f"{path}.{key}")
    try:
        made = model(**{named[key]: item for key, item in value.items() if key in named})
    except ValueError as error:  # a field that must be there is missing
        return [*found, f"{path}: {error}"]
    assert made is not None
    return found


def test_jobs_pods_and_claims_are_what_kubernetes_own_client_knows():
    models = pytest.importorskip("kubernetes.client", reason="needs kubernetes, Kubernetes' own client")
    for name, (job, *_) in jobs().items():
        assert not misfits(models, job, "V1JobSpec", name)
    for (kind, name), one in documents().items():
        if kind == "PersistentVolumeClaim":
            assert not misfits(models, one["spec"], "V1PersistentVolumeClaimSpec", name)
    job, *_ = jobs()["server"]
    assert misfits(models, {**job, "completion": 3}, "V1JobSpec", "job")
    assert misfits(models, {**job, "completions": "3"}, "V1JobSpec", "job")


# ── the image ───────────────────────────────────────────────────────────────────────────────────


def instructions():
    """(word, rest) of each instruction, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_has_two_stages_and_does_not_run_as_root():
    words = instructions()
    stages = [rest for word, rest in words if word == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith("AS build")
    last = words[max(at for at, (word, _) in enumerate(words) if word == "FROM") :]
    assert [rest for word, rest in last if word == "USER"] == ["headwater"]
    assert "pip install" not in " ".join(rest for _, rest in last)
    assert [rest for word, rest in last if word == "ENTRYPOINT"] == ['["headwater"]']
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
            assert name not in (ROOT / ".dockerignore").read_text().split()
    wanted = re.search(r"ARG EXTRAS=(\S+)", DOCKERFILE).group(1).split(",")
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(wanted) <= set(extras)


def test_the_images_health_check_is_one_that_a_node_answers(monkeypatch):
    import json

    from headwater.cli.probes import ProbeServer

    check = re.search(r"CMD (\[\"python\".*\])\n", DOCKERFILE).group(1)
    own = re.search(r"HEADWATER_HEALTH=(\S+)", DOCKERFILE).group(1)
    code = json.loads(check)[2]
    assert f"127.0.0.1:{own.rpartition(':')[2]}/live" in code
    with ProbeServer("127.0.0.1:0", lambda: (False, "waits")) as probes:
        exec(code.replace("http://127.0.0.1:8080", probes.url), {})
    with pytest.raises(OSError):
        exec(code.replace("http://127.0.0.1:8080", probes.url), {})


# ── the package ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_wheel_and_sdist_are_built_installed_and_work(tmp_path):
    """Without a network: what the package needs is what this environment has."""
    pytest.importorskip("setuptools", reason="needs setuptools, to build")
    source = tmp_path / "source"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.startswith(("headwater/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = "import setuptools.build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    files = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "headwater").rglob("*.py")}
    assert modules | {"headwater/py.typed"} <= files
    for package in (wheel, sdist):
        place = tmp_path / package.suffix
        venv.create(place, with_pip=False, symlinks=True)
        own = place / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (own / "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--no-deps"]
        done = subprocess.run(
            [*pip, "--no-build-isolation", "--no-index", "--force-reinstall", str(package)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        script = tmp_path / "train.py"
        shutil.copy(ROOT / "examples" / "numpy_only.py", script)
        command = [str(place / "bin" / "headwater"), "run", str(script), "--workers", "2"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "version " in done.stdout
        where = [str(place / "bin" / "python"), "-c", "import headwater; print(headwater.__file__)"]
        found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=clean).stdout
        assert found.startswith(str(place))


# ── Slurm ───────────────────────────────────────────────────────────────────────────────────────

SRUN = """#!/bin/bash
# A stand-in for Slurm's: starts its tasks on this machine, each with its number.
while [[ $1 == --* ]]; do case $1 in --ntasks=*) tasks=${1#*=};; esac; shift; done
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task "$@" & done
wait
"""


@pytest.mark.long
def test_the_batch_script_trains_with_a_stand_in_for_srun(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    written = {
        "srun": SRUN,
        "headwater": f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m headwater "$@"\n',
        "hostname": "#!/bin/sh\necho 127.0.0.1\n",
    }
    for name, text in written.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    shutil.copy(ROOT / "examples" / "numpy_only.py", tmp_path / "train.py")
    (tmp_path / "token").write_text("a secret of thirty-two characters")
    given = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HEADWATER_TOKEN_FILE": str(tmp_path / "token"),
        "HEADWATER_CHECKPOINT": str(tmp_path / "runs"),
        "WORKERS": "2",
        "SERVERS": "2",
        "PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "deploy" / "slurm.sh"), "train.py"],
        cwd=tmp_path,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.allclose(hw.load_checkpoint(tmp_path / "runs")["line"]["w"], [3, -2, 0.5], atol=0.01)


def _free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_batch_script_is_one_that_bash_reads_and_says_what_it_takes():
    path = ROOT / "deploy" / "slurm.sh"
    assert path.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "which script?" in done.stderr

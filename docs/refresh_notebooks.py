"""Run the notebooks of ``examples/`` and keep their outputs, without what changes for no reason.

python docs/refresh_notebooks.py               # all of them
python docs/refresh_notebooks.py examples/02_unequal_network.ipynb

Pictures are reduced to 128 colours. A cell that writes to standard error is an error: notebooks are read, not debugged.
"""

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 170
COLOURS = 128


def refresh(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if output.get("name") == "stderr":
            raise SystemExit(f"{path.name} writes to standard error: {output.text}")
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = reduced(output.data["image/png"])
    nbformat.write(notebook, path)


def reduced(png: str) -> str:
    """Return a picture (base64) with fewer colours."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted((ROOT / "examples").glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        refresh(path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

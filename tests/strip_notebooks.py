"""Bring the notebooks back to clean sources after an edit in JupyterLab: `python tests/strip_notebooks.py`.

Outputs and counters stay in the cells that nbval compares, which start with the mark below; of metadata, tags and
kernel stay. nbstripout would take the counters of the checked cells, too, and nbval compares no cell without one.
"""

import json
from pathlib import Path

CHECKED = "# NBVAL_CHECK_OUTPUT"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def stripped(notebook: dict) -> dict:
    """Return the clean source of a notebook; text is kept as it is."""
    cells = []
    for cell in notebook["cells"]:
        tags = [tag for tag in cell["metadata"].get("tags", []) if tag == "parameters"]
        clean = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": cell["source"]}
        if cell["cell_type"] == "code":
            checked = "".join(cell["source"]).startswith(CHECKED)
            clean |= {"execution_count": cell["execution_count"] or 1 if checked else None}
            clean |= {"outputs": cell["outputs"] if checked else []}
            tags += ["keep_output"] if checked else []
        clean["metadata"] = {"tags": tags} if tags else {}
        cells.append(clean)
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    for path in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        clean = stripped(notebook)
        if clean != notebook:
            path.write_text(json.dumps(clean, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
            print(f"stripped {path.name}")


if __name__ == "__main__":
    main()

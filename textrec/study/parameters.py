"""The parameters of a notebook: its one tagged cell declares them, YAML files give values, both are checked strictly.

papermill injects after the tagged cell, only warns of a name it does not know, and never looks at a type. Here a
misspelt name, text where a number belongs and a default derived from another are errors, before anything runs.
"""

import ast
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from textrec.data.choices import closest
from textrec.paths import NOTEBOOKS, PARAMETERS
from textrec.schema import InputError

SCALES = ("smoke", "laptop", "paper")
COMMON = ("scale", "dataset", "seed", "device", "run_dir")  # the first block of every notebook
HEADER = ("command", "hardware", "time", "expects")
PLAIN_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True)
class Parameter:
    """One line of the parameter cell."""

    name: str
    annotation: str  # as written, e.g. "list[str]"
    default: object
    help: str  # the trailing comment


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    """Return `(source, tags)` of the code cells of a notebook, in order."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]
    except FileNotFoundError:
        raise InputError(f"notebook {notebook} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{notebook} is no notebook: expected JSON with a list of cells") from None


def notebook_path(number: str) -> Path:
    """Return the notebook that starts with `number`, e.g. `01`."""
    found = sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    if len(found) != 1:
        known = ", ".join(path.name[:2] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")))
        raise InputError(f"{len(found)} notebooks start with {number}_; expected one of {known}")
    return found[0]


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """Read the one cell tagged `parameters`: annotated literal assignments, one a line, each with a comment."""
    tagged = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    if len(tagged) != 1:
        raise InputError(f"{notebook.name} has {len(tagged)} cells tagged `parameters`; expected one")
    try:
        statements = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise InputError(f"{notebook.name}: line {error.lineno} of the parameter cell is no Python") from None
    lines = tagged[0].encode().splitlines()  # ast counts columns in bytes
    parameters: dict[str, Parameter] = {}
    taken_lines: set[int] = set()
    for statement in statements:
        behind = lines[statement.lineno - 1][statement.end_col_offset :].decode()
        parameter = _parameter(statement, f"{notebook.name}: line {statement.lineno} of the parameter cell", behind)
        if parameter.name in parameters or statement.lineno in taken_lines:
            raise InputError(f"{notebook.name}: {parameter.name} shares its name or its line with another parameter")
        parameters[parameter.name] = parameter
        taken_lines.add(statement.lineno)
    return parameters


def _parameter(statement: ast.stmt, where: str, comment: str) -> Parameter:
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
            pass
        case _:
            raise InputError(f"{where}, `{ast.unparse(statement)}`, is no annotated value such as `seed: int = 0`")
    if statement.end_lineno != statement.lineno:
        raise InputError(f"{where}: {name} covers several lines; expected one line a parameter")
    try:
        default = ast.literal_eval(value)
    except ValueError:
        told = f"{where}: the default of {name}, `{ast.unparse(value)}`, is derived"
        raise InputError(f"{told}; expected a literal, because values are injected after this cell") from None
    if "=" in ast.unparse(value):
        raise InputError(f"{where}: the default of {name} holds `=`, which papermill cannot read")
    default = _checked(annotation, default, f"{where}: {name}")
    return Parameter(name, ast.unparse(annotation), default, comment.strip().lstrip("# "))


def _checked(annotation: ast.expr, value: object, what: str) -> object:
    """Return `value` where it fits `annotation` (an int becomes a float where one is declared), else raise."""
    match annotation:
        case ast.Constant(value=None) if value is None:
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            try:
                return _checked(left, value, what)
            except InputError:
                return _checked(right, value, what)
        case ast.Name(id="float") if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        case ast.Name(id="list" | "dict" as name) if type(value) is PLAIN_TYPES[name]:
            return _refuse_numbers_in_text(value, what)
        case ast.Name(id=name) if name != "float" and name in PLAIN_TYPES and type(value) is PLAIN_TYPES[name]:
            return value
        case ast.Subscript(value=ast.Name(id="list"), slice=item) if type(value) is list:
            return [_checked(item, part, f"{what}, part {place}") for place, part in enumerate(value, 1)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, item])) if type(value) is dict:
            keys = [_checked(key, name, f"{what}, key {name}") for name in value]
            return {name: _checked(item, value[name], f"{what}, {name}") for name in keys}
    hint = _number_hint(value) if "float" in ast.unparse(annotation) else ""
    raise InputError(f"{what} is {value!r} ({type(value).__name__}); expected {ast.unparse(annotation)}{hint}")


def _refuse_numbers_in_text(value: object, what: str) -> object:
    """Walk a container without declared contents: in it, text that reads as a number is a YAML accident."""
    parts = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for name, part in parts:
        if isinstance(part, dict | list):
            _refuse_numbers_in_text(part, f"{what}, {name}")
        elif hint := _number_hint(part):
            raise InputError(f"{what}, {name} is {part!r} (str); expected a number{hint}")
    return value


def _number_hint(value: object) -> str:
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    mantissa, exponent = f"{number:e}".split("e")
    whole, fraction = mantissa.split(".")
    return f": write {whole}.{fraction.rstrip('0') or '0'}e{int(exponent):+d}, because YAML reads {value} as text"


def check_parameters(notebook: Path, values: dict[str, object], source: str = "parameters") -> dict[str, object]:
    """Return `values` converted to the declared types; raise for a name or type that the notebook does not declare.

    `source` names the file (or "command line") in the sentence.
    """
    declared = notebook_parameters(notebook)
    checked = {}
    for name, value in values.items():
        if name not in declared:
            raise InputError(f"{source}: {notebook.name} has no parameter `{name}`{closest(name, declared)}")
        checked[name] = _checked(ast.parse(declared[name].annotation, mode="eval").body, value, f"{source}: {name}")
    return checked


def parameter_files(number: str, scale: str, variant: str | None = None) -> list[Path]:
    """Return the YAML files of a run in the order in which they override each other; all must exist."""
    if scale not in SCALES:
        raise InputError(f"scale {scale} is none of {', '.join(SCALES)}")
    names = ["common", number, *([f"{number}-{variant}"] if variant else [])]
    files = [PARAMETERS / scale / f"{name}.yaml" for name in names]
    for path in files:
        if not path.is_file():
            known = ", ".join(variants(number, scale)) or "none"
            raise InputError(f"parameter file {path} does not exist; variants of {number} at scale {scale}: {known}")
    return files


def variants(number: str, scale: str) -> list[str]:
    """Return the variants (mostly data sets) that have a parameter file of their own at this scale."""
    return [path.stem.partition("-")[2] for path in sorted((PARAMETERS / scale).glob(f"{number}-*.yaml"))]


def read_values(path: Path) -> dict[str, object]:
    """Read one flat YAML mapping; refuse a name that is given twice."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; expected lines such as `seed: 0`")
    names = [key.value for key, _ in node.value] if node else []
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} gives {repeated[0]} twice")
    return values


def read_header(path: Path) -> dict[str, str]:
    """Read the comment lines `# command: ...`, `# hardware:`, `# time:`, `# expects:` on top of a parameter file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"#\s*(\w+):\s*(.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match and match[1] in HEADER}


def resolve_parameters(
    number: str, scale: str, variant: str | None = None, overrides: dict[str, object] | None = None
) -> dict[str, object]:
    """Return every parameter of a run: defaults, then common, notebook and variant file, then `overrides`."""
    notebook = notebook_path(number)
    values = {name: parameter.default for name, parameter in notebook_parameters(notebook).items()}
    for path in parameter_files(number, scale, variant):
        values |= check_parameters(notebook, read_values(path), f"{scale}/{path.name}")
    return values | check_parameters(notebook, overrides or {}, "command line")

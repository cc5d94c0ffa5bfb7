"""What the code of jaxrl/ and models/ looks like: sizes, argument lists, and who imports whom."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# The rooms, from the lowest up: a module imports of its own level and below. Modules of jaxrl/ not named are commands.
LEVELS = [
    ("jaxrl.errors", "jaxrl.types", "jaxrl.rollouts", "jaxrl.algorithms", "models"),
    ("jaxrl.runtime", "jaxrl.tasks"),
    ("jaxrl.rollout", "jaxrl.learner", "jaxrl.reporting"),
    ("jaxrl.build", "jaxrl.collect", "jaxrl.shaping", "jaxrl.batch", "jaxrl.rollout_metrics", "jaxrl.evaluation"),
    ("jaxrl",),
]
# Programs that are compiled or differentiated, whose inputs jax tells apart by their place; a test holds the list down.
MANY_ARGUMENTS = set()


@functools.cache
def modules():
    """Module name -> (file, its tree)."""
    files = sorted([*ROOT.glob("jaxrl/**/*.py"), *ROOT.glob("models/**/*.py")])
    name = lambda f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")  # noqa: E731
    return {name(f): (f, ast.parse(f.read_text(encoding="utf-8"))) for f in files}


def functions():
    """(module.function, node) of all functions, nested ones and methods included."""
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def imports(top_only=False):
    """Module -> the modules of this repository that it imports; top_only: when it is loaded, not inside functions."""
    found = {}
    for name, (_, tree) in modules().items():
        nodes = tree.body if top_only else ast.walk(tree)
        names = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[name] = names & modules().keys() - {name}
    return found


def level(module):
    """The row of LEVELS with the longest name that the module stands under."""
    fits = [(len(room), i) for i, rooms in enumerate(LEVELS) for room in rooms if f"{module}.".startswith(f"{room}.")]
    return max(fits)[1]


def test_no_file_is_over_450_lines():
    assert {str(f): n for f, _ in modules().values() if (n := len(f.read_text().splitlines())) > 450} == {}


def test_no_function_is_over_80_lines():
    assert {name: n for name, node in functions() if (n := node.end_lineno - node.lineno + 1) > 80} == {}


def positional(node):
    args = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
    return len(args) - (args[:1] in (["self"], ["cls"]))


def test_no_function_has_more_than_five_positional_parameters():
    assert {name for name, node in functions() if positional(node) > 5} == MANY_ARGUMENTS


def test_nothing_is_joined_by_id():
    calls = [(name, node) for name, (_, tree) in modules().items() for node in ast.walk(tree)
             if isinstance(node, ast.Call)]  # fmt: skip
    assert [f"{n}:{c.lineno}" for n, c in calls if isinstance(c.func, ast.Name) and c.func.id == "id"] == []


def test_nothing_imports_upwards():
    upwards = [(a, b) for a, names in imports().items() for b in names if level(b) > level(a)]
    assert sorted(upwards) == []


def test_nothing_imports_in_a_circle():
    reach = imports(top_only=True)
    while True:
        more = {a: names | set().union(*(reach[b] for b in names)) for a, names in reach.items()}
        if more == reach:
            break
        reach = more
    assert [a for a, names in reach.items() if a in names] == []

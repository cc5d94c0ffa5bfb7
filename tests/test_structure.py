"""What the code of jaxrl/ and models/ looks like: sizes, argument lists, and who imports whom."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# The rooms, from the lowest up: a module imports of its own level and below. Modules of jaxrl/ not named are commands.
LEVELS = [
    ("jaxrl.errors", "jaxrl.types", "jaxrl.rollouts", "jaxrl.algorithms", "models"),
    ("jaxrl.runtime", "jaxrl.tasks"),
    ("jaxrl.rollout", "jaxrl.learner", "jaxrl.memory"),
    ("jaxrl.evaluation", "jaxrl.reporting"),
    ("jaxrl.build", "jaxrl.collect", "jaxrl.shaping", "jaxrl.batch", "jaxrl.rollout_metrics"),
    ("jaxrl",),
]
# What has more than five: arrays of functions that jax.jit, shard_map, nn.scan and custom_vjp pass by their place, and
# three that were so when this list was made (aggregate, _finish, apply_experts). It may only become shorter.
MANY_ARGUMENTS = {
    "jaxrl.algorithms.aggregation.aggregate",
    *(f"jaxrl.learner.logprobs.{n}" for n in ("_fused", "_fused_forward", "_run_forward", "_forward", "_backward",
                                              "_over_vocabulary")),
    *(f"jaxrl.rollout.kernels.{name}" for name in ("decode", "write_pages", "write_prompts")),
    "jaxrl.rollout.replay.decode",
    "jaxrl.runtime.checkpoint._finish",
    "models.decoder.__call__",
    *(f"models.moe.{name}" for name in ("_local", "_on_mesh", "apply_experts")),
    "models.pages._attend_local",
}  # fmt: skip


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
        found[name] = (names & modules().keys()) - {name, "jaxrl", "models"}
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
    assert {name for name, node in functions() if positional(node) > 5} - MANY_ARGUMENTS == set()


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

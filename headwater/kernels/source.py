"""A rule's scalar function as source text that computes in float32.

Invariants:
- What a function may say is a short list: arithmetic + − × ÷, `math.sqrt`, `abs`, comparisons, `if`, and
  calls of such functions of its module. All of it is rounded the same way on every machine.
- Every number in the text is float32: a single float64 would make the whole loop float64.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn

from headwater.errors import ConfigurationError

STATEMENTS = (
    ast.FunctionDef,
    ast.arguments,
    ast.arg,
    ast.Return,
    ast.Assign,
    ast.AugAssign,
    ast.If,
    ast.Expr,
)
EXPRESSIONS = (ast.Name, ast.Constant, ast.Tuple, ast.Call, ast.Attribute, ast.IfExp, ast.BinOp, ast.UnaryOp)
COMPARISONS = (ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd, ast.Not, ast.Load, ast.Store)
VOCABULARY = "+ - * /, math.sqrt, abs, comparisons and if"
ALLOWED = STATEMENTS + EXPRESSIONS + COMPARISONS + OPERATORS


def float32_source(function: Callable[..., Any], states: int, scalars: int) -> str:
    """Definitions of `function` and of the functions that it calls, callees first, each under `@inner`.

    They are named as `generated_name` says. The text needs the names `inner`, `float32` and `math`.

    Args:
        function: takes value, gradient, `states` states and `scalars` scalars; returns the value, or a
            tuple of the value and the states.

    Raises:
        ConfigurationError: it is not such a function, or says what no rule may.
    """
    definitions: dict[Callable[..., Any], ast.FunctionDef] = {}
    _collect(function, definitions, ())
    _check_shape(definitions[function], states, scalars)
    return "\n\n\n".join(f"@inner\n{ast.unparse(definition)}" for definition in definitions.values())


def generated_name(function: Callable[..., Any]) -> str:
    """What `function` is called in generated text: a name that nothing else there has."""
    return f"rule_{function.__name__}"


def _collect(
    function: Any, definitions: dict[Callable[..., Any], ast.FunctionDef], callers: tuple[Any, ...]
) -> None:
    if function in callers:
        raise ConfigurationError(f"{function.__qualname__} calls itself, which no function of a rule may")
    definition = _parsed(function)
    rewriter = _Float32(function)
    rewriter.visit(definition)
    for callee in rewriter.callees:
        if callee not in definitions:
            _collect(callee, definitions, (*callers, function))
    definitions[function] = definition


def _parsed(function: Any) -> ast.FunctionDef:
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or "<" in name:
        raise ConfigurationError(f"{name}: a rule's function must be a plain function of a module")
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError) as error:
        raise ConfigurationError(
            f"{name}: its source cannot be read ({error}): define it in a file"
        ) from error
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise ConfigurationError(f"{name}: a rule's function must be a `def` without decorators")
    return definition


def _check_shape(definition: ast.FunctionDef, states: int, scalars: int) -> None:
    """Refuse a function whose parameters or results do not fit the rule's states and scalars."""
    expected, got = 2 + states + scalars, len(definition.args.args)
    if got != expected:
        raise ConfigurationError(
            f"{definition.name} takes {got} arguments, its rule passes {expected}: "
            f"value, gradient, {states} states, {scalars} scalars"
        )
    for node in ast.walk(definition):
        if isinstance(node, ast.Return):
            returned = len(node.value.elts) if isinstance(node.value, ast.Tuple) else 1
            if node.value is None or returned != 1 + states:
                raise ConfigurationError(
                    f"{definition.name} returns {returned} values in {ast.unparse(node)!r}, its rule needs "
                    f"{1 + states}: the value, then {states} states"
                )


class _Float32(ast.NodeTransformer):
    """Checks one function, writes its numbers as float32, and notes which functions it calls."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.callees: list[FunctionType] = []
        self.local = set(function.__code__.co_varnames)
        taken = self.local & {"float32", "math", "abs"}
        if taken:
            raise ConfigurationError(
                f"{function.__qualname__}: no variable of a rule may be called {taken.pop()}"
            )

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt | ast.expr):
            strange = [part for part in (node, *ast.iter_child_nodes(node)) if not isinstance(part, ALLOWED)]
            if strange:
                self.refuse(node, f"{type(strange[0]).__name__} is not among {VOCABULARY}")
        return super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        node.name = generated_name(self.function)
        self.generic_visit(node)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        if node.defaults or node.kwonlyargs or node.vararg or node.kwarg:
            self.refuse(node, "only plain parameters without defaults")
        for parameter in node.args:
            parameter.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
            self.refuse(node, "a statement without effect")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.number(node, node.value, "only finite numbers")

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.local:
            return node
        value = self.function.__globals__.get(node.id)
        return self.number(node, value, "neither a parameter, a variable nor a finite number of the module")

    def number(self, node: ast.expr, value: object, otherwise: str) -> ast.expr:
        """`value` as float32, or refuse `node`."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self.refuse(node, otherwise)
        return ast.parse(f"float32({float(value)!r})", mode="eval").body

    def visit_Attribute(self, node: ast.Attribute) -> NoReturn:
        self.refuse(node, "attributes may only be called, as math.sqrt is")

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.args = [self.visit(argument) for argument in node.args]
        node.func = self.callee(node)
        return node

    def callee(self, node: ast.Call) -> ast.expr:
        """What is called, by a name that the generated module knows."""
        name = ast.unparse(node.func)
        known = self.function.__globals__
        if (name == "math.sqrt" and known.get("math") is math) or known.get(name) is math.sqrt:
            return ast.parse("math.sqrt", mode="eval").body
        if name == "abs" and name not in known:
            return node.func
        function = known.get(name)
        if not isinstance(function, FunctionType) or function.__module__ != self.function.__module__:
            self.refuse(
                node, f"{name} is neither math.sqrt, abs nor a function of {self.function.__module__}"
            )
        self.callees.append(function)
        return ast.Name(generated_name(function))

    def refuse(self, node: ast.AST, reason: str) -> NoReturn:
        raise ConfigurationError(
            f"{self.function.__qualname__}, line {getattr(node, 'lineno', 1)}: "
            f"{ast.unparse(node)!r} cannot be in a rule: {reason}"
        )

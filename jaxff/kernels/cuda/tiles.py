"""Phases between two messages as one CUDA kernel, written from the equations.

A model's phases (jaxff.kernels.painn, jaxff.kernels.student) are traced by JAX on rows of a tile of atoms; every
operation on rows becomes a line of CUDA, every product a call of `multiply` (tiles.cu). So the equations stay written
once. What no output needs is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive
from jaxtyping import Array

from jaxff.kernels.atoms import AXES, Atoms, Made, PerAtom, Rows, Shares

NAME = "phases"  # of the kernel
# rows of a tile in shared memory, which wait for a product or for its end. Above 48 kB a block jaxlib's launcher asks
# for all there is, and little is left to L1, where blocks find matrices that others read
UNITS = 5
_TRACED_ATOMS = 16

_product = Primitive("tile_product")
_product.multiple_results = True
_shared_row = Primitive("tile_shared_row")
_entry = Primitive("tile_entry")


class Product(NamedTuple):
    """[x_0, x_1, ...] K for several x; columns in parts of equal width. sources: the weight of each block of rows."""

    rows: int
    blocks: int
    depth: int
    parts: int
    width: int
    sources: tuple[int, ...]


class Generated(NamedTuple):
    """The source of a kernel; its products; the leaves of the weights that it reads as they are; how many rows an atom

    shared memory holds; for each output, its channels (0: one number an atom); outputs of each name.
    """

    source: str
    products: tuple[Product, ...]
    read: tuple[int, ...]
    units: int
    outputs: tuple[int, ...]
    counts: tuple[int, ...]


@_product.def_abstract_eval
def _(*args: Any, rows: int, blocks: int, parts: int, width: int) -> list[Any]:
    return [jax.core.ShapedArray((_TRACED_ATOMS, width), jnp.float32)] * (rows * parts)


@_shared_row.def_abstract_eval
def _(x: Any, *, offset: int, width: int) -> Any:
    return jax.core.ShapedArray((1, width), jnp.float32)


@_entry.def_abstract_eval
def _(x: Any, *, row: int, column: int) -> Any:
    return jax.core.ShapedArray((), jnp.float32)


class _Tile(Atoms):
    """What equations are traced on: rows are [atoms of a tile, F]."""

    def rows(self, x: Any) -> Rows:
        return list(x)

    full_rows = rows

    def own(self, x: Array, part: int = 0) -> Array:
        return _shared_row.bind(x, offset=part * self.f, width=self.f)

    bias = full = own

    def row(self, x: Array) -> Array:
        return _shared_row.bind(x, offset=0, width=x.shape[1])

    def entry(self, matrix: Array, row: int, column: int) -> Array:
        return _entry.bind(matrix, row=row, column=column)

    def inward(self, xs: Rows, kernel: Array) -> Shares:
        return Shares(self._multiply([xs], [kernel], 1, kernel.shape[1])[0])

    def outward(self, x: Array, kernel: Array, parts: int) -> Rows:
        return self._multiply([[x]], [kernel], parts, self.f)

    def outward_each(self, *terms: tuple[Rows, Array]) -> Rows:
        xs = [[rows[axis] for rows, _ in terms] for axis in AXES]
        return self._multiply(xs, [kernel for _, kernel in terms], 1, self.f)

    def product(self, x: Array, kernel: Array) -> Array:
        return self._multiply([[x]], [kernel], 1, kernel.shape[1])[0]

    def _multiply(self, xs: list[Rows], kernels: list[Array], parts: int, width: int) -> Rows:
        flat = [x for row in xs for x in row]
        return _product.bind(*flat, *kernels, rows=len(xs), blocks=len(xs[0]), parts=parts, width=width)


def generate(
    phases: Sequence[Callable[..., Made]],
    config: Any,
    weights: Any,
    state: dict[str, int],
    sums: int,
    wanted: Sequence[str],
    joined: Sequence[str],
    packed: Sequence[str] = (),
    parted: bool = False,
) -> Generated:
    """The kernel that runs the phases.

    weights: the phases' tree, of arrays or their shapes; state: how many rows each name has that the phases get; sums:
    rows of the message's sums, the last three of them joined; wanted: names that are stored; joined: names whose rows
    are one array; packed: of these, names whose last four rows are three (`pack` in device.cu); parted: whether blocks
    of message.cu left parts of the sums. The kernel's arguments: the arrays of the state and of the sums; the leaves
    `read` of the weights; halves of each product's matrix, and one array of their factors; what was left, if parted; N,
    and how many blocks; the outputs.
    """
    f = config.hidden_dim
    leaves, tree = jax.tree.flatten(weights)
    counts = [*state.values(), sums]

    def run(rows: list[list[Array]], leaves: list[Array]) -> Any:
        on, made = _Tile(f), dict[str, Any](zip(state, rows[:-1], strict=True))
        for k, phase in enumerate(phases):
            made = made | phase(on, config, jax.tree.unflatten(tree, leaves), made, *([] if k else [rows[-1]]))
        values: list[Any] = [made[key] for key in wanted]
        return [[x.x] if isinstance(x, PerAtom) else list(x) for x in values]

    row = jax.ShapeDtypeStruct((_TRACED_ATOMS, f), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in leaves]
    closed, out = jax.make_jaxpr(run, return_shape=True)([[row] * n for n in counts], shapes)
    writer = Writer(f, closed.jaxpr, sum(counts), UNITS)
    arguments, loads = _inputs(f, state, sums, joined, parted)
    writer.lines += loads
    made = {key: len(rows) for key, rows in zip(wanted, out, strict=True)}
    outputs, stores, widths = _outputs(f, made, closed.jaxpr.outvars, joined, packed)
    for store in [x for x in stores if all(row in writer.rows for row in x.rows)]:  # inputs as they are
        writer.store(store)
        stores.remove(store)
    writer.walk(_ordered(closed.jaxpr, writer.rows), stores)
    counts_out = tuple(1 if key in joined else count for key, count in made.items())
    products = writer.products
    arguments += [f"const float* __restrict__ w{k}" for k in writer.read]
    arguments += [f"const uint4* __restrict__ p{k}" for k in range(len(products))]
    arguments.append("const float* __restrict__ factors")
    arguments += ["const float* __restrict__ rest", "int n", "int parts"] if parted else ["int n"]
    arguments += outputs
    units = UNITS if writer.parks else max((min(UNITS, p.rows * p.blocks) for p in products), default=0)
    source = "\n    ".join(
        [
            f'extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) {NAME}({", ".join(arguments)}) {{',
            "SHARED(uint32, operands);",
            f"float* sums = (float*)(operands + {2 * units} * HALF);",
            "int* maxima = (int*)(sums + GROUPS * ATOMS);",
            f"for (int k = thread(); k < {len(products)} * ATOMS; k += THREADS) maxima[k] = 0;",
            f"Here here(n{', parts' if parted else ''});",
            "sync();",
            *writer.lines,
        ]
    )
    return Generated(source + "\n}\n", tuple(products), tuple(writer.read), units, tuple(widths), counts_out)


def _inputs(
    f: int, state: dict[str, int], sums: int, joined: Sequence[str], parted: bool
) -> tuple[list[str], list[str]]:
    """Arguments, and a macro for each row that loads it."""
    arguments: list[str] = []
    loads: list[str] = []
    row = 0
    for name, count in [*state.items(), ("", sums - 3), ("*", 3)]:
        one = name in joined or name == "*"
        for k in range(count):
            if k == 0 or not one:
                arguments.append(f"const float* __restrict__ a{len(arguments)}")
            array, stride, offset = f"a{len(arguments) - 1}", f * count if one else f, f * k if one else 0
            of, column = f"here, {array}, {stride}, {offset}, {f}", (row - sum(state.values())) * f
            is_sum = parted and column >= 0
            load = f"load_sums({of}, rest, {sums * f}, {column})" if is_sum else f"load_row({of})"
            loads.append(f"#define LOAD_{row} {load}")
            row += 1
    return arguments, ["", *loads, ""]


class Store(NamedTuple):
    """A line that stores rows, with a place for the name of each."""

    line: str
    rows: list[Any]


def _outputs(
    f: int, counts: dict[str, int], made: Sequence[Any], joined: Sequence[str], packed: Sequence[str]
) -> tuple[list[str], list[Store], list[int]]:
    """Arguments, what stores `made`, and the arrays' widths (0: one number an atom); counts: rows of each name."""
    arguments: list[str] = []
    stores: list[Store] = []
    widths: list[int] = []
    of_rows = [(key, k, count) for key, count in counts.items() for k in range(count)]
    for (key, k, count), x in zip(of_rows, made, strict=True):
        if k == 0 or key not in joined:
            arguments.append(f"float* __restrict__ out{len(arguments)}")
            rows = count - 1 if key in packed else count
            widths.append(0 if len(x.aval.shape) == 1 else f * rows if key in joined else x.aval.shape[1])
        target, width = f"out{len(arguments) - 1}", widths[-1]
        offset = f * k if key in joined else 0
        if width == 0:
            stores.append(Store(f"store_row_sum(here, {target}, sums, {{}}, {f});", [x]))
        elif key not in packed or k < count - 4:
            stores.append(Store(f"store_row(here, {target}, {width}, {offset}, {x.aval.shape[1]}, {{}});", [x]))
        elif k == count - 4:
            stores.append(Store(f"store_packed(here, {target}, {width}, {offset}, {f}, {{}}, {{}}, {{}}, {{}});", [x]))
        else:
            stores[-1].rows.append(x)
    return arguments, stores, widths


class Writer:
    """Lines of CUDA for a jaxpr of rows.

    units: of shared memory. While a product runs, rows for later wait in those that it leaves free: they would take the
    registers that hold what of its matrix was asked for before it is needed.
    """

    def __init__(self, f: int, jaxpr: Any, rows: int, units: int = 0) -> None:
        self.f = f
        self.rows, self.weights = jaxpr.invars[:rows], list(jaxpr.invars[rows:])
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []
        self.count = 0
        self.products: list[Product] = []
        self.read: list[int] = []  # weights that are read as they are
        self.waiting: list[str] = []  # what lies in shared memory
        self.scale = ""  # of that
        self.units, self.parks, self.parked = units, False, dict[str, int]()  # by name: where in shared memory
        self.later: Sequence[Any] = ()  # equations
        self.with_another: list[Any] = []  # products that were written with one before them

    def name(self, x: Any) -> str:
        """Of a row or number; a row that came from memory is loaded where it is first used."""
        if isinstance(x, Literal):
            return _number(x.val)
        if x not in self.names and x in self.rows:
            self.names[x] = f"in{self.rows.index(x)}"
            self.lines.append(f"Row {self.names[x]} = LOAD_{self.rows.index(x)};")
        return self.fetch(self.names[x])

    def fetch(self, name: str) -> str:
        """The name, of a row that is in registers again."""
        if name in self.parked:
            self.lines.append(f"{name} = parked(operands, {self.parked.pop(name)});")
        return name

    def park(self, used: int, soon: Sequence[str]) -> None:
        """Rows into what a product with so many operands leaves, those first that are needed last; some are, soon."""
        found = list(soon)
        for equation in self.later:
            for x in equation.invars:
                if not isinstance(x, Literal) and _is_row(x) and x in self.names and self.names[x] not in found:
                    found.append(self.names[x])
        free = [unit for unit in range(used, self.units) if unit not in self.parked.values()]
        for unit, name in zip(free, [name for name in reversed(found) if name not in self.parked], strict=False):
            self.lines.append(f"park(operands, {unit}, {name});")
            self.parked[name], self.parks = unit, True

    def new(self, x: Any) -> str:
        self.count += 1
        self.names[x] = f"x{self.count}"
        return self.names[x]

    def weight(self, x: Any) -> str:
        index = self.weights.index(x)
        if index not in self.read:
            self.read.append(index)
        return f"w{index}"

    def each(self, out: Any, code: str) -> None:
        """A row by its i-th number."""
        self.lines.append(f"Row {self.new(out)}; EACH {self.names[out]}.v[i] = {code};")

    def store(self, x: Store) -> None:
        """What stores rows that are there."""
        self.lines.append(x.line.format(*(self.name(row) for row in x.rows)))

    def walk(self, equations: Sequence[Any], stores: list[Store] | None = None) -> None:
        """All of them; lines that store rows, which are taken from the list, follow the one that makes the last."""
        for k, equation in enumerate(equations):
            if stores is not None:
                self.later = equations[k + 1 :]
            self.write(equation)
            there = [x for x in stores or [] if all(row in self.names for row in x.rows)]
            for x in there:
                self.store(x)
            if stores:
                stores[:] = [x for x in stores if x not in there]

    def write(self, equation: Any) -> None:
        kind, out = equation.primitive.name, equation.outvars[0]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if kind == "tile_product":
            self.write_product(equation)
        elif kind == "tile_shared_row":
            x, p = self.weight(equation.invars[0]), equation.params
            self.lines.append(f"Row {self.new(out)} = load_shared_row(here, {x}, {p['offset']}, {p['width']});")
        elif kind == "tile_entry":
            x, (_, columns), p = self.weight(equation.invars[0]), equation.invars[0].aval.shape, equation.params
            self.lines.append(f"float {self.new(out)} = {x}[{p['row'] * columns + p['column']}];")
        elif kind == "reduce_sum" or (kind in _SAME and (_is_row(equation.invars[0]) or not _is_row(out))):
            self.names[out] = self.name(equation.invars[0])
        elif kind == "broadcast_in_dim":
            value = self.name(equation.invars[0])
            self.each(out, value)
        elif inner is not None:
            self.inline(getattr(inner, "jaxpr", inner), equation)
        else:
            self.write_operation(kind, equation)

    def inline(self, inner: Any, equation: Any) -> None:
        for mine, theirs in zip(inner.invars, equation.invars, strict=True):
            self.names[mine] = self.name(theirs)
        self.walk(needed(inner))
        for mine, theirs in zip(equation.outvars, inner.outvars, strict=True):
            self.names[mine] = self.name(theirs)

    def write_operation(self, kind: str, equation: Any) -> None:
        out, p = equation.outvars[0], equation.params
        xs = [f"{self.name(x)}.v[i]" if _is_row(x) else self.name(x) for x in equation.invars]
        if kind == "integer_pow":
            code = " * ".join([xs[0]] * p["y"]) if p["y"] > 0 else None
        elif kind in _OPERATIONS:
            code = _OPERATIONS[kind].format(*xs)
        else:
            code = None
        if code is None:
            raise NotImplementedError(f"{equation}")
        if _is_row(out):
            self.each(out, code)
        else:
            self.lines.append(f"float {self.new(out)} = {code};")

    def write_product(self, equation: Any) -> None:
        if equation in self.with_another:
            return
        other = self.of_same_rows(equation)
        self.with_another += other
        made, p = [equation, *other], equation.params
        rows, blocks, parts, width = p["rows"], p["blocks"], p["parts"], p["width"]
        count = rows * blocks
        xs, index = equation.invars[:count], len(self.products)
        depth = xs[0].aval.shape[1]
        for one in made:
            sources = sources_of([self.weights.index(k) for k in one.invars[count:]], blocks)
            self.products.append(Product(rows, blocks, depth, parts, width, sources))
        names, result = [self.name(x) for x in xs], f"m{index}"
        stages = blocks if count > self.units else 1  # what would take too much memory goes there block by block
        used, at_once, steps = count // stages, blocks // stages, depth // 16
        if names != self.waiting:
            self.write_scale(names, used, depth, index)
        parts *= len(made)
        self.lines.append(f"float acc{index}[{rows}][{parts}][2][4] = {{}};")
        template = f"{rows}, {at_once}, {depth}, {parts}, {width}, WORDS, {blocks * steps}"
        for stage in range(stages):
            there = [self.fetch(names[r * blocks + stage * at_once + b]) for r in range(rows) for b in range(at_once)]
            if there != self.waiting:
                self.lines += ["sync();"] if stage else []
                self.put(there, depth)
            self.park(used, names if stage + 1 < stages else [])
            matrix = f"Both{{p{index}, p{index + 1}}}" if other else f"p{index} + {stage * at_once * steps * 64}"
            self.lines.append(f"accumulate<{template}>(acc{index}, operands, {matrix});")
        self.lines.append(f"Row {result}[{rows}][{parts}];")
        factors = ", ".join(f"factors[{index + k}]" for k in range(len(made)))
        self.lines.append(f"as_rows({result}, acc{index}, {self.scale}, {factors});")
        for n, one in enumerate(made):
            for k, x in enumerate(one.outvars):
                row, part = divmod(k, p["parts"])
                self.names[x] = f"{result}[{row}][{n * p['parts'] + part}]"

    def write_scale(self, names: Sequence[str], used: int, depth: int, index: int) -> None:
        """The power of 2 of each atom for operands that will take so many units."""
        for name in [name for name, unit in self.parked.items() if unit < used]:
            self.fetch(name)
        self.scale, maxima = f"scale{index}", f"maxima + {index} * ATOMS"
        self.lines += [f"largest(here, {maxima}, {depth}, {', '.join(dict.fromkeys(names))});", "sync();"]
        self.lines.append(f"Scale {self.scale}(here, {maxima});")

    def put(self, names: list[str], depth: int) -> None:
        """Operands into shared memory."""
        for k, x in enumerate(names):
            self.lines.append(f"put_row(here, operands + {k} * 2 * HALF, {self.scale}, {x}, {depth});")
        self.lines.append("sync();")
        self.waiting = names

    def of_same_rows(self, equation: Any) -> list[Any]:
        """A later product of the same rows by another matrix, if there is one: at once, they read these rows once."""
        p = equation.params
        if p["parts"] != 1 or p["blocks"] != 1:
            return []
        of = equation.invars[: p["rows"]]
        later = [x for x in self.later if x.primitive is _product and x.params == p and x.invars[: p["rows"]] == of]
        return later[:1]


_SAME = ("broadcast_in_dim", "convert_element_type", "reshape", "copy", "stop_gradient")  # a row or number as it is
_OPERATIONS = {
    "mul": "{0} * {1}",
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "sub": "{0} - {1}",
    "div": "{0} * reciprocal({1})",
    "neg": "-{0}",
    "sqrt": "square_root({0})",
    "logistic": "reciprocal(1.f + exponential(-{0}))",
    "ne": "{0} != {1} ? 1.f : 0.f",
    "gt": "{0} > {1} ? 1.f : 0.f",
    "select_n": "({0} != 0.f ? {2} : {1})",
}


def _number(x: Any) -> str:
    return f"{float(x)!r}f"


def _is_row(x: Any) -> bool:
    return len(x.aval.shape) == 2 and not isinstance(x, Literal)


def sources_of(weights: Sequence[int], blocks: int) -> tuple[int, ...]:
    """The weight of each block of rows that a product has, of one for all or one for each."""
    return tuple(weights) if len(weights) > 1 else tuple(weights) * blocks


def needed(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on."""
    live = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if any(x in live for x in equation.outvars):
            found.append(equation)
            live |= {x for x in equation.invars if not isinstance(x, Literal)}
    return found[::-1]


def _ordered(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """The needed equations; before each product those that leave fewer rows to remember until later.

    inputs: rows that are loaded where they are first used.
    """
    left = needed(jaxpr)
    maker = {x: eqn for eqn in left for x in eqn.outvars}
    done: list[Any] = []
    held: set[Any] = set()  # rows that were made or loaded

    def rows_of(eqn: Any) -> set[Any]:
        return {x for x in eqn.invars if _is_row(x)}

    def with_all_before(eqn: Any) -> list[Any] | None:
        """What is left to do for an equation, with it; None if there is a product among that."""
        found, stack = [], [eqn]
        while stack:
            one = stack.pop()
            if one.primitive.name == "tile_product":
                return None
            if one not in found:
                found.append(one)
                before = [x for x in one.invars if not isinstance(x, Literal)]
                stack += [maker[x] for x in before if x in maker and maker[x] in left]
        return [one for one in left if one in found]

    def gain(group: list[Any]) -> int:
        later = {x for eqn in left if eqn not in group for x in rows_of(eqn)}
        read = {x for eqn in group for x in rows_of(eqn)}
        made = {x for eqn in group for x in eqn.outvars if _is_row(x)}
        loaded = {x for x in read if x in inputs and x not in held}
        return len((read & held) - later) - len((made | loaded) & later)

    def do(group: list[Any]) -> None:
        for eqn in group:
            left.remove(eqn)
            held.update(rows_of(eqn), (x for x in eqn.outvars if _is_row(x)))
            done.append(eqn)

    while left:
        if left[0].primitive.name == "tile_product":
            groups = [group for eqn in left if _is_row(eqn.outvars[0]) and (group := with_all_before(eqn))]
            best = max(groups, key=gain, default=[])
            if best and gain(best) > 0:
                do(best)
                continue
        do(left[:1])
    return done

"""Phases for few atoms as CUDA kernels, written from the equations: cut.cu.

As in jaxff.kernels.programs, a phase is a kernel and a block has some channels of its atoms; as in
jaxff.kernels.cuda.tiles, it serves 16 atoms, on tensor cores. A phase without products joins the next one, which may
need all channels of what it makes: every block makes those, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jaxtyping import Array, Float, UInt32

from jaxff.kernels.atoms import AXES, Atoms, Made, PerAtom, Phase, Rows, Shares, Step
from jaxff.kernels.cuda import launch, tiles

ATOMS, LANES = 16, 16  # of a block, of an atom
AHEAD = 2  # matrices that are asked for before what is multiplied is there

_read = Primitive("cut_read")
_sum = Primitive("cut_sum")
_product = Primitive("cut_product")
_product.multiple_results = True


class Product(NamedTuple):
    """[x_0, x_1, ...] K for several x, in units of 16 channels: of each `block` rows of K, of which there are `blocks`,

    `deep` are multiplied; of each `part` columns, of which there are `parts`, by `wide`. own: which of them are those
    of a block's channels, "rows" or "columns"; sources: the weight of each block of rows.
    """

    rows: int
    blocks: int
    deep: int
    block: int
    parts: int
    wide: int
    part: int
    own: str
    sources: tuple[int, ...]

    def words(self, atoms: int) -> int:
        """Of shared memory that hold what is multiplied, of a block's atoms."""
        return 2 * self.rows * atoms * (8 * self.blocks * self.deep + 4)

    def products(self, atoms: int) -> int:
        """Words for what warps made of it."""
        groups = self.parts * self.wide
        side = next(k for k in (8, 4, 2, 1) if groups % k == 0)
        return atoms * LANES // 32 // side * self.rows * atoms * (16 * groups + 4)


@_read.def_abstract_eval
def _(x: Any, *, kind: str, where: int, width: int) -> Any:
    return ShapedArray((ATOMS, width) if width else (), jnp.float32)


@_sum.def_abstract_eval
def _(*, name: str, width: int) -> Any:
    return ShapedArray((ATOMS, width), jnp.float32)


@_product.def_abstract_eval
def _(*args: Any, product: Product) -> list[Any]:
    return [ShapedArray((ATOMS, 16 * product.wide), jnp.float32)] * (product.rows * product.parts)


class _Stored(NamedTuple):
    """An array in memory."""

    x: Any


class _Both(NamedTuple):
    """Rows that were just made: this block's channels, and all."""

    own: Rows
    full: Rows


class _Cut(Atoms):
    """What equations are traced on: rows are [ATOMS, own]; with `full`, all of them are [ATOMS, F]."""

    def __init__(self, f: int, own: int, leaves: Sequence[Any], full: bool) -> None:
        super().__init__(f)
        self.own_width, self.leaves, self.all_full = own, leaves, full

    def rows(self, x: Any) -> Rows:
        return self._rows(x, self.all_full)

    def full_rows(self, x: Any) -> Rows:
        return self._rows(x, True)

    def sums(self, arrays: Sequence[Array] | Sequence[str]) -> Rows:
        """Of a message: an array each, and at last one of three rows; or what threads have of rows, by its names."""
        if all(isinstance(x, str) for x in arrays):
            return [_sum.bind(name=x, width=self.own_width) for x in arrays]
        return self.rows([_Stored(x) for x in arrays[:-1]]) + self.rows(_Stored(arrays[-1]))

    def _rows(self, x: Any, full: bool) -> Rows:
        kind, width = ("full", self.f) if full else ("own", self.own_width)
        if isinstance(x, _Both):
            return x.full if full else x.own
        if isinstance(x, _Stored):
            return [_read.bind(x.x, kind=kind, where=axis, width=width) for axis in AXES]
        return [_read.bind(r.x, kind=kind, where=0, width=width) if isinstance(r, _Stored) else r for r in x]

    def bias(self, x: Array, part: int = 0) -> Array:
        return _read.bind(x, kind="bias", where=part, width=self.own_width)

    def row(self, x: Array) -> Array:
        return _read.bind(x, kind="row", where=0, width=x.shape[1])

    def entry(self, matrix: Array, row: int, column: int) -> Array:
        return _read.bind(matrix, kind="entry", where=row * matrix.shape[1] + column, width=0)

    def whole(self, shares: Shares) -> Array:
        return _read.bind(shares.x.x, kind="whole", where=0, width=shares.x.x.shape[2])

    def own_share(self, shares: Shares) -> Array:
        return _read.bind(shares.x.x, kind="own of whole", where=0, width=self.own_width)

    def inward(self, xs: Rows, kernel: Array) -> Shares:
        return Shares(self._multiply([xs], [kernel], 1, "rows")[0])

    def outward(self, x: Array, kernel: Array, parts: int) -> Rows:
        return self._multiply([[x]], [kernel], parts, "columns")

    def outward_each(self, *terms: tuple[Rows, Array]) -> Rows:
        xs = [[rows[axis] for rows, _ in terms] for axis in AXES]
        return self._multiply(xs, [kernel for _, kernel in terms], 1, "columns")

    def product(self, x: Array, kernel: Array) -> Array:
        return self._multiply([[x]], [kernel], 1, "")[0]

    def _multiply(self, xs: list[Rows], kernels: list[Array], parts: int, own: str) -> Rows:
        blocks, deep, all_columns = len(xs[0]), xs[0][0].shape[1] // 16, kernels[0].shape[1] // 16
        wide, part = (self.own_width // 16, self.f // 16) if own == "columns" else (all_columns, all_columns)
        sources = [next(i for i, leaf in enumerate(self.leaves) if leaf is k) for k in kernels]
        product = Product(
            *(len(xs), blocks, deep, self.f // 16 if own == "rows" else deep, parts, wide, part, own),
            tiles.sources_of(sources, blocks),
        )
        return _product.bind(*(x for row in xs for x in row), *kernels, product=product)


class Matrix(NamedTuple):
    """A matrix as jaxff.kernels.cuda.matrices makes it, and where its factor is in an array of factors."""

    halves: UInt32[Array, "..."]
    factor: int


class Matrices(NamedTuple):
    """What phases multiply by, by Product.sources, and the factors."""

    of: Mapping[tuple[int, ...], Matrix]
    factors: Float[Array, "C"]


class Lines(NamedTuple):
    """Phases as lines of CUDA, those that ask for memory first, and what a kernel of them takes and makes.

    inputs: by their declarations; shapes: of out0, ..., which make up `made`; words: of shared memory.
    """

    asks: list[str]
    then: list[str]
    inputs: dict[str, Array]
    shapes: list[tuple[int, ...]]
    made: Made
    joined: Sequence[str]
    words: int = 0

    @property
    def outputs(self) -> list[str]:
        """Declarations."""
        return [f"float* __restrict__ out{k}" for k in range(len(self.shapes))]

    def taken(self, results: Iterator[Array]) -> Made:
        """What was made, of the kernel's results."""
        return {name: _taken(x, results, name in self.joined) for name, x in sorted(self.made.items())}


def run(
    step: Step, phases: Sequence[Phase], weights: Any, state: Made, sums: list[Array], matrices: Matrices, own: int
) -> Made:
    """The state with what the phases make; own: channels of a block, a multiple of 16 that divides F."""
    together: list[Phase] = []
    for phase in phases:
        together.append(phase)
        written = lines(step, together, weights, state, sums, matrices, own, ATOMS)
        if written.words:  # or a phase without products joins the next one
            name = f"{step.config.architecture}_{phase.__name__}"
            state, together, sums = state | _launch(name, written, step.config.hidden_dim, own), [], []
    return state


def _launch(name: str, written: Lines, f: int, own: int) -> Made:
    n = written.shapes[0][0]
    arguments = [*written.inputs, "int n", *written.outputs]
    source = "\n    ".join(
        [
            f'extern "C" __global__ void __launch_bounds__(THREADS) {name}({", ".join(arguments)}) {{',
            "Here here(n, ATOMS);",
            *written.asks,
            *written.then,
        ]
    )
    source, threads = f"{launch.read('device.cu', 'cut.cu')}{source}\n}}\n", LANES * ATOMS
    defines = ("F", f), ("OWN", own), ("ATOMS", ATOMS), ("THREADS", threads)
    kernel = launch.Kernel(name, source, defines, threads, 4 * written.words, early=True)
    inputs = list(written.inputs.values())
    return written.taken(iter(launch.call(kernel, inputs, (n,), written.shapes, -(-n // ATOMS) * (f // own))))


def lines(
    step: Step,
    phases: Sequence[Phase],
    weights: Any,
    state: Made,
    sums: Sequence[Array] | Sequence[str],
    matrices: Matrices,
    own: int,
    atoms: int,
) -> Lines:
    """The phases for a block of so many channels of so many atoms; sums: a message's, as for `_Cut.sums`."""
    f, n = step.config.hidden_dim, jax.tree.leaves(state)[0].shape[0]
    arrays, tree = jax.tree.flatten((state, [x for x in sums if not isinstance(x, str)], weights))

    def equations(arrays: list[Array]) -> Made:
        state, stored, weights = jax.tree.unflatten(tree, arrays)
        known, leaves, made = jax.tree.map(_Stored, state), jax.tree.leaves(weights), dict[str, Any]()
        for k, phase in enumerate(phases):
            results = []
            for full in (False, True):
                on = _Cut(f, own, leaves, full)
                heard = [on.sums(stored or sums)] if sums and k == 0 else []
                results.append(phase(on, step.config, weights, known | made, *heard))
                if k == len(phases) - 1:  # no other phase here reads what it makes
                    break
            mine, *full_ones = results
            made |= {name: _Both(x, full_ones[0][name]) for name, x in mine.items()} if full_ones else mine
        return {name: x.own if isinstance(x, _Both) else x for name, x in made.items()}

    traced = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arrays]
    closed, made = jax.make_jaxpr(equations, return_shape=True)(traced)
    writer = _Writer(f, own, atoms, closed.jaxpr, matrices)
    stores, shapes = _outputs(made, f, own, n, step.model.JOINED)
    ends = [tiles.Store(line, [x]) for x, line in zip(closed.jaxpr.outvars, stores, strict=True)]
    asks, then = writer.write_all(closed.jaxpr, ends)
    inputs = {f"const float* __restrict__ w{k}": arrays[k] for k in writer.read}
    inputs |= {f"const uint4* __restrict__ p{k}": matrices.of[p.sources].halves for k, p in enumerate(writer.products)}
    inputs["const float* __restrict__ factors"] = matrices.factors
    return Lines(asks, then, inputs, shapes, made, step.model.JOINED, writer.words)


def stored(rows: Mapping[str, list[str]], f: int, own: int, n: int, joined: Sequence[str]) -> Lines:
    """What threads have of rows, by its names, as it is."""
    stores, shapes = _outputs(rows, f, own, n, joined)
    names = [x for _, row in sorted(rows.items()) for x in row]
    then = [line.format(f"Row<1>{{{x}}}") for line, x in zip(stores, names, strict=True)]
    return Lines([], then, {}, shapes, dict(rows), joined)


def _outputs(
    made: Mapping[str, Any], f: int, own: int, n: int, joined: Sequence[str]
) -> tuple[list[str], list[tuple[int, ...]]]:
    """For each leaf the line that stores {}, and the arrays' shapes, where names come in order."""
    lines, shapes = [], list[tuple[int, ...]]()
    for name, value in sorted(made.items()):
        if isinstance(value, PerAtom):
            lines.append(f"store_number(here, out{len(shapes)}, {{}});")
            shapes.append((n,))
            continue
        if isinstance(value, Shares):
            cuts, width = f // own, value.x.shape[1]
            lines.append(f"store_row(here, out{len(shapes)}, {cuts * width}, here.cut * {width}, {{}});")
            shapes.append((n, cuts, width))
            continue
        for k in range(len(value)):
            if k == 0 or name not in joined:
                shapes.append((n, f * len(value) if name in joined else f))
            offset = k * f if name in joined else 0
            lines.append(f"store_row(here, out{len(shapes) - 1}, {shapes[-1][1]}, {offset} + here.cut * OWN, {{}});")
    return lines, shapes


def _taken(value: Any, results: Iterator[Array], joined: bool) -> Any:
    """A value of `made` from the kernel's results, which come in order."""
    if isinstance(value, PerAtom | Shares):
        return type(value)(next(results))
    return next(results) if joined else [next(results) for _ in value]


class _Writer(tiles.Writer):
    """Lines of CUDA for a jaxpr of rows of several widths."""

    def __init__(self, f: int, own: int, atoms: int, jaxpr: Any, matrices: Matrices) -> None:
        super().__init__(f, jaxpr, 0)
        self.own, self.atoms, self.matrices = own, atoms, matrices
        self.made: list[Product] = []
        self.reads: dict[tuple[Any, ...], str] = {}  # names of what was read

    def write_all(self, jaxpr: Any, stores: list[tiles.Store]) -> tuple[list[str], list[str]]:
        """What asks for memory, for matrices AHEAD of what they multiply, too; and the rest."""
        equations = tiles.needed(jaxpr)
        reads = [eqn for eqn in equations if eqn.primitive is _read]
        self.made = [eqn.params["product"] for eqn in equations if eqn.primitive is _product]
        self.walk(reads, stores)
        self.ask(range(AHEAD))
        asks, self.lines = [f"ready({', '.join(f'w{k}' for k in self.read)});", *self.lines], []
        if self.made:
            self.lines.append("SHARED(uint32, operand);")
            self.lines.append(f"float* products = (float*)(operand + {max(p.words(self.atoms) for p in self.made)});")
        self.walk([eqn for eqn in equations if eqn.primitive is not _read], stores)
        return asks, self.lines

    @property
    def words(self) -> int:
        """Of shared memory; 0 without products."""
        sizes = ((p.words(self.atoms), p.products(self.atoms)) for p in self.made)
        return sum(map(max, zip(*sizes, strict=True)))

    def ask(self, which: Iterable[int]) -> None:
        """For the matrices of these products, if there are so many."""
        for k in which:
            if k >= len(self.made):
                continue
            p, cut = self.made[k], f"here.cut * {self.own // 16}"
            sizes = (p.parts * p.wide, p.wide, p.part, p.blocks * p.deep, p.deep, p.block, p.blocks * p.block)
            where = (cut if p.own == "columns" else "0"), (cut if p.own == "rows" else "0")
            self.lines.append(f"Matrix<{', '.join(map(str, sizes))}> matrix{k}(p{k}, {where[0]}, {where[1]});")

    def each(self, out: Any, code: str) -> None:
        n = out.aval.shape[1] // 16
        self.lines.append(f"Row<{n}> {self.new(out)}; EACH({n}) {self.names[out]}.v[i] = {code};")

    def write(self, equation: Any) -> None:
        out = equation.outvars[0]
        if equation.primitive is _read:
            self.write_read(equation)
        elif equation.primitive is _sum:
            self.each(out, equation.params["name"])
        elif equation.primitive is _product:
            self.write_product(equation)
        elif equation.primitive.name == "reduce_sum":
            x = self.name(equation.invars[0])
            self.lines.append(f"float {self.new(out)} = row_sum({x});")
        else:
            super().write(equation)

    def write_read(self, equation: Any) -> None:
        (x,), out, p = equation.invars, equation.outvars[0], equation.params
        array, width, where = self.weight(x), p["width"], p["where"]
        key = (array, p["kind"], where, width)
        if key in self.reads:
            self.names[out] = self.reads[key]
            return
        row, own, shares = f"Row<{width // 16}>", "here.cut * OWN", ", ".join(map(str, x.aval.shape[1:]))
        template, stride = f"<{width // 16}>", x.aval.shape[-1]
        self.reads[key] = name = self.new(out)
        self.lines.append(
            {
                "own": f"{row} {name} = load_row{template}(here, {array}, {stride}, {where * self.f} + {own});",
                "full": f"{row} {name} = load_row{template}(here, {array}, {stride}, {where * self.f});",
                "whole": f"{row} {name} = load_shares<{width // 16}, {shares}>(here, {array}, 0);",
                "own of whole": f"{row} {name} = load_shares<{width // 16}, {shares}>(here, {array}, {own});",
                "bias": f"{row} {name} = shared_row{template}(here, {array} + {where * self.f} + {own});",
                "row": f"{row} {name} = shared_row{template}(here, {array});",
                "entry": f"float {name} = {array}[{where}];",
            }[p["kind"]]
        )

    def write_product(self, equation: Any) -> None:
        k, p = len(self.products), equation.params["product"]
        self.products.append(p)
        xs = [self.name(x) for x in equation.invars[: p.rows * p.blocks]]
        words, matrix, atoms = 8 * p.blocks * p.deep + 4, f"matrix{k}", self.atoms
        if xs != self.waiting:
            self.waiting, self.scale = xs, f"scale{k}"
            for r in range(p.rows):
                row = xs[r * p.blocks : (r + 1) * p.blocks]
                self.lines.append(f"Scale {self.scale}_{r}({', '.join(row)});")
                for b, x in enumerate(row):
                    at = f"operand + {r * atoms * words}, {words}, {p.rows * atoms * words}, {b * p.deep * 16}"
                    self.lines.append(f"put_row(here, {at}, {self.scale}_{r}.up(), {x});")
        self.ask([k + AHEAD])
        self.lines += ["sync();", f"{matrix}.multiply<{p.rows}>(products, operand);", "sync();"]
        for i, out in enumerate(equation.outvars):
            r, part = divmod(i, p.parts)
            factor = f"factors[{self.matrices.of[p.sources].factor}] * {self.scale}_{r}.down()"
            self.lines.append(
                f"Row<{p.wide}> {self.new(out)} = "
                f"{matrix}.row<{p.wide}, {p.rows}>(here, products, {r}, {part * p.wide * 16}, {factor});"
            )

"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from jaxff.errors import JaxffError, StructureError

if TYPE_CHECKING:
    from ase import Atoms

INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns what bad input raises into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except JaxffError as error:
            _fail(str(error))
        except BrokenPipeError:
            raise  # typer leaves quietly: the reader of our output has gone
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
        except KeyboardInterrupt:
            _note("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _fail(message: str) -> NoReturn:
    typer.echo(f"jaxff: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def _note(message: str) -> None:
    typer.echo(f"jaxff: {message}", err=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A PaiNN force field in JAX: convert a trained model, look at it, run molecular dynamics with it.",
    epilog="First try: jaxff md --molecule ethanol --steps 2000 -o run/",
)

Model = Annotated[
    str,  # a Path would make organic of ./organic
    typer.Argument(
        metavar="MODEL",
        help="A pretrained model (`jaxff models`), a .safetensors file, or a PyTorch checkpoint (.pt) as it is.",
    ),
]
# of these two, either may be left out: `_model_and_atoms` tells which one came
ModelOrStructure = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A pretrained model (`jaxff models`), a .safetensors file, or a PyTorch checkpoint (.pt) as it is."
        " Left out: organic.",
    ),
]
Structure = Annotated[
    str | None,
    typer.Argument(
        metavar="STRUCTURE",
        show_default=False,
        help="A structure file of any format that ASE reads (xyz, pdb, cif, ...), or --molecule instead.",
    ),
]
Molecule = Annotated[
    str | None,
    typer.Option(
        "--molecule", "-m", metavar="NAME", help="A built-in molecule instead of a file; see `jaxff molecules`."
    ),
]
Index = Annotated[int, typer.Option("--index", help="Which frame of the file: 0 is the first, -1 the last.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="[float32|float64]", help="Precision. Default: float32.")]


def _version(asked: bool) -> None:
    if asked:
        from jaxff import __version__

        typer.echo(f"jaxff {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint to read.")],
    destination: Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="The file to write.")],
    to_torch: Annotated[
        bool, typer.Option("--to-torch", help="The other way: write a PyTorch checkpoint from a jaxff file.")
    ] = False,
) -> None:
    """Convert a PyTorch checkpoint into a jaxff file (.safetensors), or back.

    PyTorch isn't needed, and nothing in the checkpoint is run. The new file holds a certificate: hashes, a
    check of energies and forces against an independent implementation, and the model's measured defects.
    """
    from jaxff.convert import convert as do_convert
    from jaxff.describe import describe

    with _working("converting, checking, measuring defects"):
        do_convert(source, destination, to_torch=to_torch)
    _sections(describe(destination))


@app.command()
def inspect(file: Model) -> None:
    """Show what a model file holds: architecture, elements, units, certificate, known defects."""
    from jaxff.describe import describe

    with _working("reading"):
        sections = describe(file)
    _sections(sections)


@app.command()
def models() -> None:
    """List the pretrained models: name, size, elements, and how far they are from their teacher."""
    from jaxff import pretrained

    for name in pretrained.names():
        card = pretrained.read_card(name)
        typer.echo(f"{name:16s} {card.size / 1e6:5.2f} MB  {' '.join(card.elements)}  (teacher: {card.teacher})")
        _rows([(figure.what, figure.text) for figure in card.errors])


@app.command()
def molecules() -> None:
    """List the built-in molecules that --molecule knows."""
    from jaxff.md.structures import builtin_molecule, builtin_names

    for name, source in builtin_names().items():
        atoms = builtin_molecule(name)
        typer.echo(f"{name:24s} {atoms.get_chemical_formula():14s} {len(atoms):3d} atoms  {source}")


@app.command()
def energy(
    model: ModelOrStructure = None,
    structure: Structure = None,
    molecule: Molecule = None,
    index: Index = 0,
    dtype: Dtype = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="XYZ", help="Write them to an extended XYZ file, too.")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Estimate the error of each force, too (pretrained models).")
    ] = False,
) -> None:
    """Energy (eV) and forces (eV/Å) of one structure."""
    model, atoms = _model_and_atoms(model, structure, molecule, index)
    from jaxff.interop.ase import JaxffCalculator
    from jaxff.md.trajectory import write_evaluated

    calculator = JaxffCalculator(model, dtype=dtype, uncertainty=uncertainty)
    value, forces = calculator.get_potential_energy(atoms), calculator.get_forces(atoms)
    errors = calculator.results.get("forces_uncertainty")
    if output is not None:
        write_evaluated(output, atoms, value, forces)
    typer.echo(f"energy {value:.8f} eV")
    typer.echo("forces (eV/Å)" if errors is None else "forces, and the estimated error of each (eV/Å)")
    for i, (symbol, force) in enumerate(zip(atoms.get_chemical_symbols(), forces, strict=True)):
        last = "" if errors is None else f" {errors[i]:10.4f}"
        typer.echo(f"{i:5d} {symbol:2s} " + " ".join(f"{x:14.8f}" for x in force) + last)
    if (probability := calculator.results.get("large_error_probability")) is not None:
        from jaxff.uncertainty import LARGE_ERROR

        typer.echo(f"probability that a force is off by more than {LARGE_ERROR} eV/Å: {probability:.0%}")


@app.command()
def md(
    model: ModelOrStructure = None,
    structure: Structure = None,
    molecule: Molecule = None,
    index: Index = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Settings (YAML); the options below override it."),
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option(metavar="[nve|nvt_langevin]", help="nve conserves energy. Default: nve.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-n", help="Number of steps. Default: 10000.")] = None,
    timestep: Annotated[float | None, typer.Option(metavar="FS", help="Time step in fs. Default: 0.5.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", metavar="K", help="Of the first velocities. Default: 300.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random velocities. Default: 0.")] = None,
    relax: Annotated[bool | None, typer.Option("--relax/--no-relax", help="Minimise the energy first.")] = None,
    record_every: Annotated[int | None, typer.Option(help="Steps between two frames. Default: 10.")] = None,
    dtype: Dtype = None,
    engine: Annotated[str | None, typer.Option(help="How the model is evaluated. Default: auto.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results.")] = Path(
        "run"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Run molecular dynamics of one molecule with a model: `jaxff md -m aspirin`, `jaxff md organic aspirin.xyz`.

    DIR gets trajectory.xyz (extended XYZ with energies, forces and velocities), log.csv, config.yaml (the
    settings that were used), summary.json (drift, temperature, speed, versions) and energy.png.

    Ctrl-C ends the run at the next block of steps and keeps everything so far (exit code 130).
    """
    from jaxff.md.config import load_config

    options = {
        "ensemble": ensemble,
        "steps": steps,
        "timestep_fs": timestep,
        "temperature_K": temperature,
        "seed": seed,
        "relax": relax,
        "record_every": record_every,
        "dtype": dtype,
        "engine": engine,
    }
    settings = load_config(config, options)
    model, atoms = _model_and_atoms(model, structure, molecule, index)
    from jaxff.md.output import Output

    Output(output).check(overwrite)
    from rich.console import Console

    from jaxff.describe import known_defects
    from jaxff.interop.ase import check_atoms
    from jaxff.loading import load_potential
    from jaxff.md.driver import run
    from jaxff.md.interrupt import until_ctrl_c
    from jaxff.md.progress import progress_bar
    from jaxff.md.report import outcome
    from jaxff.md.structures import check_start

    console = Console(stderr=True)
    potential = load_potential(model, dtype=settings.dtype or "float32", engine=settings.engine or "auto")
    check_atoms(potential, atoms)
    check_start(atoms)
    with _working("measuring the model's defects"):
        defects = known_defects(potential)
    for defect in defects:
        _note(f"known defect: {defect}")
    bar = nullcontext() if quiet else progress_bar(console, settings.steps, settings.ensemble == "nve", settings.relax)
    with bar as progress, until_ctrl_c(_note) as stop:
        summary = run(
            potential,
            atoms,
            settings,
            output,
            progress=progress,
            stop=stop,
            overwrite=overwrite,
            known_defects=defects,
        )
    _rows(outcome(summary, output))
    if summary.status == "interrupted":
        _note(f"{summary.message}; {output} holds everything so far")
        raise typer.Exit(INTERRUPTED)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings (YAML), as configs/train_organic.yaml.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results.")] = Path(
        "training"
    ),
    init: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Start from this model (a file, or a pretrained name), with its settings."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR; start it where there is none.")
    ] = False,
    steps: Annotated[int | None, typer.Option("--steps", "-n", help="Replaces run.steps.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Stop after M minutes, reading included, with a checkpoint.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a model on labelled structures, or fine-tune one.

    DIR gets best.safetensors and last.safetensors, metrics.csv, curve.png, summary.json, split.csv, config.yaml (the
    settings that were used) and checkpoints/.

    A run that was stopped (Ctrl-C, SIGTERM, --max-minutes, kill -9) goes on with --resume along the same curve.
    """
    from rich.console import Console

    from jaxff.train.config import load_train_config
    from jaxff.train.interactive import outcome, progress_bar, until_signalled
    from jaxff.train.loop import train as do_train

    settings = load_train_config(config, steps)
    bar = nullcontext() if quiet else progress_bar(Console(stderr=True))
    with bar as progress, until_signalled(_note) as stop:
        result = do_train(
            settings,
            output,
            init=init,
            resume=resume,
            max_minutes=max_minutes,
            overwrite=overwrite,
            progress=progress,
            stop=stop,
            note=_note,
        )
        signalled = stop()
    _rows(outcome(result.summary, output))
    if result.status == "stopped":
        _note(f"stopped at step {result.step}; the same command with --resume goes on")
        if signalled:
            raise typer.Exit(INTERRUPTED)


@app.command()
def label(
    structures: Annotated[
        list[str],
        typer.Argument(metavar="STRUCTURES...", help="Files of any format that ASE reads, all frames; folders, globs."),
    ],
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            metavar="SPEC",
            help="`tblite:GFN2-xTB`, `jaxff:MODEL`, or any ASE calculator: `ase:module.Class?key=value`.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="H5", help="The HDF5 file to write.")],
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", help="How many compute at once. Default: one for each core.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what the teacher failed at before.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Label structures with energies and forces of a teacher, for `jaxff train`.

    Resumable: the same command makes only what is missing, after Ctrl-C, after a kill, and after structures were
    added. Where the teacher fails (its SCF doesn't converge), the structure is left out and counted.
    """
    import os

    from rich.console import Console

    from jaxff.train.label import label as do_label
    from jaxff.train.label import partial_path, progress_bar, read_structures

    bar = nullcontext() if quiet else progress_bar(Console(stderr=True))
    try:
        with bar as progress:
            done = do_label(
                read_structures(structures, any_charge=teacher.startswith("ase:")),
                teacher,
                output,
                processes=processes if processes is not None else os.cpu_count() or 1,
                retry_failed=retry_failed,
                progress=progress,
            )
    except KeyboardInterrupt:
        if partial_path(output).exists():
            _note(f"{partial_path(output)} keeps the labels so far; the same command goes on")
        raise
    rows = [("labels", f"{done.labels} in {output}"), ("made now", str(done.made))]
    if done.duplicates:
        rows.append(("duplicates", f"{done.duplicates} left out"))
    _rows(rows)
    if done.failed:
        first = next(iter(done.failed.values()))
        _note(f"the teacher failed at {len(done.failed)} structures (--retry-failed tries again); the first: {first}")


def _sections(sections: dict[str, list[tuple[str, str]]]) -> None:
    for heading, rows in sections.items():
        typer.secho(heading, bold=True)
        _rows(rows)


def _rows(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"  {name:{width}s}  {value}")


def _model_and_atoms(first: str | None, second: str | None, molecule: str | None, index: int) -> tuple[str, Atoms]:
    """What the arguments [MODEL] [STRUCTURE] and --molecule mean together: the model, and a structure that was read."""
    from jaxff.loading import is_model
    from jaxff.md.structures import builtin_molecule, builtin_names, read_structure
    from jaxff.pretrained import DEFAULT

    model, structure = first, second
    if first is not None and second is None and not is_model(first) and (molecule is None or Path(first).is_file()):
        model, structure = None, first
    elif first is not None and second is not None and is_model(second) and not is_model(first):
        raise StructureError(f"expected MODEL STRUCTURE, in this order, received {first} {second}")
    if (structure is None) == (molecule is None):
        received = "neither" if structure is None else f"both ({structure} and {molecule})"
        raise StructureError(f"expected a STRUCTURE file or --molecule NAME, received {received}")
    if molecule is not None:
        return model or DEFAULT, builtin_molecule(molecule)
    assert structure is not None
    if second is None and not Path(structure).exists():
        hint = f", did you mean --molecule {structure}?" if structure in builtin_names() else ""
        raise StructureError(f"{structure}: no such file, and no model of this name{hint} (see `jaxff models`)")
    return model or DEFAULT, read_structure(structure, index)


def _working(what: str) -> AbstractContextManager[Any]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    return Console(stderr=True).status(f"{what} ...")


def main() -> None:
    """The console script."""
    app(prog_name="jaxff")
    sys.exit(0)

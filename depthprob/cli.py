"""Command line: one command per task; 2 and one message for bad input, no half-written result."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from . import io
from .config import METHODS, Config, check_sampling, check_supported, read_config
from .errors import InputError
from .stack import check_stack_name, read_stack, write_stack
from .storage import atomic_folder, atomic_write

app = typer.Typer(
    name="depthprob",
    help="Column depths and atom numbers, with error bars, from focal series of annular dark-field images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the experiment.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no closing line.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Share the work with the other processes of this job, each started by the same command: by srun, by mpirun, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set.",
    ),
]


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Print what is wrong with the input as one message and leave with status 2; of Ctrl-C, with 130."""
    try:
        yield
    except InputError as error:
        typer.echo(f"depthprob: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("depthprob: interrupted; nothing was written, and what can go on from where it stopped does so when run again", err=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _job(distributed: bool) -> Iterator[bool]:
    """`_input_errors`, of one of several processes if asked; whether this is the one that writes."""
    if not distributed:
        with _input_errors():
            yield True
        return
    from . import processes

    with _input_errors():
        processes.join()
    with processes.ending_together(), _input_errors():
        yield processes.is_first()


def _use_double_precision() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def _settings(path: Path) -> Config:
    config = read_config(path)
    check_sampling(config)
    check_supported(config)
    return config


def _check_output_file(path: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}. Make it first."
        )
    if path.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder. Give a file name.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(
            f"cannot write {str(path)!r}: no permission to write in its folder. Give another."
        )


def _hand_over(result: dict, output: Path | None, quiet: bool = False) -> None:
    """Result as JSON to a file, or to the standard output."""
    if output is None:
        typer.echo(json.dumps(io._plain(result), indent=2, ensure_ascii=False))
    else:
        io.write_json(output, result)
        _say(f"wrote {output}", quiet)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the results.")
    ] = Path("depthprob-demo"),
    quiet: Quiet = False,
) -> None:
    """Take the packaged stack through the whole pipeline."""
    with _input_errors(), atomic_folder(output) as folder:
        _use_double_precision()
        from . import jobs

        jobs.demo(folder, quiet=quiet)
    _say(f"open {output / 'report.html'}", quiet)


@app.command()
def simulate(
    config: ConfigFile,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="STACK", help=".npz, .nc, .h5 or .tif")
    ],
    noise: Annotated[
        bool, typer.Option("--noise/--no-noise", help="Poisson counts, or their expectation.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Simulate the focal series of an isolated column or of a structure file; an interrupted run goes on where it stopped."""
    with _input_errors():
        settings = _settings(config)
        check_stack_name(output)
        _check_output_file(output)
        _use_double_precision()
        from .reconstruction.simulate import simulate as simulated

        checkpoint = output.with_name(f".{output.name}.partial.npz")
        write_stack(output, simulated(settings, noise, quiet, checkpoint))
        checkpoint.unlink(missing_ok=True)
    _say(f"wrote {output}", quiet)


@app.command()
def library(
    config: ConfigFile,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="LIBRARY", help="Name of the library, .npz")
    ],
    quiet: Quiet = False,
    distributed: Distributed = False,
) -> None:
    """Build a library of column images; an interrupted run goes on where it stopped."""
    with _job(distributed) as first:
        quiet = quiet or not first
        settings = _settings(config)
        if output.suffix.lower() != ".npz":
            raise InputError(f"cannot write a library {str(output)!r}: the allowed ending is .npz.")
        _check_output_file(output)
        _use_double_precision()
        from .reconstruction.libraries import write_library
        from .reconstruction.pipeline import progress_bar

        write_library(output, settings, progress_bar(quiet))
    _say(f"wrote {output}", quiet)


@app.command()
def crlb(
    config: ConfigFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Else to the screen.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Cramér-Rao bounds on the depths of a column and its atoms, or of all columns of a structure file."""
    with _input_errors():
        settings = _settings(config)
        _check_output_file(output)
        _use_double_precision()
        from .reconstruction.bounds import config_crlb
        from .reconstruction.pipeline import progress_bar

        _hand_over(config_crlb(settings, progress_bar(quiet)), output, quiet)


@app.command()
def design(
    config: ConfigFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Else to the screen.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Find the foci, angles and dose split that give the best depth; a figure is drawn beside FILE.json."""
    with _input_errors():
        settings = _settings(config)
        _check_output_file(output)
        if output is not None:
            _check_output_file(output.with_suffix(".png"))
        _use_double_precision()
        from .reconstruction.pipeline import progress_bar
        from .reconstruction.planning import design_series

        result = design_series(settings, progress_bar(quiet))
        _hand_over(result, output, quiet)
        if output is not None:
            from .plotting import save_design

            with atomic_write(output.with_suffix(".png")) as temporary:
                save_design(temporary, result)
            _say(f"drew {output.with_suffix('.png')}", quiet)


@app.command()
def reconstruct(
    stack: Annotated[Path, typer.Argument(metavar="STACK", help="Focal series (defocus, y, x).")],
    config: Annotated[
        Path, typer.Option("--config", metavar="CONFIG.toml", help="Settings of the experiment.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the results.")
    ],
    library: Annotated[
        Path | None, typer.Option("--library", metavar="LIBRARY", help="From `depthprob library`.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help=" | ".join(METHODS))] = None,
    memory_limit: Annotated[float | None, typer.Option("--memory-limit", metavar="GB")] = None,
    quiet: Quiet = False,
    distributed: Distributed = False,
) -> None:
    """Take a focal series to column depths, atom numbers and atoms; interrupted sampling goes on where it stopped."""
    with _job(distributed) as first:
        quiet = quiet or not first
        settings = _settings(config)
        if method is not None and method not in METHODS:
            raise InputError(f"--method is {method!r}; allowed is one of {', '.join(METHODS)}.")
        if memory_limit is not None and not memory_limit > 0:
            raise InputError(
                f"--memory-limit is {memory_limit:g}; allowed is a number of GB above 0."
            )
        if memory_limit is not None:
            simulation = dataclasses.replace(settings.simulation, memory_limit_GB=memory_limit)
            settings = dataclasses.replace(settings, simulation=simulation)
        if library is not None and not library.is_file():
            raise InputError(
                f"no library file {str(library)!r}. Build one with `depthprob library`."
            )
        read_stack(stack, settings)  # faults of the file show before JAX starts
        checkpoint = output.with_name(f".{output.name}.partial.npz")
        with atomic_folder(output) if first else contextlib.nullcontext(output) as folder:
            _use_double_precision()
            from . import jobs

            jobs.run(
                stack,
                settings,
                folder,
                library_path=library,
                method=method,
                quiet=quiet,
                checkpoint=checkpoint,
            )
        if first:
            checkpoint.unlink(missing_ok=True)
    _say(f"open {output / 'report.html'}", quiet)


def main() -> None:
    """Entry point of the command `depthprob`."""
    app()


if __name__ == "__main__":
    main()

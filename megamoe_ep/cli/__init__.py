"""The command line: ``megamoe-ep demo | doctor | bench``."""

from __future__ import annotations

import typer

from megamoe_ep.cli.demo import demo
from megamoe_ep.cli.doctor import doctor

app = typer.Typer(
    name="megamoe-ep",
    help="Expert-parallel MoE layer for NVFP4 checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(doctor)


@app.command(
    # All of it is bench's own to read, which is imported only when it is called for.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measures the layer on this machine, against the floors of its bytes and FLOPs."""
    from megamoe_ep.cli.bench import bench as command

    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(command)
    inner(args=context.args, prog_name="megamoe-ep bench", standalone_mode=False)


def main() -> None:
    app()

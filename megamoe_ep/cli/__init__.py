"""The command line: ``megamoe-ep demo | doctor | bench``."""

from __future__ import annotations

import typer

from megamoe_ep.cli.bench import bench
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
for command in (demo, doctor, bench):
    app.command()(command)


def main() -> None:
    app()

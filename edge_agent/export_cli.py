"""``driftkeel export``: one adapter, or a whole generation of a device, as an ONNX file.

Thin: reads options, opens the state for reading, prints. A bundle is written by
`exporter.cli`, a generation by `edge_agent.export_generation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from exporter.cli import export as export_bundle
from exporter.console import progress, training_extra

# Options of one adapter alone; what they mean is said where they are used.
_OF_A_BUNDLE = ("encoder_path", "whole", "form")


def _generation(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    """A generation's number, or the word for the active one."""
    if text is None or text == "current":
        return text
    if not text.isascii() or not text.isdecimal():
        raise click.BadParameter(f"{text!r} is neither a number nor `current`")
    return int(text)


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="The bundle with the adapter to write.",
)
@click.option(
    "--generation",
    metavar="N|current",
    callback=_generation,
    help="The generation to write whole: its number, or `current` for the active one.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="--generation: the agent's TOML file; its state is only read, the agent may be running.",
)
@click.option(
    "--without-score",
    is_flag=True,
    help="--generation: leave the OOD score out; needed where so many classes are known that a "
    "static graph cannot hold it.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The ONNX file; of an adapter file, the directory.",
)
def export(
    *,
    bundle: Path | None,
    generation: int | str | None,
    config_path: Path | None,
    without_score: bool,
    out: Path,
    **of_a_bundle: Any,
) -> None:
    """Write one adapter, or a whole generation, as an ONNX file that needs no Driftkeel.

    Of a --bundle, the adapter as a standalone model or as an adapter file. Of a --generation,
    everything: images in; labels, probabilities and OOD scores out. What is written is compared
    with torch, or with what the device answers, first.
    """
    context = click.get_current_context()
    if (bundle is None) == (generation is None):
        raise click.UsageError("give either --bundle or --generation")
    if bundle is not None:
        _refuse(context, ("config_path", "without_score"), "--bundle")
        context.invoke(export_bundle, bundle=bundle, out=out, **of_a_bundle)
        return
    _refuse(context, _OF_A_BUNDLE, "--generation")
    if config_path is None:
        raise click.UsageError("--generation needs --config: it says where the state is")
    number = generation if isinstance(generation, int) else None
    size_bytes = _write(config_path, number, out, with_score=not without_score)
    click.echo(f"{out}: {size_bytes} bytes")


export.params.extend(p for p in export_bundle.params if p.name in _OF_A_BUNDLE)


def _refuse(context: click.Context, names: tuple[str, ...], given: str) -> None:
    """Refuses options that the other kind of export takes."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{options[name]} does not go with {given}")


def _write(config_path: Path, number: int | None, out: Path, *, with_score: bool) -> int:
    from adapter_store.state import StateReader  # noqa: PLC0415 - a bundle's export needs none
    from edge_agent.agent import open_encoder  # noqa: PLC0415
    from edge_agent.config import load_agent_config  # noqa: PLC0415
    from exporter.sessions import EncoderSessions  # noqa: PLC0415

    with training_extra():
        from edge_agent.export_generation import (  # noqa: PLC0415 - ONNX only where it is needed
            export_generation,
        )
    config = load_agent_config(config_path)
    state = StateReader(Path(config.agent.state_dir))
    try:
        sessions = EncoderSessions(open_encoder(config), threads=config.agent.threads)
        return export_generation(
            state, sessions, number, out, with_score=with_score, progress=progress()
        )
    finally:
        state.close()

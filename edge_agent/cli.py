"""``driftkeel agent``: run the daemon, fit its first generation, ask how it does.

A thin shell: parses the command line, wires agent, conductor and HTTP API together and turns
signals into an orderly stop.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np

from adapter_store.bundle import pack
from edge_agent import fit as fitting
from edge_agent.agent import Agent
from edge_agent.config import Config, load_agent_config
from edge_agent.errors import AgentError
from edge_agent.freed_memory import share_one_heap
from edge_agent.http_api import listening
from edge_agent.report import training_progress

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The agent's TOML file; every key is in docs/agent-config.md.",
)

log = logging.getLogger(__name__)


@click.group(invoke_without_command=True)
@_CONFIG
@click.pass_context
def agent(context: click.Context, config_path: Path | None) -> None:
    """Run the on-device daemon, or prepare its first generation.

    Without a subcommand: serves until SIGTERM or Ctrl-C.
    """
    context.obj = config_path
    if context.invoked_subcommand is None:
        run(_loaded(config_path))


@agent.command("fit")
@_CONFIG
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Labelled samples: an .npz file (x, y, optionally class_names), or a directory with "
    "one folder of images for each class.",
)
@click.option("--task", default="", help="What to call this task; the file's name when absent.")
@click.option(
    "--holdout",
    type=click.FloatRange(0.05, 0.9),
    default=0.3,
    show_default=True,
    help="Share of every class kept aside to calibrate shift detection.",
)
@click.option("--add", is_flag=True, help="Add to the running generation instead of refusing.")
@click.pass_obj
def fit_command(  # noqa: PLR0917 - click passes them by name
    parent_config: Path | None,
    config_path: Path | None,
    data: Path,
    task: str,
    holdout: float,
    add: bool,
) -> None:
    """Make and activate a generation from labelled samples; needs no torch."""
    config = _loaded(config_path or parent_config)
    with _opened(config) as opened:
        click.echo(fit(opened, data, task=task or data.stem, holdout=holdout, add=add))


@agent.command("status")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_obj
def status_command(parent_config: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Ask the running agent how it does."""
    status = ask_status(_loaded(config_path or parent_config))
    click.echo(json.dumps(status, indent=2) if as_json else "\n".join(describe(status)))


@agent.command("cancel-training")
@_CONFIG
@click.pass_obj
def cancel_training_command(parent_config: Path | None, config_path: Path | None) -> None:
    """End the running agent's training; it trains again when more labels have come."""
    _ask(_loaded(config_path or parent_config), "/v1/training/cancel", method="POST")
    click.echo("the training is cancelled; the device goes on when more labels have come")


def run(config: Config) -> None:
    """Serve until a signal says stop; what is owed stays in the state directory.

    Raises:
        StateLockedError: Another agent uses this state directory.
        DriftkeelError: The state, the encoder or the address cannot be used.
    """
    from edge_agent.conductor import Conductor  # noqa: PLC0415 - `fit` and `status` need none of it

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    share_one_heap()
    with _opened(config) as opened:
        conductor = Conductor(opened, config)
        with listening(opened, episodes=opened.state.episodes.list) as (server, sock):

            def stop(_: int, __: FrameType | None) -> None:
                server.should_exit = True

            # uvicorn takes these over while it runs, and raises them again when it has stopped.
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            host, port = sock.getsockname()[:2]
            serving = opened.serving
            log.info(
                "%s: %s on http://%s:%d",
                config.agent.device,
                "no generation yet, run `driftkeel agent fit`"
                if serving is None
                else f"generation {serving.number} serves {len(serving.labels)} labels",
                host,
                port,
            )
            conductor.start()
            try:
                server.run(sockets=[sock])
            finally:
                conductor.stop()
    log.info("%s stopped", config.agent.device)


def fit(device: Agent, data: Path, *, task: str, holdout: float, add: bool) -> str:
    """Fit, install and activate; returns what to tell the user.

    Raises:
        AgentError: There is a generation already and ``add`` was not given.
        TrainingDataError: The samples cannot be used.
    """
    running = device.serving
    if running is not None and not add:
        raise AgentError(
            f"generation {running.number} is installed already; use --add to add these classes "
            "to it, or a fresh agent.state_dir to start over"
        )
    labelled = fitting.load_labelled(data, device.package.image_size)
    size = len(labelled.images)
    with click.progressbar(length=size, label="Encoding", file=sys.stderr) as bar:
        features = fitting.encode(device.sessions, labelled.images, progress=bar.update)
    fitted = fitting.fit(
        features,
        labelled.labels,
        encoder=device.package.digest,
        task=task,
        created_by=device.config.agent.device,
        created_at=time.time(),
        holdout=holdout,
    )
    digests = [device.state.blobs.put(pack(fitted.bundle))]
    calibration = fitted.calibration_features
    if running is not None:
        digests += list(running.bundles)
        before = device.state.generations.get(running.number).calibration_features()
        calibration = np.concatenate([before.astype(np.float32), calibration])
    generation = device.build_generation(
        digests,
        calibration,
        parent=None if running is None else running.number,
        reason=f"fitted on {data.name}",
        metrics={"holdout_accuracy": fitted.accuracy},
    )
    device.activate(generation.number)
    manifest = fitted.bundle.manifest
    told = (
        f"generation {generation.number}: {len(manifest.labels)} classes from "
        f"{manifest.samples} samples, {fitted.accuracy:.1%} of "
        f"{len(fitted.calibration_features)} held-out samples right"
    )
    if len(calibration) < fitting.MIN_CALIBRATION:
        told += (
            f"\nonly {len(calibration)} held-out samples: shifts will be noticed late; "
            f"{fitting.MIN_CALIBRATION} or more are better"
        )
    return told


def ask_status(config: Config) -> dict[str, Any]:
    """The running agent's status, asked over its HTTP API.

    Raises:
        AgentError: No agent runs on this configuration's state directory.
    """
    return _ask(config, "/v1/status")


def _ask(config: Config, path: str, *, method: str = "GET") -> dict[str, Any]:
    where = Path(config.agent.state_dir) / "http.json"
    try:
        url = json.loads(where.read_text(encoding="utf-8"))["url"]
        request = urllib.request.Request(f"{url}{path}", method=method)  # noqa: S310 - the agent wrote it
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        said = json.loads(error.read() or b"{}").get("error", error.reason)
        raise AgentError(f"{config.agent.device}: {said}") from error
    except (OSError, ValueError, KeyError) as error:
        raise AgentError(
            f"no agent answers for {config.agent.device} (state directory "
            f"{config.agent.state_dir}); start it with `driftkeel agent --config FILE`"
        ) from error
    return answer


def describe(status: dict[str, Any]) -> list[str]:
    """A status for people, one fact a line."""
    running, runtime = status["generation"], status["runtime"]
    lines = [
        f"device       {status['device']}",
        f"encoder      {status['encoder']['name']}",
    ]
    lines.append(
        f"runtime      {runtime['provider']}, threads {runtime['threads']}, optimisation "
        f"{runtime['graph_optimisation']} ({runtime['source']})"
    )
    if running is None:
        lines.append("generation   none; run `driftkeel agent fit`")
    else:
        lines.append(
            f"generation   {running['number']} ({len(running['labels'])} labels, "
            f"{len(running['bundles'])} bundles; "
            f"{len(status['generations'])} generations on disk)"
        )
    counters = status["counters"]
    lines.append(
        f"answered     {counters['samples']} samples, {counters['alarms']} alarms, "
        f"{counters['feedback']} labels"
    )
    latency = status["latency_ms"]
    if latency["p50"] is not None:
        lines.append(f"latency      p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms")
    if status["passes_per_sample"] is not None:
        lines.append(f"passes       {status['passes_per_sample']:.2f} a sample")
    if status.get("episode"):
        episode = status["episode"]
        lines.append(
            f"episode      {episode.get('state', '')} {episode.get('detail', '')}".rstrip()
        )
    progress = training_progress(status.get("training") or {})
    if progress is not None:
        lines.append(f"training     {progress}")
    if runtime["problem"]:
        lines.append(f"problem      not as tuned: {runtime['problem']}")
    if status["journal_problem"]:
        lines.append(f"problem      not journalling: {status['journal_problem']}")
    return lines


@contextmanager
def _opened(config: Config) -> Iterator[Agent]:
    opened = Agent.open(config)
    try:
        yield opened
    finally:
        opened.close()


def _loaded(path: Path | None) -> Config:
    if path is None:
        raise click.UsageError("give --config FILE, the agent's TOML file")
    return load_agent_config(path)

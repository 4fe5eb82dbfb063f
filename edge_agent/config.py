"""The agent's configuration: every key of the TOML file, its default and what it means.

Read by the command line and handed to the agent, the HTTP API and the conductor. Unknown keys
are refused by name. The same keys are listed for users in ``docs/agent-config.md``; a test
fails when one is missing there or here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from adapter_store.config import load_config
from adapter_store.errors import ConfigError
from exporter.providers import GraphOptimisation, ProviderName
from ood.signature import DEFAULT_MIN_SIMILARITY

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
DeviceName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file; a key that is not an attribute is refused."""


class AgentSection(_Section, frozen=True, kw_only=True):
    """``[agent]``: who this device is and where it keeps what it must not lose.

    Attributes:
        device: This device's name, unique in the fleet (letters, digits, ``.``, ``_``, ``-``).
        state_dir: Directory for generations, bundles and the database; one agent at a time.
            A relative path starts at the configuration file's folder.
        encoder: ``"default"`` for the shipped encoder, or the path of an encoder package.
        providers: What may run the encoder, the preferred one first; the CPU stands behind them
            all. Empty takes what ``driftkeel tune`` found, else the CPU.
        threads: Threads one inference may use; 0 takes what ``driftkeel tune`` found, else 1.
        graph_optimisation: How far ONNX Runtime rewrites the encoder's graphs; empty takes what
            ``driftkeel tune`` found, else ``all``.
    """

    device: DeviceName
    state_dir: str
    encoder: str = "default"
    providers: tuple[ProviderName, ...] = ()
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    graph_optimisation: GraphOptimisation | Literal[""] = ""


class HttpSection(_Section, frozen=True, kw_only=True):
    """``[http]``: where the local API listens.

    Attributes:
        host: Address to bind; the default accepts connections from this machine only.
        port: Port to bind; 0 picks a free one (see ``http.json`` in the state directory).
        max_body_bytes: Largest request body accepted; anything larger is refused with 413.
        max_requests: Most predictions answered or waiting at a time; more are refused with 429.
        max_batch_ms: About how long one batch of waiting requests may take: the most that being
            answered together adds to the latency of one.
    """

    host: str = "127.0.0.1"
    port: Port = 8780
    max_body_bytes: Positive = 32 * 1024 * 1024
    max_requests: Positive = 64
    max_batch_ms: Positive = 100


class MqttSection(_Section, frozen=True, kw_only=True):
    """``[mqtt]``: the broker this device syncs through; leave the table out to stay offline.

    Attributes:
        host: The broker's address.
        port: The broker's port.
        username: Name the broker knows this device by; empty for an anonymous connection.
        password: Password for ``username``.
        keepalive_s: Seconds of silence after which the broker declares this device offline.
    """

    host: str
    port: Port = 1883
    username: str = ""
    password: str = ""
    keepalive_s: Positive = 30


class CatalogueSection(_Section, frozen=True, kw_only=True):
    """``[catalogue]``: whom this device trusts.

    Attributes:
        public_key: The catalogue's public key in base64, as ``driftkeel catalogue public-key``
            prints it. Bundles it did not sign are refused; empty refuses them all.
    """

    public_key: str = ""


class AlarmSection(_Section, frozen=True, kw_only=True):
    """``[alarm]``: how often a false alarm is tolerable, and what counts as a shift.

    Attributes:
        false_alarm_every: Mean number of unshifted samples between two false alarms.
        block: Samples that one scene lasts, for video: one sample in so many counts.
        prior_changes: Alarm also when only the proportions of the known classes change.
    """

    false_alarm_every: Positive = 1_000_000
    block: Positive = 1
    prior_changes: bool = False


class BufferSection(_Section, frozen=True, kw_only=True):
    """``[buffer]``: what the device remembers of its recent input.

    Attributes:
        max_samples: Newest samples whose features and images are kept. What was answered, and
            for which samples labels are accepted, is remembered 50 times longer.
        keep_images: Keep each sample as the encoder saw it. Without images the device cannot
            train an adapter itself, nor try one from the catalogue.
    """

    max_samples: Positive = 2048
    keep_images: bool = True


class LearnerSection(_Section, frozen=True, kw_only=True):
    """``[learner]``: training an adapter on this device (needs the ``train`` extra).

    Attributes:
        enabled: Whether this device may train at all.
        min_labels: Labelled samples of the shifted input to wait for before training.
        rank: Width of the adapter's bottleneck.
        epochs: Passes over the labelled samples.
        batch_size: Samples in one training step.
        learning_rate: Peak learning rate.
        momentum: Share of the mean of the earlier adapters mixed in after every step.
        threads: Threads the training process may use.
        max_seconds: Wall-clock budget of one training; it stops there with what it has.
        max_memory: Most memory the training process may take, in MB.
        patience: Epochs without a better result on a part kept aside before training ends; 0
            runs them all.
        checkpoint_every_s: Seconds of training that a kill may cost.
        seed: Seed of everything random in training; the same seed gives the same weights.
        align: Align the features of a new domain while labels are waited for, where that helps;
            it needs neither labels nor the ``train`` extra.
    """

    enabled: bool = True
    min_labels: Positive = 64
    rank: Positive = 16
    epochs: Positive = 20
    batch_size: Positive = 32
    learning_rate: PositiveFloat = 0.003
    momentum: Fraction = 0.1
    threads: Positive = 1
    max_seconds: PositiveFloat = 600.0
    max_memory: Positive = 1024
    patience: Annotated[int, msgspec.Meta(ge=0)] = 5
    checkpoint_every_s: PositiveFloat = 10.0
    seed: int = 0
    align: bool = True


class RouterSection(_Section, frozen=True, kw_only=True):
    """``[router]``: choosing an adapter for a sample.

    Attributes:
        max_rounds: Most adapters tried for one sample before the decision stands.
        adapters_in_memory: Most adapters kept in memory, the most recently used ones; the others
            are read from disk when a sample needs them.
    """

    max_rounds: Positive = 4
    adapters_in_memory: Positive = 50


class GenerationsSection(_Section, frozen=True, kw_only=True):
    """``[generations]``: how far back this device can be rolled.

    Attributes:
        keep: Newest generations kept on disk; the running one and its parent always stay.
    """

    keep: Positive = 5


class SearchSection(_Section, frozen=True, kw_only=True):
    """``[search]``: asking the catalogue for an adapter after an alarm.

    Attributes:
        limit: Candidates to ask for.
        min_similarity: Candidates less similar to the shifted input than this are not pulled.
        timeout_s: Seconds to wait for the catalogue before going on without it.
        repeat_s: Seconds between two searches while an episode waits for labels.
    """

    limit: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    min_similarity: Fraction = DEFAULT_MIN_SIMILARITY
    timeout_s: PositiveFloat = 30.0
    repeat_s: PositiveFloat = 30.0


class Config(_Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        agent: The device itself (required).
        http: The local API.
        mqtt: The broker; None keeps the device offline.
        catalogue: The catalogue this device trusts.
        alarm: The false-alarm budget.
        buffer: The journal's size.
        learner: Training on the device.
        router: Adapter choice per sample.
        generations: Retention.
        search: Catalogue search.
    """

    agent: AgentSection
    http: HttpSection = HttpSection()
    mqtt: MqttSection | None = None
    catalogue: CatalogueSection = CatalogueSection()
    alarm: AlarmSection = AlarmSection()
    buffer: BufferSection = BufferSection()
    learner: LearnerSection = LearnerSection()
    router: RouterSection = RouterSection()
    generations: GenerationsSection = GenerationsSection()
    search: SearchSection = SearchSection()


def load_agent_config(path: Path) -> Config:
    """Read and check the agent's configuration file.

    Args:
        path: The TOML file.

    Returns:
        The configuration; ``agent.state_dir`` (and ``agent.encoder`` when it is a path) are
        absolute.

    Raises:
        ConfigError: The file is missing, is not TOML, or a key is unknown, missing or wrong.
    """
    config = load_config(path, Config)
    folder = path.resolve().parent
    agent = config.agent
    if not agent.state_dir:
        raise ConfigError(f"{path}: agent.state_dir is empty; name a directory")
    encoder = agent.encoder if agent.encoder == "default" else str(folder / agent.encoder)
    agent = msgspec.structs.replace(agent, state_dir=str(folder / agent.state_dir), encoder=encoder)
    return msgspec.structs.replace(config, agent=agent)

"""What is asked of the planner: a model on nodes of a cluster, a batch, and as much of the layout as is decided."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from turnout.clusters import load_cluster
from turnout.config import from_dict, load_toml
from turnout.errors import ConfigError
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import nearest_cut
from turnout.plan.shapes import SHAPES
from turnout.registry import nearest
from turnout.strategy import Strategy
from turnout.topology import Cluster, mesh_of


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question to the planner. `nodes` or `devices` says how many; both may, if they agree."""

    model: str | ModelShape  # name of a model, path of a Hugging Face config.json, or the dimensions
    cluster: str | Cluster = "dgx-h100"  # name of a machine, path of a .toml file, or the machine
    nodes: int = 0  # nodes the job runs on; 0: those of `devices`
    devices: int = 0  # devices the job runs on; 0: all of `nodes`
    seq_len: int = 4096  # tokens of a sequence
    global_batch: int = 1024  # sequences of an optimizer step
    strategy: Strategy = field(default_factory=Strategy)  # the layout asked about
    mtp_layers: int = -1  # blocks that predict further tokens (DeepSeek-V3's 1); -1: as the model has them
    framework: str = "megatron-core"  # the code whose memory and overlap are assumed
    skew: float = 1.0  # rows of the busiest expert rank over the mean
    capacity_factor: float = 0.0  # experts' buffers are padded to this times their mean of rows; 0: dropless

    def __post_init__(self) -> None:
        least_of = {
            "nodes": 0,
            "devices": 0,
            "seq_len": 1,
            "global_batch": 1,
            "skew": 1,
            "capacity_factor": 0,
            "mtp_layers": -1,
        }
        for name, least in least_of.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ConfigError(f"query.{name}={value} must be at least {least}; nearest legal: {least}")
        if self.framework not in FRAMEWORKS:
            names = FRAMEWORKS.names()
            raise ConfigError(
                f"query.framework={self.framework!r} must be one of: {', '.join(names)}{nearest(self.framework, names)}"
            )

    @property
    def shape(self) -> ModelShape:
        """Raises: ConfigError if the model is unknown, or its file is not one of a transformer."""
        shape = self.model if isinstance(self.model, ModelShape) else load_model(self.model)
        return shape if self.mtp_layers < 0 else replace(shape, mtp_layers=self.mtp_layers)

    @property
    def machine(self) -> Cluster:
        """Raises: ConfigError if the cluster is unknown or its file does not fit."""
        return self.cluster if isinstance(self.cluster, Cluster) else load_cluster(self.cluster)

    @property
    def world(self) -> int:
        """Devices of the job. Raises: ConfigError if nothing says how many, or two numbers do not agree."""
        per_node = self.machine.devices_per_node
        if not self.nodes and not self.devices:
            raise ConfigError(
                f"query.nodes=0 and query.devices=0: one must say how many; a node has {per_node}; "
                "nearest legal: nodes=1"
            )
        world = self.devices or self.nodes * per_node
        mesh_of(world, per_node)
        if self.nodes and self.nodes != -(-world // per_node):
            raise ConfigError(
                f"query.nodes={self.nodes} of {per_node} devices do not agree with query.devices={self.devices}; "
                f"nearest legal: nodes={-(-world // per_node)}"
            )
        return world

    def job(self) -> Job:
        """The job whose layout is legal for the model, the devices and the batch, dp filled in.

        Raises: ConfigError naming the field that does not fit and the nearest legal value.
        """
        shape = self.shape
        self._check_routing(shape)
        strategy = self.strategy.check(
            self.world,
            num_experts=shape.num_experts,
            num_layers=shape.all_layers,
            num_heads=shape.num_heads,
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            uneven=shape.may_lie_unevenly,
        )
        job = Job(
            shape=shape,
            strategy=strategy,
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            framework=FRAMEWORKS[self.framework],
            skew=self.skew,
            capacity_factor=self.capacity_factor,
        )
        _check_micro_batches(job)
        self.machine.device.flops_per_s(strategy.precision)
        return job

    def _check_routing(self, shape: ModelShape) -> None:
        """Raises: ConfigError for what is said of the routing of a model that has none."""
        for name, plain in (("skew", 1.0), ("capacity_factor", 0.0)):
            value = getattr(self, name)
            if not shape.num_experts and value != plain:
                raise ConfigError(f"query.{name}={value} is of experts, and the model has none; nearest legal: {plain}")

    def with_strategy(self, strategy: Strategy) -> "Query":
        """The same question about another layout."""
        return replace(self, strategy=strategy)


def _check_micro_batches(job: Job) -> None:
    """Raises: ConfigError if the batch is cut into too few micro-batches for the schedule, or not into whole rounds."""
    strategy, number = job.strategy, job.micro_batches
    legal = nearest_cut(number, strategy.schedule, strategy.pp)
    if number != legal:
        words = "a multiple of" if strategy.schedule == "interleaved" else "at least"
        each = strategy.dp * strategy.micro_batch
        raise ConfigError(
            f"strategy.schedule={strategy.schedule!r} of pp={strategy.pp} stages needs {words} "
            f"{strategy.pp if strategy.schedule == 'interleaved' else legal} micro-batches, and "
            f"global_batch={job.global_batch} has {number} of dp * micro_batch={each} sequences; "
            f"nearest legal: global_batch={legal * each}, or schedule='1f1b'"
        )


def load_model(name_or_path: str) -> ModelShape:
    """The built-in model of that name, or what a file describes: a Hugging Face config.json (or its folder), or a
    .toml file of the fields of ModelShape.

    Raises: ConfigError naming the built-in models, or what the file lacks.
    """
    if name_or_path in SHAPES:
        return SHAPES[name_or_path]
    if name_or_path.endswith(".json") or Path(name_or_path).is_dir():
        # the families of config.json files take longer to read than a plan of a named model to make
        from turnout.plan.hf_config import read_config

        return read_config(name_or_path)
    if name_or_path.endswith(".toml"):
        return from_dict(ModelShape, {"name": Path(name_or_path).stem} | load_toml(Path(name_or_path)), "model")
    raise ConfigError(
        f"unknown model {name_or_path!r}; available: {', '.join(SHAPES.names())}, or the path of a config.json "
        "or of a .toml file of dimensions"
        f"{nearest(name_or_path, SHAPES.names())}"
    )

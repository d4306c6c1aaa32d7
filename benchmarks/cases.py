"""What is measured: names, shapes and rounds. How is in the ``bench_*`` modules."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from jaxsafety.models.gpt import Positions, Preset
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.training.optim import Algorithm
from jaxsafety.types import Strategy
from jaxsafety.world import CONDITIONS


@dataclass(frozen=True)
class SamplerCase:
    """Draws from a world.

    Attributes:
        world: which one.
        draw: ``text`` (windows of the full grammar), ``pretrain`` (pretraining sequences) or a condition.
        batch_size: samples in one call.
        rounds: timed calls.
        peer_samples: samples in one call of the plain generator; 0 where it has no such draw.
    """

    world: str
    draw: str
    batch_size: int = 4096
    rounds: int = 10
    peer_samples: int = 0


SAMPLER = tuple(
    SamplerCase(world, draw, peer_samples=256 if draw in ("text", "pretrain") else 0)
    for world in ("tiny", "paper")
    for draw in ("text", "pretrain", *CONDITIONS)
)

# Samples of either generator that the bigram statistics are taken from.
STATISTIC_SAMPLES = 4096


@dataclass(frozen=True)
class TrainCase:
    """A few pretraining steps of several seeds, in every seed strategy.

    Attributes:
        name: of the case.
        world, preset, positions, algorithm: the recipe's choices.
        batch_size: sequences a step, per seed.
        steps: optimiser steps in one call.
        seed_counts: one race of the strategies for each.
        rounds: timed calls of each strategy.
    """

    name: str
    world: str
    preset: Preset
    positions: Positions
    algorithm: Algorithm
    batch_size: int
    steps: int
    seed_counts: tuple[int, ...]
    rounds: int


_SEEDS = (1, 2, 4, 8, 16, 32)
# The paper's batch is 512; 4 keep the step of 32 seeds within ten seconds on two cores.
TRAIN = (
    TrainCase("tiny", "tiny", "tiny", "learned", "muon", batch_size=64, steps=5, seed_counts=_SEEDS, rounds=5),
    TrainCase("paper", "paper", "paper", "sinusoidal", "adamw", batch_size=4, steps=1, seed_counts=_SEEDS, rounds=3),
)

# The first is the baseline of the others.
STRATEGIES: tuple[Strategy, ...] = ("map", "vmap", "sharded")


@dataclass(frozen=True)
class ProcessCase:
    """A Python process, from its start to its end.

    Attributes:
        name: of the case.
        code: what it runs, ``python -c``.
    """

    name: str
    code: str


# The first is the baseline of the others.
PROCESSES = (
    ProcessCase("import jax, flax", "import jax, flax"),
    ProcessCase(
        "import the library",
        "from jaxsafety import losses, world; from jaxsafety.methods import dpo, sft, unlearn; "
        "from jaxsafety.training import stepping",
    ),
    ProcessCase("import jaxsafety", "import jaxsafety"),
    ProcessCase("jaxsafety --help", "import sys; from jaxsafety.cli.main import main; sys.exit(main(['--help']))"),
    ProcessCase("python -c pass", "pass"),
)
PROCESS_ROUNDS = 5

FIRST_STEP_RECIPE = "experiments/quick.yaml"
FIRST_STEP_ROUNDS = 3


SVDProgram = Literal["full", "wide", "numpy", "torch", "torch_lowrank", "gram", "randomized"]


@dataclass(frozen=True)
class SVDCase:
    """Leading triplets of a stack of matrices with known ones, ``s_i = i^-decay``.

    Attributes:
        shape: ``l m n``, as many matrices of input width m and output width n.
        programs: what decomposes them; the first is the baseline of the others. ``wide`` is jax's SVD of the stack as
            it lies; ``numpy`` computes in float64 whatever it is given; ``torch`` is left out where it is missing.
        rank: triplets asked for; ``numpy``, ``torch`` and ``wide`` return all.
        judged: leading triplets whose values and space are compared.
        rounds: timed calls.
        warmups: untimed calls before.
        power_iterations: of ``torch_lowrank``.
        decay: of the spectrum, > 0.
    """

    shape: tuple[int, int, int]
    programs: tuple[SVDProgram, ...]
    rank: int
    judged: int
    rounds: int
    warmups: int = 1
    power_iterations: int = 3
    decay: float = 0.75


SVD = (
    SVDCase((12, 192, 768), get_args(SVDProgram), rank=64, judged=16, rounds=7),
    # An up projection of Llama-2 7B. A full SVD of it takes half a minute.
    SVDCase(
        (1, 4096, 11008),
        tuple(name for name in get_args(SVDProgram) if name != "wide"),
        rank=128,
        judged=32,
        rounds=2,
        warmups=0,
    ),
)


@dataclass(frozen=True)
class ProjectionCase:
    """Energies of vectors inside and outside the output space of every matrix of a stack.

    Attributes:
        shape: ``l m n`` with m < n; the space has m dimensions.
        vectors: how many for each matrix.
        outside: share of their energy outside the space, in (0, 1).
        condition: of the matrices.
        rounds: timed calls.
    """

    shape: tuple[int, int, int]
    vectors: int
    outside: float
    condition: float
    rounds: int


PROJECTION = ProjectionCase((12, 192, 768), vectors=256, outside=1e-4, condition=50.0, rounds=10)


@dataclass(frozen=True)
class SensitivityCase:
    """Sensitivities of a freshly initialised GPT on unsafe prompts.

    Attributes:
        world, preset: of the model.
        prompts: prompts in one call.
        rounds: timed calls.
    """

    world: str
    preset: Preset
    prompts: int
    rounds: int


SENSITIVITY = (
    SensitivityCase("tiny", "tiny", prompts=16, rounds=7),
    SensitivityCase("paper", "paper", prompts=4, rounds=3),
)


@dataclass(frozen=True)
class BranchCase:
    """Tuning losses on both answers to the same prompts.

    Attributes:
        world, preset: of the model.
        prompts: in one call.
        methods: whose loss and gradient are computed.
        rounds: timed calls.
    """

    world: str
    preset: Preset
    prompts: int
    methods: tuple[str, ...] = ("sft", "dpo", "unlearn")
    rounds: int = 15


BRANCHES = (BranchCase("tiny", "tiny", prompts=32), BranchCase("paper", "paper", prompts=8, rounds=5))


@dataclass(frozen=True)
class PeerCase:
    """Training steps beside the plain PyTorch model's.

    Attributes:
        train: model, batch and rounds; of ours, its seed counts also run with the batch drawn inside.
        windows: inputs per sequence, padded on the right; the first is the baseline across windows, the last the
            world's own.
    """

    train: TrainCase
    windows: tuple[int, ...]


def _peer(batch_size: int, *, rounds: int) -> PeerCase:
    name = f"paper, batch {batch_size}"
    train = TrainCase(name, "paper", "paper", "sinusoidal", "adamw", batch_size, 1, seed_counts=(1, 2), rounds=rounds)
    # The paper pads to 160 tokens, 159 inputs; its longest sequence has 114.
    return PeerCase(train, windows=(159, 114))


# Of the paper's batch of 512, what a step of a second or two holds on two cores.
PEERS = (_peer(16, rounds=7), _peer(64, rounds=3))
# Steps whose losses are compared before anything is timed: a whole schedule, warm-up and cosine.
PEER_STEPS = 4


@dataclass(frozen=True)
class DPOCase:
    """DPO's loss and its gradient by the policy's logits, from logits.

    Attributes:
        name: of the case.
        pairs: preferred and dispreferred answers.
        tokens: of each sequence, the prompt being its first third.
        vocab_size: ``v``.
        beta: both weights.
        rounds: timed calls.
    """

    name: str
    pairs: int
    tokens: int
    vocab_size: int
    beta: float
    rounds: int


DPO = (
    DPOCase("paper logits", pairs=32, tokens=115, vocab_size=59, beta=0.1, rounds=20),
    DPOCase("Llama-2 logits", pairs=2, tokens=128, vocab_size=32_000, beta=0.1, rounds=10),
)


@dataclass(frozen=True)
class GemmCase:
    """A float32 matrix product ``[m, k] @ [k, n]``, the machine's ceiling for the floor of ``profile``."""

    m: int
    k: int
    n: int


# The largest rate of these is the ceiling: a square one, and the paper's up projection on a batch of 16.
GEMMS = (GemmCase(2048, 2048, 2048), GemmCase(16 * 114, 192, 768))
GEMM_ROUNDS = 10

PROFILE = (TRAIN[0], replace(TRAIN[1], batch_size=16, steps=2))


@dataclass(frozen=True)
class PairCase:
    """One update beside its base.

    Attributes:
        shape: ``m n``.
        methods: of :func:`jaxsafety.study.checkpoints.weights.measure_matrix`; the first is the baseline.
        rank: triplets of ``randomized``.
        rounds: timed calls.
    """

    shape: tuple[int, int]
    methods: tuple[str, ...] = ("full", "gram", "randomized")
    rank: int = 256
    rounds: int = 1


# Up projections of Llama-2 7B and of Llama-3 8B.
PAIRS = (PairCase((4096, 11008)), PairCase((4096, 14336)))


@dataclass(frozen=True)
class CheckpointCase:
    """A pair of checkpoints on the disk that commands are run on.

    Attributes:
        config: the model.
        commands: ``jaxsafety analyze`` and what follows, ``{prompts}`` for a file of the package's 960 prompts, and
            ``{few}`` for one in fifteen of them.
    """

    config: LlamaConfig
    commands: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("weights", ()),
        ("activations", ("--prompts", "{few}")),
        ("activations", ("--prompts", "{prompts}")),
        ("activations", ("--dtype", "bfloat16", "--prompts", "{few}")),
        ("merge", ("--alpha", "1.5")),
        ("merge", ("--alpha", "1.5", "--part", "null_space")),
    )


# Llama-3 8B's sizes but for the depth, which memory does not grow with.
CHECKPOINTS = CheckpointCase(LlamaConfig(128_256, 8192, 2, 32, 8, 4096, 14336, 128))


@dataclass(frozen=True)
class PlanCase:
    """A step of tuning a large model, of which only shapes are made.

    Attributes:
        model: the checkpoint's.
        method: ``sft`` or ``dpo``.
        rank: of the adapter; None for all parameters.
        sequences: examples at a time.
        tokens: inputs of each.
    """

    model: LlamaConfig
    method: Literal["sft", "dpo"]
    rank: int | None
    sequences: int
    tokens: int


_LLAMA3_8B = LlamaConfig(128_256, 8192, 32, 32, 8, 4096, 14336, 128)
PLANS = (
    *(PlanCase(_LLAMA3_8B, "sft", 16, 1, tokens) for tokens in (1024, 2048)),
    PlanCase(_LLAMA3_8B, "dpo", 16, 1, 1024),
    PlanCase(_LLAMA3_8B, "sft", None, 1, 1024),
)
# The model whose steps are timed.
TUNED = LlamaConfig(512, 128, 4, 4, 2, 128, 352, 32)

CaseName = Literal[
    "sampler", "train_step", "branches", "peers", "profile", "first_step", "linalg", "sensitivity", "pair", "tuning"
]

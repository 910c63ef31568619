"""Flags of the shards: how many, on what, and how they are watched."""

from __future__ import annotations

from headgate.launcher.flag import Flag, Kind, Policy

SHARDS = (
    Flag(
        "sharded",
        Kind.BOOLEAN,
        "false: one shard unless --num-shard says more; true: at least two.",
        default_text="whatever --num-shard gives",
    ),
    Flag(
        "num-shard",
        Kind.INTEGER,
        "Number of tensor-parallel shard processes, up to the model's attention heads.",
        minimum=1,
        default_text="the number of GPUs, 1 on a CPU",
        env_aliases=("SM_NUM_GPUS",),
    ),
    Flag(
        "threads-per-shard",
        Kind.INTEGER,
        "Threads each shard computes with on a CPU.",
        minimum=1,
        default_text="the cores divided among the shards",
        own=True,
    ),
    Flag(
        "kernels",
        Kind.TEXT,
        "Which implementation of the kernels to use.",
        choices=("auto", "reference", "cpu", "triton"),
        default="auto",
        own=True,
    ),
    Flag(
        "batch-invariant",
        Kind.SWITCH,
        "What else is in the batch never changes the bits of an answer, on a GPU either: weights "
        "that are not quantised are multiplied by Triton's kernel instead of cuBLAS, which may "
        "take longer. On a CPU it never does.",
        default=False,
        own=True,
    ),
    Flag(
        "cuda-memory-fraction",
        Kind.NUMBER,
        "Share of each GPU's memory that a shard may use.",
        default=1.0,
        minimum=0.01,
        maximum=1,
    ),
    Flag(
        "shard-uds-path",
        Kind.PATH,
        "Prefix of the shards' sockets; `-{epoch}-{rank}` is appended.",
        default="",
        default_text="inside the private run directory",
    ),
    Flag(
        "master-addr",
        Kind.TEXT,
        "Address of this machine on which the shards of a group meet.",
        default="localhost",
    ),
    Flag(
        "master-port",
        Kind.PORT,
        "Port on which the first group meets; a restarted group takes a fresh one.",
        default_text="a free one",
    ),
    Flag(
        "null-shard",
        Kind.SWITCH,
        "A benchmark of everything but the model: shards that answer at once with the prompt's "
        "tokens over and over, without weights and on no GPU.",
        default=False,
        own=True,
    ),
    Flag(
        "heartbeat-timeout",
        Kind.NUMBER,
        "Seconds without a sign of life after which a shard counts as hung.",
        default=10.0,
        minimum=1,
        own=True,
    ),
    Flag(
        "startup-timeout",
        Kind.NUMBER,
        "Seconds that loading and warming up may take, the download not counted.",
        default=600.0,
        minimum=1,
        own=True,
    ),
    Flag(
        "cuda-graphs",
        Kind.TEXT,
        "Batch sizes that decoding captures as CUDA graphs on a GPU, separated by commas; 0: none.",
        default="",
        default_text="powers of two up to 8, then multiples of 8, as they occur",
    ),
    Flag(
        "disable-custom-kernels",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="kernels are chosen by the device (`--kernels reference` takes plain PyTorch)",
        neutral=(False,),
    ),
)

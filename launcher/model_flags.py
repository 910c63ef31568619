"""Flags of the model: which one, its chats, its numbers, its adapters."""

from __future__ import annotations

from headgate.launcher.flag import Flag, Kind, Policy

MOST_DRAFT_TOKENS = 64  # more are hardly ever right, and two rows would fill a CPU's smallest step

_QUANTIZE = ("int8", "int8-weight-only", "int4")  # those of headgate.kernels.quantised
_OTHER_QUANTIZE = (  # TGI's
    "awq",
    "bitsandbytes",
    "bitsandbytes-fp4",
    "bitsandbytes-nf4",
    "compressed-tensors",
    "eetq",
    "exl2",
    "fp8",
    "gptq",
    "marlin",
)

MODEL = (
    Flag(
        "model-id",
        Kind.TEXT,
        "The model: a local checkpoint directory, a hub id, or a .gguf file.",
        default="",
        default_text="the embedded model",
        env_aliases=("HF_MODEL_ID",),
    ),
    Flag(
        "revision",
        Kind.TEXT,
        "Branch, tag or commit of a hub model.",
        default="",
        default_text="main",
        env_aliases=("HF_MODEL_REVISION",),
    ),
    Flag(
        "served-model-name",
        Kind.TEXT,
        "The name that clients see and may put into `model`.",
        default="",
        default_text="the model id",
        own=True,
    ),
    Flag(
        "tokenizer-config-path",
        Kind.PATH,
        "A tokenizer_config.json to use instead of the model's, say for its chat template, or a "
        ".jinja file with the template alone.",
        default="",
    ),
    Flag(
        "tool-call-parser",
        Kind.TEXT,
        "The format of the model's tool calls.",
        choices=("auto", "hermes", "llama3_json", "pythonic", "mistral"),
        default="auto",
        default_text="auto: by the chat template",
        own=True,
    ),
    Flag(
        "reasoning-parser",
        Kind.TEXT,
        "Whether <think> ... </think> at the beginning of a chat's answer is told apart as "
        "reasoning_content; deepseek_r1: also where the model leaves out the opening tag.",
        choices=("off", "auto", "deepseek_r1"),
        default="auto",
        default_text="auto: where the chat template has such tags",
        own=True,
    ),
    Flag(
        "pooling",
        Kind.TEXT,
        "What becomes of a prompt's hidden states in an embedding: their mean, or the last one.",
        choices=("auto", "mean", "last"),
        default="auto",
        default_text="auto: the checkpoint's 1_Pooling/config.json, else mean",
        own=True,
    ),
    Flag(
        "model-module",
        Kind.PATH,
        "A Python file that registers a model architecture of your own.",
        default="",
        own=True,
    ),
    Flag(
        "dtype",
        Kind.TEXT,
        "How weights are stored; on a CPU the arithmetic is float32 whatever the choice, but see "
        "--matmul-precision.",
        choices=("bfloat16", "float16", "float32"),
        default_text="the checkpoint's, else bfloat16",
    ),
    Flag(
        "quantize",
        Kind.TEXT,
        "Quantise the weights on load: see quantization.md.",
        choices=_QUANTIZE + _OTHER_QUANTIZE,
        refused_values=_OTHER_QUANTIZE,
        env_aliases=("HF_MODEL_QUANTIZE",),
    ),
    Flag(
        "matmul-precision",
        Kind.TEXT,
        "How precisely a CPU multiplies bfloat16 weights, in torch's words. highest: by float32 "
        "inputs. medium: by inputs rounded to bfloat16, which is faster where the CPU has "
        "AVX512_BF16; see quantization.md. Sums are float32.",
        choices=("highest", "medium"),
        default="highest",
        own=True,
    ),
    Flag(
        "kv-cache-dtype",
        Kind.TEXT,
        "How keys and values are stored. int8: with a scale for every token and head. int8 or "
        "bfloat16 on a CPU, with --quantize int8 or int4 or --matmul-precision medium: attention "
        "is computed with such numbers too; see quantization.md.",
        choices=("auto", "float32", "bfloat16", "float16", "fp8_e4m3fn", "fp8_e5m2", "int8"),
        default="auto",
        default_text="auto: float32 on a CPU, int8 with --quantize int8 or int4 (bfloat16 where "
        "heads are not a multiple of 32), bfloat16 with --matmul-precision medium, float16 with "
        "int8-weight-only; the dtype on a GPU",
    ),
    Flag(
        "rope-scaling",
        Kind.TEXT,
        "Stretches rotary positions for prompts beyond the trained length.",
        choices=("linear", "dynamic"),
        default_text="the model's",
    ),
    Flag(
        "rope-factor",
        Kind.NUMBER,
        "By how much; given alone it means linear scaling.",
        minimum=1,
        default_text="1.0 with --rope-scaling",
    ),
    Flag(
        "trust-remote-code",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="Headgate never runs code from a model repository",
        neutral=(False,),
        env_aliases=("HF_MODEL_TRUST_REMOTE_CODE",),
    ),
    Flag(
        "huggingface-hub-cache",
        Kind.PATH,
        "Where hub models are kept.",
        default="",
        default_text="huggingface_hub's (HF_HUB_CACHE, HF_HOME)",
    ),
    Flag(
        "weights-cache-override",
        Kind.PATH,
        "A directory whose *.safetensors files are used instead of the model's own.",
        default="",
    ),
    Flag(
        "lora-adapters",
        Kind.LIST,
        "Adapters to load at start.",
        default=(),
        policy=Policy.REFUSED,
        note="LoRA adapters are not available in this version",
        neutral=((),),
    ),
    Flag(
        "speculate",
        Kind.INTEGER,
        "Draft tokens that a step may add to a row: guesses at its next tokens by n-grams, which "
        "are kept where it would have got them anyway; 0: none. See speculation.md.",
        minimum=0,
        maximum=MOST_DRAFT_TOKENS,
        default_text="11 on a CPU, 0 on a GPU",
    ),
)

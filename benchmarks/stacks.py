"""The ways to train that `train_step.py` compares: each makes a random model ready for a training step.

A stack is named `NAME`, `NAME:SPEC` (qft's, over another quantizer) or either with `@all`, `@half` or `@none`: how many
layers are recomputed in the backward pass, where that is not what the whole call asks for.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEMORY = {"all": "least", "half": 0.5, "none": "most", "auto": "auto"}
"""How many layers to recompute → `qft.optimize_training`'s `memory`."""


@dataclass(frozen=True)
class ByHand:
    """transformers and PEFT, put together by a user.

    Attributes:
        nf4: bitsandbytes' NF4 under the adapters; otherwise the weights stay bfloat16.
        upcast: `prepare_model_for_kbit_training`, which makes norms, embeddings and head float32.
        autocast: the step runs under bfloat16 autocast, over float32 adapters; otherwise adapters are bfloat16.
        liger: liger-kernel's cross-entropy, norm, rotary and SwiGLU.
        compile: each decoder layer through torch.compile.
    """

    nf4: bool = True
    upcast: bool = False
    autocast: bool = False
    liger: bool = False
    compile: bool = False


BY_HAND = {
    "hand": ByHand(upcast=True, autocast=True),
    "hand-bf16": ByHand(),
    "liger": ByHand(liger=True),
    "compiled": ByHand(compile=True),
    "liger-compiled": ByHand(liger=True, compile=True),
    "bf16": ByHand(nf4=False, autocast=True),
    "bf16-lean": ByHand(nf4=False),
    "bf16-compiled": ByHand(nf4=False, compile=True),
}
QFT: dict[str, dict[str, Any] | None] = {
    "qft": {},
    "qft-fp8": {"compute": "fp8"},
    "qft-offload": {"offload": "activations"},
    "qft-plain": None,
}
"""Name → what `qft.optimize_training` is told; None: it is not called."""
UNSLOTH = {"unsloth": "unsloth", "unsloth-plain": True}
"""Name → Unsloth's `use_gradient_checkpointing` where layers are recomputed."""
NAMES = (*BY_HAND, *UNSLOTH, *QFT)


@dataclass
class Task:
    """What one stack is to train.

    Attributes:
        folder: the same random model on disk, for stacks that load one themselves.
        double_quant: NF4's block constants in 8 bits, in every NF4 stack (Unsloth's are so always).
    """

    stack: str
    shape: str
    layers: int | None = None
    device: str = "cuda"
    rank: int = 16
    recompute: str = "all"
    sequence: int = 2048
    seed: int = 0
    double_quant: bool = False
    folder: str | None = None
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        return self.stack.partition("@")[0].partition(":")[0]

    @property
    def spec(self) -> str | None:
        return self.stack.partition("@")[0].partition(":")[2] or None

    @property
    def config(self) -> Any:
        return shapes.config(self.shape, self.layers)


@dataclass
class Ready:
    """A model that is ready to be trained.

    Attributes:
        context: what a step runs under.
        seconds: what getting there took, "make" for the random model and "setup" for the rest.
        recomputed: the share of layers that run forward twice; None where only the stack knows.
    """

    model: nn.Module
    context: Callable[[], Any] = contextlib.nullcontext
    seconds: dict[str, float] = field(default_factory=dict)
    recomputed: float | None = 1.0
    notes: list[str] = field(default_factory=list)


def check(stack: str) -> None:
    """Raises ValueError for a stack that there is not."""
    name, _, amount = stack.partition("@")
    name, _, spec = name.partition(":")
    if name not in NAMES or (spec and name not in QFT) or amount not in ("", "all", "half", "none", "auto"):
        raise ValueError(f"no stack {stack!r}: it is one of {', '.join(NAMES)}; qft's take :SPEC, each @all|half|none")


def preload(task: Task) -> None:
    """Import what the stack needs, and leave the device alone."""
    if task.name in UNSLOTH:
        return  # it looks at the device when it is imported
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if task.name in QFT:
        import qft

        qft.get_quantizer(task.spec or "nf4")


def build(task: Task) -> Ready:
    check(task.stack)
    torch.manual_seed(task.seed)
    if task.name in UNSLOTH:
        return _unsloth(task)
    start = time.perf_counter()
    model = shapes.random_model(task.config, task.device, seed=task.seed)
    made = _now(task)
    if task.name in BY_HAND:
        ready = _by_hand(model, task, BY_HAND[task.name])
    else:
        ready = _qft(model, task)
    ready.seconds = {"make": made - start, "setup": _now(task) - made}
    return ready


def _now(task: Task) -> float:
    if task.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _adapter(task: Task) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")


# ---- by hand -----------------------------------------------------------------------------------------------


def _by_hand(model: Any, task: Task, how: ByHand) -> Ready:
    from peft import get_peft_model, prepare_model_for_kbit_training

    keywords = {"use_reentrant": False}
    if how.nf4:
        nf4_by_hand(model, task.double_quant)
    if how.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    again = task.recompute != "none"
    if how.upcast:
        model = prepare_model_for_kbit_training(model, again, keywords)
    else:
        model.requires_grad_(False)
        if again:
            model.gradient_checkpointing_enable(keywords)
    layers = model.model.layers
    if task.recompute == "half":
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False
    wrapped = get_peft_model(model, _adapter(task), autocast_adapter_dtype=how.autocast)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.float32 if how.autocast else torch.bfloat16)
    if how.compile:
        torch._dynamo.config.recompile_limit = 64
        for layer in layers:
            layer.compile()
    context = (lambda: torch.autocast(task.device, torch.bfloat16)) if how.autocast else contextlib.nullcontext
    return Ready(wrapped, context, recomputed={"none": 0.0, "half": 0.5}.get(task.recompute, 1.0))


def nf4_by_hand(model: Any, double_quant: bool = False, compute: torch.dtype = torch.bfloat16) -> None:
    """What `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` does to a model while it loads."""
    import bitsandbytes as bnb

    for name, old in list(model.named_modules()):
        if type(old) is not nn.Linear or name.endswith("lm_head"):
            continue
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            compute_dtype=compute,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta",
        )
        new.bias = old.bias
        new.weight = bnb.nn.Params4bit(
            old.weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=new
        ).to(old.weight.device)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = model.is_quantized = True


# ---- qft ---------------------------------------------------------------------------------------------------


def _qft(model: Any, task: Task) -> Ready:
    import qft

    spec = task.spec or "nf4"
    notes: list[str] = []
    if task.double_quant and task.spec is None:
        spec = "nf4:double_quant=true"
    again = task.recompute != "none"
    if spec.partition(":")[0] in ("nf4", "fp4", "int8"):
        wrapped = qft.quantize_and_wrap(
            model, spec, adapter=_adapter(task), use_gradient_checkpointing=again, progress=False
        )
    else:
        copied(model, qft.get_quantizer(spec))
        notes.append("one layer of each shape is quantized, the others are copies of it")
        model = qft.prepare_model_for_kbit_training(model, again)
        wrapped = qft.wrap(model, _adapter(task))
    options = QFT[task.name]
    if options is None:
        if task.recompute == "half":
            for layer in model.model.layers[1::2]:
                layer.gradient_checkpointing = False
    elif not hasattr(qft, "optimize_training"):
        raise RuntimeError("this qft has no optimize_training: take qft-plain")
    else:
        wrapped = qft.optimize_training(wrapped, memory=MEMORY[task.recompute], **options)
    recomputed = {"none": 0.0, "half": 0.5, "all": 1.0}.get(task.recompute)
    return Ready(wrapped, recomputed=recomputed, notes=notes)


def copied(model: Any, quantizer: Any) -> None:
    """Put quantized layers in the place of the decoder's linears, quantizing one of each shape and copying it.

    Without calibration data, whatever the quantizer: formats are timed here, not their errors. With `desc_act`, columns
    get groups at random, as data would give them.
    """
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")}
    quantizer = quantizer.resolve([(n, tuple(m.weight.shape)) for n, m in linears.items()])
    done: dict[tuple[int, ...], nn.Module] = {}
    for name, linear in linears.items():
        shape = tuple(linear.weight.shape)
        if shape not in done:
            with torch.no_grad():
                done[shape] = quantizer.quantize_layer(linear)
            if getattr(quantizer, "desc_act", False):
                owner = done[shape].g_idx.data
                owner.copy_(owner[torch.randperm(len(owner), device=owner.device)])
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, copy.deepcopy(done[shape]))


# ---- Unsloth -----------------------------------------------------------------------------------------------


def _unsloth(task: Task) -> Ready:
    from unsloth import FastLanguageModel  # before transformers and PEFT, which it patches

    if task.recompute == "half":
        raise ValueError("Unsloth recomputes every layer or none")
    start = time.perf_counter()
    again = False if task.recompute == "none" else UNSLOTH[task.name]
    model, _ = FastLanguageModel.from_pretrained(
        task.folder,
        max_seq_length=task.sequence,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=again,  # its default patches torch's own checkpoints
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=task.rank,
        lora_alpha=task.rank,
        lora_dropout=0,
        bias="none",
        target_modules=list(LINEARS),
        use_gradient_checkpointing=again,
        random_state=task.seed,
    )
    model = FastLanguageModel.for_training(model, use_gradient_checkpointing=again) or model
    seconds = {"setup": _now(task) - start}  # reading the folder is a part of it
    return Ready(
        model,
        lambda: torch.autocast(task.device, torch.bfloat16),
        seconds,
        0.0 if task.recompute == "none" else 1.0,
        ["quantized while its folder is read; block constants in 8 bits"],
    )


def write_folder(task: Task, folder: Path) -> None:
    """The random model as safetensors, with a tokenizer that nobody will use."""
    model = shapes.random_model(task.config, task.device, seed=task.seed)
    model.save_pretrained(folder)
    if task.tokenizer:
        for source in Path(task.tokenizer).glob("*.json"):
            if source.name not in ("config.json", "generation_config.json"):
                (folder / source.name).write_bytes(source.read_bytes())
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<unk>", "<s>", "</s>", "<pad>"]
    words = marks + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=marks[0], bos_token=marks[1], eos_token=marks[2], pad_token=marks[3]
    ).save_pretrained(folder)


def environment(name: str) -> dict[str, str]:
    """Variables for the process of one stack."""
    paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return found | ({"UNSLOTH_DISABLE_STATISTICS": "1"} if name in UNSLOTH else {})

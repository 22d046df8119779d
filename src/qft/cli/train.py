"""The verb `qft train`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN.YAML] [KEY=VALUE]...", help="A YAML file with options, and options.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub id.")] = None,
    data_path: Annotated[
        str | None,
        typer.Option("--data-path", "--data_path", help="A .jsonl, .json, .csv or .parquet file, or a folder."),
    ] = None,
    project_name: Annotated[
        str | None, typer.Option("--project-name", "--project_name", help="The folder to write. [default: qft-run]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm, seq2seq, classification, vision-language.")] = None,
    peft: Annotated[
        bool | None,
        typer.Option("--peft/--no-peft", "--use-peft", "--use_peft", help="Train LoRA adapters, not all weights."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int4 (NF4), int8, none, or any quantizer: 'hqq:bits=3'. Of --peft.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option("--lora-r", "--lora_r", help="Rank. [default: 16]")] = None,
    lora_alpha: Annotated[float | None, typer.Option("--lora-alpha", "--lora_alpha", help="[default: 32]")] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora-dropout", "--lora_dropout", help="[default: 0.05]")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option("--target-modules", "--target_modules", help="all-linear, or names: q_proj,v_proj.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Where adapters start: loftq, qera, pissa, auto, ...")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: 2e-4]")] = None,
    epochs: Annotated[float | None, typer.Option(help="[default: 1]")] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", "--max_steps", help="Optimizer steps, instead.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option("--max-seconds", "--max_seconds", help="End training then, and save what was trained."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--batch_size", "--train-batch-size", help="Rows at once. [default: 2]"),
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option("--gradient-accumulation", "--gradient_accumulation", help="[default: 4]")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            "--max_length",
            "--block-size",
            "--block_size",
            "--model-max-length",
            help="Tokens. [default: 1024]",
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw_torch, paged_adamw_8bit, ...")] = None,
    scheduler: Annotated[str | None, typer.Option(help="linear, cosine, constant, ...")] = None,
    warmup_ratio: Annotated[
        float | None, typer.Option("--warmup-ratio", "--warmup_ratio", help="[default: 0.03]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", "--weight_decay")] = None,
    max_grad_norm: Annotated[float | None, typer.Option("--max-grad-norm", "--max_grad_norm")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option("--mixed-precision", "--mixed_precision", help="bf16, fp16, no.")
    ] = None,
    use_flash_attention_2: Annotated[
        bool | None,
        typer.Option("--use-flash-attention-2", "--use_flash_attention_2", help="SDPA where not installed."),
    ] = None,
    disable_gradient_checkpointing: Annotated[
        bool, typer.Option("--disable-gradient-checkpointing", "--disable_gradient_checkpointing")
    ] = False,
    merge_adapter: Annotated[
        bool | None, typer.Option("--merge-adapter", "--merge_adapter", help="Write the merged model, too.")
    ] = None,
    packing: Annotated[bool | None, typer.Option("--packing", help="No padding between the rows of a batch.")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", "--chat_template", help="chatml, tokenizer, or a file.")
    ] = None,
    train_split: Annotated[str | None, typer.Option("--train-split", "--train_split")] = None,
    valid_split: Annotated[
        str | None, typer.Option("--valid-split", "--valid_split", help="A split's name, or a file.")
    ] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", "--text_column")] = None,
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", "--prompt-text-column", "--prompt_text_column")
    ] = None,
    skip_bad_rows: Annotated[
        bool | None, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be read.")
    ] = None,
    logging_steps: Annotated[int | None, typer.Option("--logging-steps", "--logging_steps")] = None,
    save_total_limit: Annotated[int | None, typer.Option("--save-total-limit", "--save_total_limit")] = None,
    log: Annotated[str | None, typer.Option(help="tensorboard, none.")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 42]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. [default: the accelerator]")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, where a run was interrupted or finished.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars and notes.")] = False,
) -> None:
    """Fine-tune a model on data, over quantized weights, and go on where an interrupted run stopped.

    Give flags, as to autotrain, or one YAML file whose keys are the flags' names, with key=value in its place: `qft train
    run.yaml lr=1e-4`. Every field of qft.TrainConfig is a key.
    """
    given = {k: v for k, v in locals().items() if k in _FIELDS and v is not None}
    if disable_gradient_checkpointing:
        given["gradient_checkpointing"] = False
    if restart:
        given["resume"] = "restart"
    if quiet or json:
        given["progress"] = False
    config = _config(words or [], given)
    _logging(config.progress)
    if dry_run:
        _outline(config, json)
        return
    from qft.training.run import train

    try:
        result = train(config)
    except KeyboardInterrupt:
        print(f"\nqft: interrupted; {_left(config)}", file=sys.stderr)
        raise typer.Exit(130) from None
    if json:
        from json import dumps

        print(dumps(result.to_dict()))
    elif not quiet:
        print(result)


_FIELDS = (
    "model data_path project_name task peft quantization lora_r lora_alpha lora_dropout target_modules "
    "init lr epochs max_steps max_seconds batch_size gradient_accumulation max_length optimizer scheduler "
    "warmup_ratio weight_decay max_grad_norm mixed_precision use_flash_attention_2 merge_adapter packing "
    "chat_template train_split valid_split text_column prompt_column skip_bad_rows logging_steps "
    "save_total_limit log seed device"
).split()


def _config(words: list[str], given: dict[str, Any]) -> Any:
    from qft.errors import BadOption
    from qft.training.config import TrainConfig

    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise BadOption(f"give one YAML file, not {' and '.join(files)}; options read key=value, or --key value")
    given = {**_pairs([w for w in words if "=" in w]), **given}
    if given.get("chat_template") in ("tokenizer", "none"):  # autotrain's words for the tokenizer's own
        del given["chat_template"]
    if files:
        config = TrainConfig.from_yaml(files[0], given)
    else:
        given.setdefault("peft", False)  # as autotrain has it
        config = TrainConfig.from_dict(
            given, lambda key: "" if key else "give a YAML file, or --model and --data-path: "
        )
    asked = given.get("quantization") not in (None, "none", "None")
    if not config.peft and asked:
        print(
            "qft: --quantization is ignored without --peft: all weights are trained, as floats (--peft trains adapters over "
            "quantized weights)",
            file=sys.stderr,
        )
    return config


def _pairs(words: list[str]) -> dict[str, Any]:
    """key=value, its value read as YAML."""
    import yaml

    from qft.errors import BadOption

    found: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            found[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            raise BadOption(f"{word}: what follows '=' is no value that YAML reads; quote it") from None
    return found


def _left(config: Any) -> str:
    """What an interrupted run leaves."""
    from qft.training.folder import RunFolder

    last = RunFolder(config.project_name).last
    if last is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {last}; the same command goes on from there"


def _logging(progress: bool) -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("qft")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if progress else logging.WARNING)
    logger.propagate = False


def _outline(config: Any, json: bool) -> None:
    from json import dumps

    from qft.training.run import outline

    found = outline(config)
    if json:
        print(dumps({k: v for k, v in found.items() if k != "plan_text"}))
        return
    data = found["data"]["train"]
    print(
        f"{config.model}: {found['task']} on {found['device']}, {found['dtype']}, mixed precision {found['mixed_precision']}"
    )
    print(f"{data['rows']} rows, {data['tokens']} tokens, {data['learnt']} of them learnt; {found['steps']} steps")
    print(found["plan_text"] or f"no plan of memory: {found['no_plan']}")
    begins = {
        "new": "a new run",
        "resume": "goes on with an interrupted run",
        "finished": "this run is finished: nothing to do",
    }
    print(f"{begins[found['state']]}{'' if found['checkpoint'] is None else ', from ' + found['checkpoint']}")
    print("would write " + ", ".join(found["writes"]))

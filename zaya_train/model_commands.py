"""What commands about Hugging Face folders call, by the names in `model_arguments`.

Every handler imports the tool it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from zaya_train.config.errors import CheckpointError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def _import(options: argparse.Namespace) -> None:
    from zaya_train.tools.import_hf import ImportRequest, import_hf

    import_hf(ImportRequest(options.folder, options.model_yaml), Console())


def _export(options: argparse.Namespace) -> None:
    from zaya_train.tools.transfer import ExportRequest, Verification, export_hf

    asked = Verification(tokens=options.verify_tokens, data=options.verify_data)
    request = ExportRequest(
        source=options.source,
        output=options.output,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        layout=options.layout,
        verify=None if options.no_verify else asked,
    )
    export_hf(request, Console())


def _verify(options: argparse.Namespace) -> None:
    from zaya_train.tools.verify_export import VerifyRequest, verify_export

    verify_export(VerifyRequest(options.folder, options.against, options.files_only), Console())


def _require_model_folder(folder: Path) -> None:
    """CheckpointError where nothing can be loaded: transformers is seconds away."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json, not a model folder; `zaya export-hf` makes one"
        )


def _generate(options: argparse.Namespace) -> None:
    _require_model_folder(options.model)
    from zaya_train.tools.generate import GenerateArgs, GenerateRequest, run

    request = GenerateRequest(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    prompts = tuple(options.prompts)
    run(GenerateArgs(model_dir=options.model, prompts=prompts, request=request), Console())


def _evaluate(options: argparse.Namespace) -> None:
    _require_model_folder(options.model)
    from zaya_train.tools import evaluate

    console = Console()
    rows = evaluate.read_rows(options.rows)[: options.count]
    request = evaluate.EvalRequest(max_new_tokens=options.max_new_tokens)
    with Progress(console=console, transient=True) as progress:
        result = evaluate.exact_match(options.model, rows, request, progress)
    evaluate.print_report(result, console)
    if options.output:
        evaluate.write_report(result, options.output)


MODEL_HANDLERS = {
    "import-hf": _import,
    "export-hf": _export,
    "verify-export": _verify,
    "generate": _generate,
    "evaluate": _evaluate,
}

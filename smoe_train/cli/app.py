"""The command line: what can be asked; each command's work is in a file of its own, loaded when it runs."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from smoe_train import __version__
from smoe_train.cli.arguments import AsJson, NumProcesses, OutputDir, Overrides, RecipeArgument, RunArgument, Which
from smoe_train.cli.checkpoint_app import checkpoint_app
from smoe_train.errors import RunStoppedError, SmoeError, printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # whatever was written then, it is no bug

app = typer.Typer(
    name="smoe-train",
    help="Pretrain and fine-tune sparse mixture-of-experts transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(checkpoint_app, name="checkpoint")
glue_app = typer.Typer(help="Results of many fine-tuning runs, and GLUE's submission.", no_args_is_help=True)
app.add_typer(glue_app, name="glue")
data_app = typer.Typer(help="A recipe's data, without training.", no_args_is_help=True)
app.add_typer(data_app, name="data")
tokenizer_app = typer.Typer(help="Tokenizers, apart from any run.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")


@app.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Handle --version."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    launcher: Annotated[str, typer.Option(help="auto, torchrun, deepspeed or in_process.")] = "auto",
    hostfile: Annotated[Path | None, typer.Option(help="Machines, `NAME slots=N` a line.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint.")] = "auto",
    output_dir: OutputDir = Path("runs"),
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Start failed, killed or hung workers again so many times.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan only.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe only.")] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="key.path=a,b,c", help="Train once for each value; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results of a sweep as JSON.")] = False,
) -> None:
    """Train a recipe: start its worker processes, or resume where the run stopped."""
    from smoe_train.cli import train as command

    options = command.TrainOptions(
        recipe, tuple(overrides or ()), nproc, launcher, hostfile, resume, output_dir, max_restarts
    )
    if sweep or json:
        from smoe_train.cli.sweep import train_all

        raise typer.Exit(train_all(options, tuple(sweep or ()), print_config, dry_run, json))
    if print_config:
        command.print_config(options)
    elif dry_run:
        command.print_plan(options)
    else:
        raise typer.Exit(command.train(options))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or a folder of fine-tuned runs.")],
    top_k: Annotated[str, typer.Option("--top-k", help="Experts a token, e.g. 1,2,4; the recipe's if empty.")] = "",
    task: Annotated[str, typer.Option(help="Tasks, e.g. mnli,ax; of a fine-tuned run its own if empty.")] = "",
    split: Annotated[str, typer.Option(help="Split; if empty, valid of text, and dev of a task.")] = "",
    which: Annotated[
        str, typer.Option("--checkpoint", help="latest or best; if empty, latest for text, and best for a task.")
    ] = "",
    data: Annotated[
        list[str] | None, typer.Option(metavar="key=value", help="Override the data section; may be repeated.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first so many tokens.")] = None,
    write_predictions: Annotated[
        bool, typer.Option("--write-predictions", help="Write a task's answers into the run folder.")
    ] = False,
    nproc: NumProcesses = None,
    json: AsJson = False,
) -> None:
    """Measure a checkpoint: bits per byte and perplexity of text, or the metrics of tasks, at any k."""
    from smoe_train.cli import evaluate_tasks as command

    options = command.TaskOptions(str(run), task, split, top_k, which, tuple(data or ()), write_predictions)
    raise typer.Exit(command.evaluate_any(options, max_tokens, nproc, json))


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 chooses the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")] = 0.95,
    top_k: Annotated[int | None, typer.Option(help="Experts a token; the recipe's if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    which: Which = "latest",
    json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint."""
    from smoe_train.cli import generate as command

    command.generate(run, prompt, max_new_tokens, temperature, top_p, top_k, seed, which, json)


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Also run the first step and check it.")] = False,
    json: AsJson = False,
) -> None:
    """Check a recipe and show its layout and cost; no accelerator is touched without --self-test."""
    from smoe_train.cli import validate as command

    command.validate(recipe, tuple(overrides or ()), nproc or 1, self_test, json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the HTML report of a run, also while it trains."""
    from smoe_train.reporting import write_report

    print(write_report(run))


@app.command()
def routers(
    name: Annotated[str, typer.Argument(help="A policy, to see its options; all policies if not given.")] = "",
    json: AsJson = False,
) -> None:
    """List the routing policies, or show the options of one."""
    from smoe_train.cli import recipes as command

    command.list_routers(name, json)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Remove stale locks of extension builds.")] = False,
    json: AsJson = False,
) -> None:
    """Check versions, accelerator, compilers and what is known to hang runs."""
    from smoe_train.cli import doctor as command

    raise typer.Exit(command.doctor(fix, json))


@app.command()
def demo(
    output_dir: OutputDir = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Train a small HyperRouter mixture of experts with two expert-parallel processes and show the result."""
    from smoe_train.cli import demo as command

    raise typer.Exit(command.demo(output_dir, tuple(overrides or ())))


@data_app.command("prepare")
def data_prepare(recipe: RecipeArgument, overrides: Overrides = None, json: AsJson = False) -> None:
    """Download, check and tokenize a recipe's data, once; training then starts at once."""
    from smoe_train.cli import data as command

    command.prepare(recipe, tuple(overrides or ()), json)


@data_app.command("verify")
def data_verify(recipe: RecipeArgument, overrides: Overrides = None, json: AsJson = False) -> None:
    """Read source and tokens again and compare them with the recorded digests."""
    from smoe_train.cli import data as command

    command.verify(recipe, tuple(overrides or ()), json)


@data_app.command("show")
def data_show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="The split to show.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 3,
    json: AsJson = False,
) -> None:
    """Print the first samples of a split as a model sees them."""
    from smoe_train.cli import data as command

    command.show(recipe, tuple(overrides or ()), split, count, json)


@tokenizer_app.command("train")
def tokenizer_train(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    kind: Annotated[
        str | None, typer.Option("--type", help="sentencepiece or word; the recipe's if not given.")
    ] = None,
    inputs: Annotated[list[Path] | None, typer.Option("--input", help="File of text; may be repeated.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Learn from the training split of this recipe.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="sentencepiece: number of ids.")] = None,
    model_type: Annotated[str | None, typer.Option(help="sentencepiece: bpe or unigram.")] = None,
    byte_fallback: Annotated[bool | None, typer.Option(help="sentencepiece: spell what is not learnt.")] = None,
    character_coverage: Annotated[float | None, typer.Option(help="sentencepiece: share of characters.")] = None,
    input_sentence_size: Annotated[int | None, typer.Option(help="sentencepiece: lines to learn from.")] = None,
    max_size: Annotated[int | None, typer.Option(help="word: number of ids.")] = None,
    min_count: Annotated[int | None, typer.Option(help="word: keep words that come so often.")] = None,
    json: AsJson = False,
) -> None:
    """Learn a tokenizer from text and save it, for recipes with `tokenizer: {type: saved, path: FOLDER}`."""
    from smoe_train.cli import tokenizer as command

    options = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "byte_fallback": byte_fallback,
        "character_coverage": character_coverage,
        "input_sentence_size": input_sentence_size,
        "max_size": max_size,
        "min_count": min_count,
    }
    settings = {name: value for name, value in options.items() if value is not None}
    command.train(kind, inputs or [], recipe, settings, output, json)


@tokenizer_app.command("show")
def tokenizer_show(
    source: Annotated[str, typer.Argument(help="A saved tokenizer, run folder or checkpoint; or a recipe.")],
    overrides: Overrides = None,
    text: Annotated[str | None, typer.Option(help="Text to encode.")] = None,
    json: AsJson = False,
) -> None:
    """Show what a tokenizer is, and what it makes of a text."""
    from smoe_train.cli import tokenizer as command

    command.show(source, tuple(overrides or ()), text, json)


@recipes_app.command("list")
def recipes_list(json: AsJson = False) -> None:
    """List the shipped recipes."""
    from smoe_train.cli import recipes as command

    command.list_recipes(json)


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument) -> None:
    """Print a recipe as it is written."""
    from smoe_train.cli import recipes as command

    command.show_recipe(recipe)


@recipes_app.command("copy")
def recipes_copy(
    recipe: RecipeArgument, target: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml")
) -> None:
    """Copy a recipe, to change it."""
    from smoe_train.cli import recipes as command

    command.copy_recipe(recipe, target)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON Schema of recipes."""
    from smoe_train.cli import recipes as command

    command.print_schema()


@glue_app.command("summary")
def glue_summary(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    without_wnli: Annotated[bool, typer.Option("--without-wnli", help="Leave WNLI out of the average.")] = False,
) -> None:
    """Show mean and spread over seeds of each task, beside the constant baseline, and the GLUE average."""
    from smoe_train.cli import glue as command

    command.summary(runs, json, markdown, not without_wnli)


@glue_app.command("submission")
def glue_submission(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them: one run for each task.")],
    output: Annotated[Path, typer.Option(help="Archive to write.")] = Path("submission.zip"),
    fill_missing: Annotated[
        bool, typer.Option("--fill-missing", help="Fill files that no run predicts with a constant answer.")
    ] = False,
) -> None:
    """Write the archive of test predictions that gluebenchmark.com takes."""
    from smoe_train.cli import glue as command

    command.submission(runs, output, fill_missing)


def main() -> None:
    """Run the command line; what a user can cause ends with one message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.reconfigure(errors="backslashreplace")  # for names and texts that the terminal cannot show
    try:
        app()
    except SmoeError as error:
        prefix = "" if isinstance(error, RunStoppedError) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"error: {printable(str(error.filename or 'the output'))}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

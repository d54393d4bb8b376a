"""``generate``: continue a text with a checkpoint, through transformers' generation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from smoe_train.cli.run_folder import open_run
from smoe_train.errors import LaunchError


def generate(
    run: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    which: str,
    as_json: bool,
) -> None:
    """Prints the prompt and its continuation.

    Args:
        run: Run folder or checkpoint.
        prompt: Text to continue; not empty.
        max_new_tokens: Tokens to add.
        temperature: 0 chooses the likeliest token.
        top_p: Share of probability to sample from.
        top_k: Experts a token, or None for the recipe's.
        seed: Seed of the sampling.
        which: ``latest`` or ``best``.
        as_json: Whether to print JSON.

    Raises:
        LaunchError: The prompt is empty, or top_k or the length is impossible.
    """
    import torch

    from smoe_train.assembly import build_for_evaluation, checkpoint_tokenizer, evaluation_knobs, require_kind
    from smoe_train.parallel.process import Process
    from smoe_train.routing import Router

    _, recipe, checkpoint = open_run(run, which)
    require_kind(recipe, checkpoint, classifier=False)
    tokenizer = checkpoint_tokenizer(checkpoint)
    ids = tokenizer.encode_texts([prompt])[0]
    longest = recipe.model.max_sequence_length or recipe.training.sequence_length
    experts = top_k if top_k is not None else recipe.model.moe.top_k
    if not ids:
        raise LaunchError("--prompt: is empty; give at least one character")
    if not 1 <= experts <= recipe.model.moe.num_experts:
        raise LaunchError(f"--top-k {experts}: expected 1 to {recipe.model.moe.num_experts}")
    if recipe.model.positions == "learned" and len(ids) + max_new_tokens > longest:
        raise LaunchError(
            f"--max-new-tokens {max_new_tokens}: prompt and continuation exceed the {longest} learned positions"
        )
    if len(ids) + max_new_tokens > longest:
        print(f"note: the text grows beyond the {longest} tokens that the model was trained on", file=sys.stderr)
    process = Process.alone()
    model = build_for_evaluation(recipe, process, checkpoint)
    # Among all modules, since a policy over a base holds that base's router.
    if not all(module.causal for module in model.modules() if isinstance(module, Router)):
        raise LaunchError(
            f"{run}: its router {recipe.model.moe.router.type} looks at later tokens, which do not exist yet when text "
            "is generated; evaluate it, or train with a causal router"
        )
    sampling = {"do_sample": False} if temperature == 0.0 else {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    model.config.max_sequence_length = max(longest, len(ids) + max_new_tokens)  # said above; transformers says it worse
    prompt_ids = torch.tensor([ids], device=process.device)
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),  # transformers would take every token 0 of the prompt for padding
        max_new_tokens=max_new_tokens,
        knobs=evaluation_knobs(recipe, checkpoint, experts),
        pad_token_id=0,
        **({**sampling, "top_p": top_p, "top_k": 0} if temperature else sampling),
    )
    text = tokenizer.decode(output[0].tolist())
    print(json.dumps({"checkpoint": str(checkpoint.path), "text": text}) if as_json else text)

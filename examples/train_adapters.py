"""Train the three example adapters with PEFT on the CPU, and show their answers to questions they never saw.

    python examples/train_adapters.py [NAME ...] [--base-model DIR] [--out DIR] [--ask-only]

Each takes a few minutes on 2 cores. `examples/data/NAME.jsonl` holds the examples, one
`{"prompt": ..., "completion": ...}` a line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BASE_MODEL_NAME = "SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
IGNORED_LABEL = -100
"""What the loss of transformers' models leaves out."""
HELD_OUT = (
    "What is the capital of Italy?",
    "How do I boil an egg?",
    "Tell me about the ocean.",
    "Why is the sky blue?",
    "What should I eat for breakfast?",
    "How can I learn to play the guitar?",
    "Recommend a good pet for a child.",
    "What is a computer?",
    "How do plants grow?",
    "I feel tired today.",
    "What is the largest planet?",
    "How many days are in a week?",
)
"""Questions that stand in no data file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one adapter is trained. The three differ on purpose: a demo then meets several kinds."""

    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ATTENTION + MLP
    layers: tuple[int, ...] | None = None
    """Indices of the decoder layers to adapt; None is all."""
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    """Of the saved tensors; training is float32."""
    learning_rate: float = 1e-3
    """The highest; it warms up over a tenth of the steps and falls to zero along a cosine."""
    num_epochs: int = 5
    batch_size: int = 8
    seed: int = 7


RECIPES = {
    "haiku": Recipe(use_rslora=True, alpha=8, dtype=torch.float16, num_epochs=4),
    "json": Recipe(target_modules=ATTENTION, layers=tuple(range(10, 30)), alpha=32, num_epochs=3),
    "pirate": Recipe(rank_pattern={"down_proj": 4}, alpha_pattern={"down_proj": 8}),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer as token ids."""

    ids: list[int]
    num_prompt_tokens: int


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of one user message, ready for the answer to follow."""
    turn = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    return ids


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """Read one data file; each answer ends with the end of its turn."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["prompt"] in HELD_OUT:
            raise ValueError(f"{path.name}: {row['prompt']!r} is held out")
        prompt = encode(tokenizer, row["prompt"])
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        examples.append(Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return examples


def batches(examples: list[Example], recipe: Recipe, pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every epoch's batches in seeded random order, padded on the right; only answers have labels."""
    order = random.Random(recipe.seed)
    for _ in range(recipe.num_epochs):
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled), recipe.batch_size):
            chosen = shuffled[start : start + recipe.batch_size]
            width = max(len(example.ids) for example in chosen)
            ids = torch.full((len(chosen), width), pad_id)
            labels = torch.full((len(chosen), width), IGNORED_LABEL)
            for i, example in enumerate(chosen):
                end = len(example.ids)
                ids[i, :end] = torch.tensor(example.ids)
                labels[i, example.num_prompt_tokens : end] = ids[i, example.num_prompt_tokens : end]
            # No mask: with causal attention nothing that has a label sees the padding to its right.
            yield {"input_ids": ids, "labels": labels}


def train(base: Any, tokenizer: Any, name: str) -> PeftModel:
    """Train adapter `name` on `base`, which then carries it."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    # bfloat16 products where the processor has them: twice as fast, and training is noisier than that anyway.
    torch.set_float32_matmul_precision("medium")
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        layers_to_transform=None if recipe.layers is None else list(recipe.layers),
        use_rslora=recipe.use_rslora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL_NAME,
    )
    # PEFT records this name, and the machine's path otherwise.
    base.name_or_path = base.config._name_or_path = BASE_MODEL_NAME
    model: Any = get_peft_model(base, config)
    examples = read_examples(HERE / "data" / f"{name}.jsonl", tokenizer)
    num_steps = recipe.num_epochs * math.ceil(len(examples) / recipe.batch_size)
    num_warmup = max(1, num_steps // 10)

    def rate(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(examples, recipe, tokenizer.pad_token_id)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == num_steps - 1:
            elapsed = time.monotonic() - started
            print(f"{name}: step {step + 1}/{num_steps}, loss {loss.item():.3f}, {elapsed:.0f} s", flush=True)
    torch.set_float32_matmul_precision("highest")
    model.eval()
    return model  # type: ignore[no-any-return]


def save(model: PeftModel, name: str, out_dir: Path) -> None:
    """Write the adapter in PEFT's format, the same bytes for the same weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(RECIPES[name].dtype)
    with tempfile.TemporaryDirectory(dir=out_dir) as staging:
        # "auto" would ask the network whether the vocabulary grew.
        model.save_pretrained(staging, save_embedding_layers=False)
        target = out_dir / name
        target.mkdir(exist_ok=True)
        shutil.copyfile(Path(staging, "adapter_model.safetensors"), target / "adapter_model.safetensors")
        config = json.loads(Path(staging, "adapter_config.json").read_text())
    # PEFT keeps the names in a set, whose order changes from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, prompt: str, max_tokens: int = 80) -> tuple[str, bool]:
    """Return the greedy answer and whether it ended by itself."""
    ids = torch.tensor([encode(tokenizer, prompt)])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), output[-1].item() == tokenizer.eos_token_id


def show(base: Any, tokenizer: Any, adapter_dir: Path) -> None:
    """Print the saved adapter's answers to the held-out questions."""
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    print(f"--- {adapter_dir.name}")
    for prompt in HELD_OUT:
        answer, ended = ask(model, tokenizer, prompt)
        print(
            f"{prompt}\n    " + answer.replace("\n", "\n    ") + ("" if ended else " [not ended]"), flush=True
        )
    model.unload()


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--base-model", type=Path, default=HERE.parent / ".build" / "base_model")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--ask-only", action="store_true", help="train nothing, only ask the saved adapters")
    args = parser.parse_args(argv)
    names = args.names or list(RECIPES)
    if unknown := sorted(set(names) - RECIPES.keys()):
        parser.error(f"no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if not (args.base_model / "config.json").is_file():
        parser.error(f"no base model in {args.base_model}; run examples/prepare_base_model.py first")
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        # A fresh base each time: nothing of one adapter's training reaches the next.
        base = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.float32)
        if not args.ask_only:
            model = train(base, tokenizer, name)
            save(model, name, args.out)
            base = model.unload()
        show(base, tokenizer, args.out / name)


if __name__ == "__main__":
    main()

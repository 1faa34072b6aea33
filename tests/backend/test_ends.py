"""Where a sequence ends: end tokens, stop tokens and stop strings, beside transformers' own `generate`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner
from manylora.errors import InvalidArgumentError
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS = 24
EOS = 2


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says special tokens: all that are no byte."""
    directory = tmp_path_factory.mktemp("ends") / "base"
    shutil.copytree(tiny_model("llama"), directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    special = [name for name in tokenizer.get_vocab() if name.startswith("<unused")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["step by step", "running ahead"])
def engine(base: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_runs_ahead", lambda model: bool(request.param))
        with Engine(EngineConfig(base_model=str(base), num_threads=1)) as made:
            yield made


@pytest.fixture(scope="module")
def transformers_ids(base: Path) -> Callable[..., list[int]]:
    """What transformers generates greedily."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def generate(prompt: list[int], **options: Any) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                **{"max_new_tokens": NUM_TOKENS, **options},
            )
        return list(out[0, len(prompt) :].tolist())

    return generate


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 250, (5,), generator=generator).tolist() for _ in range(count)]


def free(engine: Engine, prompt: list[int], max_tokens: int = NUM_TOKENS) -> list[int]:
    (completion,) = engine.generate([prompt], max_tokens=max_tokens, ignore_eos=True)
    return completion.token_ids


def test_stop_tokens_end_a_sequence_as_end_tokens_do_for_transformers(
    engine: Engine, transformers_ids: Callable[..., list[int]]
) -> None:
    for prompt in prompts(4):
        ends = free(engine, prompt)[6:8]
        (found,) = engine.generate([prompt], max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=ends)
        assert found.token_ids == transformers_ids(prompt, eos_token_id=ends)
        assert (found.finish_reason, found.token_ids[-1] in ends) == ("stop", True)
        # The text is without the token that ended it.
        assert found.text == engine.tokenizer.decode(found.token_ids)


def test_no_stop_token_ends_a_sequence_before_min_tokens(
    engine: Engine, transformers_ids: Callable[..., list[int]]
) -> None:
    for prompt in prompts(3):
        ends = free(engine, prompt)[2:5]
        options = {"stop_token_ids": json.dumps(ends), "ignore_eos": True}
        (found,) = engine.generate([prompt], max_tokens=NUM_TOKENS, min_tokens=9, **options)
        assert found.token_ids == transformers_ids(prompt, eos_token_id=ends, min_new_tokens=9)
        assert not {*ends} & {*found.token_ids[:8]}


def test_stop_tokens_come_besides_the_end_tokens_and_outlive_ignore_eos(engine: Engine) -> None:
    (prompt,) = prompts(1)
    ids = free(engine, prompt)
    for stops, ignore_eos in (([ids[9]], False), ([EOS], True), ([EOS, ids[9]], True)):
        (found,) = engine.generate(
            [prompt], stop_token_ids=stops, ignore_eos=ignore_eos, max_tokens=NUM_TOKENS
        )
        ends = {*stops} | (set() if ignore_eos else {EOS})
        first = next((i for i, token_id in enumerate(ids) if token_id in ends), NUM_TOKENS - 1)
        assert found.token_ids == ids[: first + 1]


def test_rows_of_a_step_have_their_own_ends(engine: Engine) -> None:
    given = prompts(4)
    alone = [free(engine, prompt) for prompt in given]
    together = engine.generate(
        given, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=[alone[0][3], alone[2][5]], min_tokens=3
    )
    for prompt, completion in zip(given, together, strict=True):
        (one,) = engine.generate(
            [prompt],
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            stop_token_ids=[alone[0][3], alone[2][5]],
            min_tokens=3,
        )
        assert completion.token_ids == one.token_ids


def test_a_stop_token_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidArgumentError, match="stop_token_ids: got 300, allowed are ids from 0 to 299"):
        engine.generate([[5]], stop_token_ids=[300])


@pytest.mark.parametrize("form", ["{special}", "{before}{special}", "{special}{after}"])
def test_a_stop_string_with_a_special_token_ends_where_it_does_for_transformers(
    base: Path, engine: Engine, transformers_ids: Callable[..., list[int]], form: str
) -> None:
    def is_letter(text: str) -> bool:
        return text.isascii() and text.isalpha()

    tokenizer = AutoTokenizer.from_pretrained(base)
    special = {*tokenizer.all_special_ids}
    given = prompts(200)
    for number, whole in enumerate(engine.generate(given, max_tokens=NUM_TOKENS, ignore_eos=True)):
        names = tokenizer.convert_ids_to_tokens(whole.token_ids)
        places = [
            place
            for place in range(1, NUM_TOKENS - 1)
            if whole.token_ids[place] in special
            and all(is_letter(names[place + i]) for i in (-1, 1))
            and all(name.isascii() for name in names[:place])
        ]
        if places:
            prompt = given[number]
            break
    else:
        pytest.fail("the tiny model says no special token between two letters")
    before, name, after = names[places[0] - 1 : places[0] + 2]
    stop = form.format(before=before, special=name, after=after)
    (found,) = engine.generate([prompt], max_tokens=NUM_TOKENS, ignore_eos=True, stop=[stop])
    wanted = transformers_ids(prompt, stop_strings=[stop], tokenizer=tokenizer, eos_token_id=None)
    assert (found.token_ids, found.finish_reason) == (wanted, "stop")
    assert len(wanted) < NUM_TOKENS
    written, end, _ = tokenizer.decode(wanted).partition(stop)
    assert end == stop
    for hidden in tokenizer.all_special_tokens:
        written = written.replace(hidden, "")
    assert found.text == written


@pytest.fixture
def torn(base: Path, tmp_path: Path) -> Path:
    """A base model whose files name an end token each."""
    directory = tmp_path / "torn"
    shutil.copytree(base, directory)
    for name, token_ids in (("generation_config.json", [7, 300]), ("config.json", 8)):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": token_ids}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<unused290>"
    tokenizer.save_pretrained(directory)
    return directory


def test_every_end_token_that_a_file_names_ends_a_sequence(
    torn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Engine(EngineConfig(base_model=str(torn), num_threads=1)) as engine:
        # 300 is none of the vocabulary's.
        assert engine.info.eos_token_ids == [7, 8, 290]
        (prompt,) = prompts(1)
        free_ids = free(engine, prompt)
        engine.scheduler.endings.eos_token_ids = frozenset([free_ids[4]])
        (found,) = engine.generate([prompt], max_tokens=NUM_TOKENS)
        assert found.token_ids == free_ids[: free_ids.index(free_ids[4]) + 1]
    names = [engine.tokenizer.name(i) for i in (7, 8, 290)]
    assert f"end tokens: {names[0]} (7), {names[1]} (8), {names[2]} (290)" in caplog.messages


def test_the_configuration_overrides_the_end_tokens(base: Path) -> None:
    config = EngineConfig.from_strings({"base_model": str(base), "num_threads": "1", "eos_token_ids": "9, 4"})
    assert config.eos_token_ids == (9, 4)
    assert EngineConfig.from_json(config.to_json()) == config
    with Engine(config) as engine:
        assert engine.info.eos_token_ids == [9, 4]


@pytest.mark.parametrize("text", ["9;4", "-1", "a", "1.0", "٧"])
def test_end_tokens_that_are_no_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="eos_token_ids="):
        EngineConfig.from_strings({"base_model": "x", "eos_token_ids": text})


def test_an_end_token_outside_the_vocabulary_stops_the_start(base: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="eos_token_ids: got 300, allowed are ids from 0 to 299"):
        Engine(EngineConfig(base_model=str(base), num_threads=1, eos_token_ids=(3, 300)))

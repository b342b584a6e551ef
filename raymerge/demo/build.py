"""Build the demo from nothing: questions, text, tokenizer and model. `python -m raymerge.demo.build --help`.

Twelve subjects in English, Spanish and French, parallel row by row. Three phases of training: `start` and `settle`
train five layers; `grow` splits layers 1-4 into five copies each, interleaves the copies of neighbours, and trains the
21 layers on with layers dropped at random, more often towards the end, so that the model loses its skill gradually as
its last layers merge.

Held out: no training sequence shows a question of the dev, val or test files with its options in the file's order, in
any language; dev, val and test share no question with the same set of options; text.txt comes from a seed of its own.
Not held out: the facts. The model has seen each capital, colour and day, as a language model has.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing, nn
from transformers import AutoModelForCausalLM

from raymerge.demo.generator import (
    LANGUAGES,
    Question,
    draw_splits,
    header,
    held_out,
    held_out_text,
    prompt,
    write_questions,
)
from raymerge.demo.model import Shape, StackedLlama, to_transformers
from raymerge.demo.tokenizer import BOS, EOS, PAD, make_tokenizer, save_tokenizer, token_id
from raymerge.demo.train import PHASES, first_model, train_phase

# Fixed, because the ranks draw different sequences: another number would give another model.
RANKS = 2


def _save_phase(path: Path, model: StackedLlama, option_head: nn.Linear) -> None:
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    weights |= {f"option.{name}": weight for name, weight in option_head.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata={"layers": str(model.shape.layers)})
    partial.rename(path)


def _load_phase(path: Path) -> tuple[StackedLlama, nn.Linear]:
    weights = load_file(path)
    vocabulary, hidden = weights["model.embedding"].shape
    model = StackedLlama(Shape(vocabulary=vocabulary, layers=len(weights["model.attention_in"])))
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")})
    option_head = nn.Linear(hidden, 1)
    option_head.load_state_dict(
        {name.removeprefix("option."): w for name, w in weights.items() if name.startswith("option.")}
    )
    return model, option_head


def _train_rank(rank: int, work: Path, seed: int) -> None:
    """Train the phases that `work` does not hold yet; runs in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", world_size=RANKS, rank=rank)
    tokenizer = make_tokenizer(seed)
    held = held_out(draw_splits(seed))
    model, option_head = first_model(tokenizer, seed)
    for phase in PHASES:
        path = work / f"{phase.name}.safetensors"
        if path.exists():
            model, option_head = _load_phase(path)
            continue
        report: Callable[[str], None] = print_now if rank == 0 else _silent
        model = train_phase(phase, model, option_head, tokenizer, held, seed=seed, report=report)
        if rank == 0:
            _save_phase(path, model, option_head)
    dist.destroy_process_group()


def _silent(_: str) -> None:
    """Report of the ranks that do not print."""


def print_now(message: str) -> None:
    """Print through a pipe without delay."""
    print(message, flush=True)


def train(work: Path, seed: int) -> StackedLlama:
    """Train on `RANKS` processes; finished phases stay in `work` as safetensors and are not trained again."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "rendezvous").unlink(missing_ok=True)
    # Idle OpenMP threads that spin took a forward of 110 tokens from 24 ms to 2.5 s on a busy machine.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
    multiprocessing.spawn(_train_rank, args=(work, seed), nprocs=RANKS)
    return _load_phase(work / f"{PHASES[-1].name}.safetensors")[0]


def export(model: StackedLlama, folder: Path, seed: int) -> None:
    """Write the Hugging Face checkpoint in bfloat16, after checking that it computes what the trained model does."""
    tokenizer = make_tokenizer(seed)
    bos, eos, pad = (token_id(tokenizer, token) for token in (BOS, EOS, PAD))
    exported = to_transformers(model, bos=bos, eos=eos, pad=pad)
    tokens = torch.randint(0, model.shape.vocabulary, (2, 64), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        trained = model.logits(model.hidden_states(tokens, list(range(model.shape.layers)))[-1])
        difference = float((exported(tokens).logits - trained).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"logits of the exported and the trained model differ by {difference:.2g} (limit 1e-3)")
    exported.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    # safetensors writes files that only their owner can read; an installed package is read by others.
    (folder / "model.safetensors").chmod(0o644)


@torch.no_grad()
def accuracy(checkpoint: Path, splits: dict[str, dict[str, list[Question]]], seed: int, *, count: int) -> float:
    """5-shot accuracy of a checkpoint on the first `count` validation questions of every subject and language."""
    tokenizer = make_tokenizer(seed)
    letters = [token_id(tokenizer, f"▁{letter}") for letter in "ABCD"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    right = total = 0
    for subject, rows in splits.items():
        for language in LANGUAGES:
            examples = "".join(prompt(question, language, with_answer=True) for question in rows["dev"])
            for question in rows["val"][:count]:
                text = header(subject) + examples + prompt(question, language, with_answer=False)
                logits = model(torch.tensor([tokenizer.encode(text).ids])).logits[0, -1, letters]
                right += int(logits.argmax()) == question.answer
                total += 1
    return right / total


def build(out: Path, work: Path, seed: int) -> None:
    """Write the whole demo to `out`; `work` keeps the finished phases."""
    started = time.monotonic()
    splits = draw_splits(seed)
    for name in ("mmlu", "checkpoint"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_questions(out / "mmlu", splits)
    (out / "text.txt").write_text(held_out_text(seed), encoding="utf-8")
    print_now(f"questions and text written to {out}; training {RANKS} processes of one thread")
    model = train(work, seed)
    export(model, out / "checkpoint", seed)
    share = accuracy(out / "checkpoint", splits, seed, count=5)
    files = [out / "text.txt", *(out / "mmlu").rglob("*.csv"), *(out / "checkpoint").iterdir()]
    size = sum(path.stat().st_size for path in files)
    minutes = (time.monotonic() - started) / 60
    print_now(f"done in {minutes:.1f} minutes: {size / 1e6:.2f} MB, accuracy on validation questions {share:.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m raymerge.demo.build", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: the package)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--work", type=Path, help="folder that keeps finished phases, to resume from (default: none)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        build(options.out.resolve(), (options.work or Path(temporary)).resolve(), options.seed)


if __name__ == "__main__":
    main()
